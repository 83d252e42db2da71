"""Opening the stored files of a sealed model: by directory descriptor, without following links."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from cai.errors import InputError, InputMissing, LimitExceeded, Tampered, from_os_error
from cai.model.layout import DATA_DIR, HEADER_FILE, MANIFEST_FILE, OBJECTS_DIR

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


class LocalHandles:
    """What is done with an open local file, however it was found; a handle is a descriptor."""

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


class StoredFiles(LocalHandles):
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
        self._folder = OBJECTS_DIR
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
        try:
            with self._above(stored) as (above, name):
                handle = os.open(name, _FILE, dir_fd=above)
        except FileNotFoundError:
            raise Tampered(f"{stored} is missing", path=stored) from None
        except OSError as error:
            if self._is_no_file(stored):
                raise Tampered(f"{stored} is not a regular file", path=stored) from error
            raise from_os_error(error, f"open {stored}") from error
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise Tampered(f"{stored} is not a regular file", path=stored)
        return handle

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

        Of a cipher directory, everything below it; directories have a slash behind their path.

        Raises:
            StorageError: a directory cannot be listed.
        """
        try:
            top = _names(self._root) - {self._folder}
            if self._folder == OBJECTS_DIR:
                return top | {f"{OBJECTS_DIR}/{name}" for name in _names(self._objects)}
            return top | set(_walk(self._objects, self._folder))
        except OSError as error:
            raise from_os_error(error, f"list {self.directory}") from error

    def readlink(self, stored: str) -> str:
        """Text of a stored symbolic link, as a cipher directory has them.

        Raises:
            Tampered: there is no such link.
        """
        try:
            with self._above(stored) as (above, name):
                return os.readlink(name, dir_fd=above)
        except OSError as error:
            raise Tampered(f"{stored} is no symbolic link", path=stored) from error

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
        if OBJECTS_DIR not in names and DATA_DIR in names:
            self._folder = DATA_DIR
        try:
            return os.open(self._folder, _DIRECTORY | os.O_NOFOLLOW, dir_fd=self._root)
        except OSError as error:
            raise Tampered(
                f"{self._folder} is not a directory that can be opened", path=self._folder
            ) from error

    @contextmanager
    def _above(self, stored: str) -> Iterator[tuple[int, str]]:
        """The descriptor of the directory that holds a stored file, and the file's name in it.

        Every step is made without following a link.
        """
        folder, *rest = stored.split("/")
        if not rest:
            yield self._root, folder
            return
        if folder != self._folder:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), stored)
        handle = self._objects
        try:
            for part in rest[:-1]:
                below = os.open(part, _DIRECTORY | os.O_NOFOLLOW, dir_fd=handle)
                if handle != self._objects:
                    os.close(handle)
                handle = below
            yield handle, rest[-1]
        finally:
            if handle != self._objects:
                os.close(handle)

    def _is_no_file(self, stored: str) -> bool:
        try:
            with self._above(stored) as (above, name):
                mode = os.lstat(name, dir_fd=above).st_mode
        except OSError as error:
            return error.errno in (errno.ENOTDIR, errno.ELOOP)
        return not stat.S_ISREG(mode)


def not_sealed(directory: Path, names: set[str]) -> InputError:
    """The error for a directory without ``cai.json``, by what else lies in it."""
    if "gocryptfs.conf" in names or "gocryptfs.diriv" in names:
        return InputError(
            f"{directory} is a gocryptfs directory without a manifest: it holds no {HEADER_FILE}",
            hint="open it with cai check, decrypt or mount, or seal the model with cai encrypt",
        )
    if DATA_DIR in names and MANIFEST_FILE in names:
        return InputError(
            f"{directory} is not a whole sealed model: {HEADER_FILE} is missing",
            hint="fetch it again; its 'data' alone would be a gocryptfs directory without manifest",
        )
    return InputError(
        f"{directory} is not a sealed model: it holds no {HEADER_FILE}",
        hint="give the directory that 'cai encrypt' wrote",
    )


def _names(directory: int) -> set[str]:
    return set(os.listdir(directory))


def _walk(directory: int, above: str) -> Iterator[str]:
    """Every path below a directory; without recursion, for whoever stores it decides its depth."""
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        handle = _step_down(directory, folder)
        try:
            for name in _names(handle):
                path = f"{folder}{name}"
                if stat.S_ISDIR(os.lstat(name, dir_fd=handle).st_mode):
                    path += "/"
                    waiting.append(path)
                yield f"{above}/{path}"
        finally:
            os.close(handle)


def _step_down(directory: int, folder: str) -> int:
    """A descriptor of ``folder``, which ends with a slash or is empty, below a directory."""
    handle = os.dup(directory)
    for part in folder.split("/")[:-1]:
        try:
            below = os.open(part, _DIRECTORY | os.O_NOFOLLOW, dir_fd=handle)
        finally:
            os.close(handle)
        handle = below
    return handle
