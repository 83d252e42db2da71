"""Stored files that are on this disk already: which of their pieces are the listed ones."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from pathlib import Path

from cai.model.index import StoredFile
from cai.model.layout import PIECE
from cai.store.publication import wrong_pieces


def missing_pieces(path: Path, listed: StoredFile) -> list[int]:
    """Numbers of the pieces of a file that are not the listed ones; holes are not even read."""
    missing: list[int] = []
    if size_of(path) < 0:
        return list(range(len(listed.pieces)))
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        for number in range(len(listed.pieces)):
            start, length = number * PIECE, piece_length(listed, number)
            try:
                hole = os.lseek(handle, start, os.SEEK_DATA) >= start + length
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                hole = True
            data = b"" if hole else os.pread(handle, length, start)
            if len(data) != length or wrong_pieces(data, listed, number):
                missing.append(number)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)
    return missing


def piece_length(listed: StoredFile, number: int) -> int:
    """Bytes of a piece; the last one is shorter."""
    return min(PIECE, listed.size - number * PIECE)


def unshare(path: Path) -> None:
    """Replace a hard link by a file of its own with the same bytes."""
    copy = path.with_name(path.name + ".copy")
    shutil.copyfile(path, copy)
    copy.rename(path)


def linked(path: Path, new: Path) -> bool:
    """Whether a hard link could be made; some file systems have none."""
    try:
        os.link(path, new)
    except OSError:
        return False
    return True


def size_of(path: Path) -> int:
    """Bytes of a regular file; -1 where there is none."""
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return -1
    return found.st_size if stat.S_ISREG(found.st_mode) else -1


def same_file(path: Path, other: Path) -> bool:
    """Whether both are one file, by hard links."""
    return size_of(other) >= 0 and path.samefile(other)


def files_below(root: Path) -> set[str]:
    """Everything below but directories."""
    return {
        path.relative_to(root).as_posix()
        for path in root.rglob("*") if path.is_symlink() or not path.is_dir()
    }


def open_file(path: Path, flags: int) -> int:
    """Open a file to be written, never through a symbolic link; the caller closes it."""
    return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o644)
