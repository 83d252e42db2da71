"""An opened model as a read-only tree: the interface that the formats give and the mounts take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol


class EntryType(StrEnum):
    """Kinds of tree entry."""

    FILE = "file"
    DIRECTORY = "dir"
    SYMLINK = "symlink"


@dataclass(frozen=True, slots=True)
class Entry:
    """One path of a model's tree.

    Attributes:
        path: relative, ``/``-separated, valid UTF-8, no empty, ``.`` or ``..`` part.
        type: file, directory or symlink.
        size: plaintext bytes; of a symlink, the length of its target in UTF-8; 0 for directories.
        mode: permission bits, 0o777 at most.
        target: where a symlink points, inside the tree; empty otherwise.
        sha256: plaintext digest of a file, 64 hex digits; empty otherwise.
    """

    path: str
    type: EntryType
    size: int
    mode: int
    target: str = ""
    sha256: str = ""


class FileReader(Protocol):
    """Random access to one file of an opened model; safe to use from several threads and forks."""

    chunk_size: int
    """Bytes that are authenticated at once; reads at its multiples are cheapest."""

    def readinto(self, offset: int, buffer: memoryview) -> int:
        """Fill ``buffer`` with authenticated plaintext from ``offset``.

        Returns:
            Bytes filled: ``len(buffer)``, or fewer at the end of the file.

        Raises:
            Tampered: some byte of the range does not authenticate; nothing of it may be used.
            StorageError: the ciphertext cannot be read.
        """

    def close(self) -> None:
        """Release the descriptors."""


class ModelTree(Protocol):
    """An opened, authenticated model."""

    entries: Mapping[str, Entry]
    """Every path but the root, parents before children."""

    def open(self, path: str) -> FileReader:
        """Open a file of the tree.

        Raises:
            InputMissing: no such file.
            Tampered: its stored object is missing or is not the sealed one.
        """

    def close(self) -> None:
        """Release everything."""
