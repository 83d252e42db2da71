"""A plain tree on disk as the entries to seal; what a sealed model cannot hold is refused here."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from cai.errors import (
    FormatError,
    InputError,
    InputMissing,
    LimitExceeded,
    from_os_error,
)
from cai.model.layout import MAX_ENTRIES
from cai.model.paths import check_links, name_bytes, path_fault, target_fault
from cai.model.tree import Entry, EntryType

_FILE = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_READ = 1024 * 1024


def scan(directory: Path, *, any_bytes: bool = False) -> list[Entry]:
    """Every path below a directory, sorted by its bytes; files without their digests.

    Args:
        directory: the tree's root.
        any_bytes: names need not be UTF-8; those that are not hold surrogate escapes.

    Raises:
        InputMissing: the directory does not exist.
        InputError: it is not a directory, or holds what cannot be sealed: a name that is not
            UTF-8, a special file, a symbolic link that leaves it.
        LimitExceeded: more than ``MAX_ENTRIES`` entries.
        StorageError: it cannot be read.
    """
    require_directory(directory)
    entries: list[Entry] = []
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(directory / folder) as items:
                found = [_entry(folder, item, any_bytes=any_bytes) for item in items]
        except OSError as error:
            raise from_os_error(error, f"read {_shown(directory / folder)}") from error
        waiting.extend(entry.path for entry in found if entry.type is EntryType.DIRECTORY)
        entries.extend(found)
        if len(entries) > MAX_ENTRIES:
            raise LimitExceeded(f"{directory} holds more than {MAX_ENTRIES} files and folders")
    try:
        links = {e.path: e.target for e in entries if e.type is EntryType.SYMLINK}
        check_links(links, any_bytes=any_bytes)
    except FormatError as error:
        raise InputError(
            f"{directory}: {error.message}",
            hint="a sealed model holds only links inside itself; copy with 'cp -rL'",
        ) from error
    return sorted(entries, key=lambda entry: name_bytes(entry.path))


class SourceFile:
    """An open file of the tree, read at any offset; safe to use from several threads.

    Args:
        directory: the tree's root.
        entry: the file, as ``scan`` saw it.

    Raises:
        InputError, StorageError: it is not that file any more, or cannot be opened.
    """

    def __init__(self, directory: Path, entry: Entry) -> None:
        self.entry = entry
        self._path = directory / entry.path
        try:
            self._fd = os.open(self._path, _FILE)
        except OSError as error:
            raise from_os_error(error, f"read {self._path}") from error
        self._seen = self._state()
        if not stat.S_ISREG(self._seen[0]) or self._seen[1] != entry.size:
            self.close()
            raise self._changed()

    @property
    def state(self) -> tuple[str, ...]:
        """Device, inode, size and times: what tells whether it changed between two runs."""
        return tuple(str(number) for number in self._seen)

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode: the same file, however it is opened."""
        return self._seen[3], self._seen[2]

    def readinto(self, offset: int, view: memoryview) -> None:
        """Fill the whole view from ``offset``.

        Raises:
            InputError: the file became shorter.
            StorageError: it cannot be read.
        """
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._fd, [view[done:]], offset + done)
            except OSError as error:
                raise from_os_error(error, f"read {self._path}") from error
            if not count:
                raise self._changed()
            done += count

    def finish(self) -> None:
        """Check that nobody changed the file meanwhile.

        Raises:
            InputError: its size, inode or times are others than when it was opened.
        """
        if self._state() != self._seen:
            raise self._changed()

    def forget(self, offset: int, length: int) -> None:
        """Tell the kernel that this part is not needed again."""
        os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close the file."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _state(self) -> tuple[int, int, int, int, int, int]:
        found = os.fstat(self._fd)
        return (
            found.st_mode, found.st_size, found.st_ino, found.st_dev,
            found.st_mtime_ns, found.st_ctime_ns,
        )

    def _changed(self) -> InputError:
        return InputError(
            f"{self._path} changed while it was read", hint="stop what writes it and try again"
        )


@contextmanager
def opened_source(directory: Path, entry: Entry) -> Iterator[SourceFile]:
    """A file of the tree for the length of a block that must read it to its end.

    Raises:
        InputError, StorageError: as ``SourceFile``; also at the end, when it changed meanwhile.
    """
    file = SourceFile(directory, entry)
    try:
        yield file
        file.finish()
    finally:
        file.close()


def hashed_entries(directory: Path) -> list[Entry]:
    """The entries of a plain tree with the SHA-256 of each file.

    Raises:
        InputError, StorageError: as ``scan`` and ``SourceFile``.
    """
    return [
        replace(entry, sha256=_digest(directory, entry)) if entry.type is EntryType.FILE else entry
        for entry in scan(directory)
    ]


def _digest(directory: Path, entry: Entry) -> str:
    digest = sha256()
    buffer = memoryview(bytearray(min(_READ, entry.size)))
    with opened_source(directory, entry) as file:
        for offset in range(0, entry.size, _READ):
            part = buffer[: min(_READ, entry.size - offset)]
            file.readinto(offset, part)
            digest.update(part)
    return digest.hexdigest()


def require_directory(directory: Path) -> None:
    """Refuse what cannot be a model's directory.

    Raises:
        InputMissing: it does not exist.
        InputError: it is not a directory.
        StorageError: it cannot be looked at.
    """
    try:
        mode = directory.stat().st_mode
    except FileNotFoundError as error:
        raise InputMissing(f"{directory} does not exist", hint="check the path") from error
    except OSError as error:
        raise from_os_error(error, f"read {directory}") from error
    if not stat.S_ISDIR(mode):
        raise InputError(
            f"{directory} is not a directory", hint="give the directory that holds the model"
        )


def _entry(folder: str, item: os.DirEntry[str], *, any_bytes: bool) -> Entry:
    path = f"{folder}/{item.name}" if folder else item.name
    fault = path_fault(path, any_bytes=any_bytes)
    if fault:
        raise InputError(f"{_shown(Path(item.path))}: its name is {fault}", hint="rename it")
    found = item.stat(follow_symlinks=False)
    mode = stat.S_IMODE(found.st_mode) & 0o777
    if stat.S_ISDIR(found.st_mode):
        return Entry(path, EntryType.DIRECTORY, 0, mode)
    if stat.S_ISREG(found.st_mode):
        return Entry(path, EntryType.FILE, found.st_size, mode)
    if stat.S_ISLNK(found.st_mode):
        target = os.readlink(item.path)  # noqa: PTH115 - pathlib would normalise the target
        fault = target_fault(target, any_bytes=any_bytes)
        if fault:
            raise InputError(
                f"symbolic link {item.path}: {fault}",
                hint="a sealed model holds only links inside itself; copy with 'cp -rL'",
            )
        return Entry(path, EntryType.SYMLINK, len(name_bytes(target)), 0o777, target)
    raise InputError(
        f"{item.path} is a device, socket or pipe", hint="a model holds files, folders and links"
    )


def _shown(path: Path) -> str:
    """A path for messages, also when it is not valid UTF-8."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
