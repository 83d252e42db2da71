"""Reading whole trees: groups decrypted by workers, hashed in order here.

What decrypts, writes to disk or checks a model stands on this: workers fill shared slots with the
plaintext and the stored bytes of up to four groups, and hand them over in the order of the files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from cai.model.gocryptfs.crew import Crew
from cai.model.gocryptfs.layout import GROUP_PLAIN, GROUP_STORED, groups_in
from cai.model.gocryptfs.reader import BlockReader
from cai.model.tree import Entry

UNIT_GROUPS = 4
FORGET_GROUPS = 64
"""Groups whose ciphertext is dropped from the page cache at once."""

UNIT_PLAIN = UNIT_GROUPS * GROUP_PLAIN
SLOT = UNIT_PLAIN + UNIT_GROUPS * GROUP_STORED


class CipherTreeModel(Protocol):
    """A model whose files ``BlockReader`` reads."""

    def open(self, path: str) -> BlockReader:
        """Open a file."""


@dataclass(frozen=True, slots=True)
class Unit:
    """Up to four groups of one file."""

    path: str
    size: int
    group: int

    @property
    def offset(self) -> int:
        """Where it begins in the plaintext."""
        return self.group * GROUP_PLAIN

    @property
    def length(self) -> int:
        """Its plaintext bytes."""
        return min(UNIT_PLAIN, self.size - self.offset)

    @property
    def last(self) -> bool:
        """Whether the file ends with it."""
        return self.offset + self.length >= self.size

    def plain(self, slot: memoryview) -> memoryview:
        """The plaintext in its slot."""
        return slot[: self.length]


def units(files: Iterable[Entry]) -> Iterator[Unit]:
    """The units of every file; an empty file has one, of no bytes, so that it is opened too."""
    for entry in files:
        for group in range(0, max(1, groups_in(entry.size)), UNIT_GROUPS):
            yield Unit(entry.path, entry.size, group)


class UnitReader:
    """What a worker does with a unit: read, decrypt, verify, and perhaps write the plaintext.

    Args:
        model: what is read.
        sink: gets each unit's plaintext, verified, in the worker.
    """

    def __init__(
        self, model: CipherTreeModel, sink: Callable[[Unit, memoryview], None] | None = None
    ) -> None:
        self._model, self._sink = model, sink
        self._path: str | None = None
        self._reader: BlockReader | None = None

    def work(self, unit: Unit, slot: memoryview) -> bytes:
        """Fill the slot with the plaintext, then the stored bytes; gives the length of those.

        Raises:
            Tampered, StorageError: as ``BlockReader.read_group``.
        """
        if self._reader is None or self._path != unit.path:
            self.close()
            self._reader, self._path = self._model.open(unit.path), unit.path
        reader, plain = self._reader, unit.plain(slot)
        end = UNIT_PLAIN
        for i in range(groups_in(unit.length)):
            part = plain[i * GROUP_PLAIN : (i + 1) * GROUP_PLAIN]
            end += len(reader.read_group(unit.group + i, slot[end : end + GROUP_STORED], part))
        if unit.last or (unit.group + UNIT_GROUPS) % FORGET_GROUPS == 0:
            behind = unit.group % FORGET_GROUPS * GROUP_PLAIN
            reader.forget(unit.offset - behind, behind + unit.length)
        if self._sink is not None:
            self._sink(unit, plain)
        return (end - UNIT_PLAIN).to_bytes(8, "big")

    def close(self) -> None:
        """Close the file that is open in this process."""
        reader, self._reader, self._path = self._reader, None, None
        if reader is not None:
            reader.close()


def run_units(
    crew: Crew[Unit], files: Iterable[Entry]
) -> Iterator[tuple[Unit, memoryview, memoryview]]:
    """Read every file: (unit, plaintext, stored blocks), in order.

    Raises:
        Tampered, StorageError: naming the first file that is not what was sealed.
    """
    for unit, slot, length in crew.run(units(files)):
        end = UNIT_PLAIN + int.from_bytes(length, "big")
        yield unit, unit.plain(slot), slot[UNIT_PLAIN:end]


class LastDescriptor:
    """The descriptor of the file that a worker used last."""

    def __init__(self) -> None:
        self._held = ("", -1)

    def get(self, path: str, opened: Callable[[], int]) -> int:
        """The descriptor of this file, opened when it is another one than before."""
        if self._held[0] != path or self._held[1] < 0:
            self.close()
            self._held = path, opened()
        return self._held[1]

    def close(self) -> None:
        """Close it."""
        if self._held[1] >= 0:
            os.close(self._held[1])
        self._held = "", -1
