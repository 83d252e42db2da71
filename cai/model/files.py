"""Opening the stored files of a sealed model: by directory descriptor, without following links."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Protocol

from cai.errors import InputError, InputMissing, LimitExceeded, Tampered, from_os_error
from cai.model.layout import HEADER_FILE, OBJECTS_DIR

_FILE = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_DIRECTORY = os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY


class SealedFiles(Protocol):
    """The stored files of one sealed model, wherever they lie; handles are small integers.

    Safe to use from several threads and forked processes. Whoever implements it need not be
    trusted: everything read through it is authenticated by its reader.
    """

    @property
    def directory(self) -> Path | None:
        """Where they lie on this machine, if they do."""

    def open(self, stored: str) -> int:
        """Open a stored file, e.g. ``objects/<32 hex>``, until ``release``."""

    def length(self, handle: int) -> int:
        """Stored bytes of an open file."""

    def preadv(self, handle: int, views: list[memoryview], offset: int) -> int:
        """Fill the views from ``offset``, perhaps not all of them; 0 at the end of the file."""

    def forget(self, handle: int, offset: int, length: int) -> None:
        """This part is not needed again."""

    def release(self, handle: int) -> None:
        """Close an open file; works after ``close`` too."""

    def read(self, stored: str, *, limit: int) -> bytes:
        """A small stored file whole, of at most ``limit`` bytes."""

    def listing(self) -> set[str]:
        """Every stored path."""

    def close(self) -> None:
        """Close everything but the open files."""


class StoredFiles:
    """The directory OUT, held open so that a swapped path changes nothing.

    Args:
        directory: the sealed model.

    Raises:
        InputMissing, InputError: it is missing, not a directory, or not a sealed model.
        StorageError: it cannot be opened.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            self._root = os.open(directory, _DIRECTORY)
        except FileNotFoundError as error:
            raise InputMissing(
                f"sealed model {directory} does not exist", hint="check the path"
            ) from error
        except NotADirectoryError as error:
            raise InputError(
                f"{directory} is not a directory",
                hint="a sealed model is the directory that holds cai.json",
            ) from error
        except OSError as error:
            raise from_os_error(error, f"open {directory}") from error
        self._objects = -1
        try:
            self._objects = self._open_objects()
        except BaseException:
            self.close()
            raise

    def open(self, stored: str) -> int:
        """Open a stored file, e.g. ``objects/<32 hex>``; the caller closes it.

        Raises:
            Tampered: it is missing, or not a regular file.
            StorageError: it cannot be opened.
        """
        folder, _, name = stored.rpartition("/")
        try:
            handle = os.open(name, _FILE, dir_fd=self._objects if folder else self._root)
        except FileNotFoundError:
            raise Tampered(f"{stored} is missing", path=stored) from None
        except OSError as error:
            if self._is_link(name, folder):
                raise Tampered(f"{stored} is not a regular file", path=stored) from error
            raise from_os_error(error, f"open {stored}") from error
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise Tampered(f"{stored} is not a regular file", path=stored)
        return handle

    def length(self, handle: int) -> int:
        """Stored bytes of an open file; ``OSError`` when it cannot be told."""
        return os.fstat(handle).st_size

    def preadv(self, handle: int, views: list[memoryview], offset: int) -> int:
        """Fill the views from ``offset``; fewer bytes at the end of the file; ``OSError``."""
        return os.preadv(handle, views, offset)

    def forget(self, handle: int, offset: int, length: int) -> None:
        """Tell the kernel that this part is not needed again."""
        os.posix_fadvise(handle, offset, length, os.POSIX_FADV_DONTNEED)

    def release(self, handle: int) -> None:
        """Close an open file."""
        os.close(handle)

    def read(self, stored: str, *, limit: int) -> bytes:
        """Read a small stored file whole.

        Raises:
            Tampered, StorageError: as ``open``.
            LimitExceeded: it is longer than ``limit`` bytes.
        """
        handle = self.open(stored)
        try:
            with os.fdopen(handle, "rb") as file:
                data = file.read(limit + 1)
        except OSError as error:
            raise from_os_error(error, f"read {stored}") from error
        if len(data) > limit:
            raise LimitExceeded(f"{stored}: more than {limit} bytes")
        return data

    def listing(self) -> set[str]:
        """Every path below OUT that a sealed model could have, ``objects`` itself left out.

        Raises:
            StorageError: a directory cannot be listed.
        """
        try:
            top = _names(self._root) - {OBJECTS_DIR}
            return top | {f"{OBJECTS_DIR}/{name}" for name in _names(self._objects)}
        except OSError as error:
            raise from_os_error(error, f"list {self.directory}") from error

    def close(self) -> None:
        """Close the directories."""
        for name in ("_root", "_objects"):
            handle = getattr(self, name)
            if handle >= 0:
                setattr(self, name, -1)
                os.close(handle)

    def _open_objects(self) -> int:
        try:
            names = _names(self._root)
        except OSError as error:
            raise from_os_error(error, f"list {self.directory}") from error
        if HEADER_FILE not in names:
            raise not_sealed(self.directory, names)
        try:
            return os.open(OBJECTS_DIR, _DIRECTORY | os.O_NOFOLLOW, dir_fd=self._root)
        except OSError as error:
            raise Tampered(
                f"{OBJECTS_DIR} is not a directory that can be opened", path=OBJECTS_DIR
            ) from error

    def _is_link(self, name: str, folder: str) -> bool:
        try:
            mode = os.lstat(name, dir_fd=self._objects if folder else self._root).st_mode
        except OSError:
            return False
        return not stat.S_ISREG(mode)


def not_sealed(directory: Path, names: set[str]) -> InputError:
    """The error for a directory without ``cai.json``, by what else lies in it."""
    if "gocryptfs.conf" in names or "gocryptfs.diriv" in names:
        return InputError(
            f"{directory} is a gocryptfs directory, which this version does not open",
            hint="seal the model with 'cai encrypt --method cai'",
        )
    return InputError(
        f"{directory} is not a sealed model: it holds no {HEADER_FILE}",
        hint="give the directory that 'cai encrypt' wrote",
    )


def _names(directory: int) -> set[str]:
    return set(os.listdir(directory))
