"""What a worker does with a unit of a file: read, encrypt, write (spec-gocryptfs §8)."""

from __future__ import annotations

import os
from dataclasses import dataclass

from cai.model.gocryptfs.below import open_below
from cai.model.gocryptfs.blocks import BlockCipher, encode_header, tag_digest
from cai.model.gocryptfs.layout import (
    GROUP,
    GROUP_PLAIN,
    GROUP_STORED,
    HEADER_SIZE,
    block_offset,
    groups_in,
    stored_size,
)
from cai.model.gocryptfs.origins import CipherOrigin, Plain, Token
from cai.model.stage import write_all

UNIT_GROUPS = 4
"""Groups in one unit of work: 4 MiB of plaintext."""

UNIT_PLAIN = UNIT_GROUPS * GROUP_PLAIN
SLOT = UNIT_PLAIN + UNIT_GROUPS * GROUP_STORED
"""Memory of one unit: its plaintext, then its stored blocks."""

_FLUSH_GROUPS = 64


@dataclass(frozen=True, slots=True)
class SealUnit:
    """One unit of work: up to four groups of one file.

    Attributes:
        file: number of the file.
        path: of its plaintext.
        stored: of its ciphertext.
        token: of its origin.
        file_id: of its ciphertext.
        size: of its plaintext, bytes.
        group: number of the first group.
    """

    file: int
    path: str
    stored: str
    token: Token
    file_id: bytes
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

    def blocks(self, slot: memoryview) -> memoryview:
        """The stored blocks in its slot."""
        return slot[UNIT_PLAIN : UNIT_PLAIN + stored_size(self.length) - HEADER_SIZE]


class UnitWriter:
    """Keeps the descriptors of the file that a worker used last.

    Args:
        origin: gives the plaintext.
        blocks: encrypts it.
        root: descriptor of the sealed model in the making.
    """

    def __init__(self, origin: CipherOrigin, blocks: BlockCipher, root: int) -> None:
        self._origin, self._blocks, self._root = origin, blocks, root
        self._file = -1
        self._plain: Plain | None = None
        self._out = -1

    def work(self, unit: SealUnit, slot: memoryview) -> bytes:
        """Read, encrypt and write one unit; gives the tag digests of its groups.

        Raises:
            CaiError, OSError: it cannot be read or written, or is not what was begun.
        """
        source = self._opened(unit)
        plain = unit.plain(slot)
        source.readinto(unit.offset, plain)
        digests = b""
        for i in range(groups_in(unit.length)):
            at = UNIT_PLAIN + i * GROUP_STORED
            stored = self._blocks.encrypt(
                unit.file_id, (unit.group + i) * GROUP,
                plain[i * GROUP_PLAIN : (i + 1) * GROUP_PLAIN], slot[at : at + GROUP_STORED],
            )
            digests += tag_digest(stored)
        start, views = block_offset(unit.group * GROUP), [unit.blocks(slot)]
        if unit.group == 0:
            start, views = 0, [memoryview(encode_header(unit.file_id)), *views]
        write_all(self._out, views, start)
        if unit.group and unit.group % _FLUSH_GROUPS == 0:
            # Starts writing back, so that the sync at the end does not have to wait for everything.
            # Seldom, because the kernel looks at every page, and may wait for its other CPUs.
            behind = _FLUSH_GROUPS * GROUP_STORED
            os.posix_fadvise(self._out, start - behind, behind, os.POSIX_FADV_DONTNEED)
        return digests

    def close(self) -> None:
        """Close what is open in this process."""
        plain, self._plain = self._plain, None
        out, self._out, self._file = self._out, -1, -1
        if plain is not None:
            plain.close()
        if out >= 0:
            os.close(out)

    def _opened(self, unit: SealUnit) -> Plain:
        if self._plain is None or self._file != unit.file:
            self.close()
            self._plain = self._origin.open(unit.path, unit.token)
            self._out = open_below(self._root, unit.stored, os.O_WRONLY)
            self._file = unit.file
        return self._plain
