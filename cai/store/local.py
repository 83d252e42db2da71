"""``file:``: a directory of this machine, or one that the network makes look like it.

An upload is a hidden file ``.<name>.<label>.uploading`` beside its place, sparse at first, renamed
when it is whole; what a killed run left there is found by that name and continued.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from cai.errors import InputError, InputMissing, LimitExceeded, from_os_error
from cai.model.stage import output_error, sync_directory, write_all
from cai.store.base import (
    MAX_LISTED,
    Blob,
    FoundPart,
    Listed,
    Pace,
    Stat,
    Upload,
    check_path,
    part_size,
    unpaced,
)
from cai.store.retry import NO_UPLOAD

_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_PENDING = re.compile(r"\.(.+)\.([0-9a-f]{16})\.uploading", re.DOTALL)


class LocalStore:
    """A ``Store`` in a directory.

    Args:
        root: the directory; it may be missing until something is written.
    """

    writable = True

    def __init__(self, root: Path) -> None:
        self.root = root
        self.uri = f"file:{root}"

    def stat(self, path: str) -> Stat | None:
        """Size of a regular file; the store keeps no labels."""
        try:
            found = self._place(path).lstat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise from_os_error(error, f"look at {path}") from error
        if not stat.S_ISREG(found.st_mode):
            raise InputError(f"{self.uri}/{path} is not a regular file")
        return Stat(found.st_size, None)

    def names(self, *, recursive: bool) -> Iterator[Listed]:
        """Regular files, and without ``recursive`` the folders of the first level."""
        try:
            yield from _limited(self._walk(self.root, "", recursive=recursive), self.uri)
        except FileNotFoundError as error:
            raise InputMissing(f"{self.uri} does not exist", hint="check the path") from error
        except OSError as error:
            raise from_os_error(error, f"list {self.uri}") from error

    def read(self, path: str, offset: int, length: int, pace: Pace = unpaced) -> Blob:
        """Read a range of a regular file; a symbolic link is none."""
        try:
            handle = os.open(self._place(path), _READ)
            try:
                found = os.fstat(handle)
                if not stat.S_ISREG(found.st_mode):
                    raise InputError(f"{self.uri}/{path} is not a regular file")
                wanted = max(0, min(length, found.st_size - offset))
                view, done = memoryview(bytearray(wanted)), 0
                while done < wanted:
                    count = os.preadv(handle, [view[done:]], offset + done)
                    if not count:
                        break
                    done += count
            finally:
                os.close(handle)
        except FileNotFoundError as error:
            raise InputMissing(f"{self.uri}/{path} does not exist") from error
        except OSError as error:
            raise from_os_error(error, f"read {path}") from error
        pace(done)
        return Blob(bytes(view[:done]), found.st_size)

    def put(self, path: str, data: bytes, label: str, pace: Pace = unpaced) -> None:
        """Write beside the place, make it durable, rename."""
        upload = _LocalUpload(self._place(path), label)
        upload.start(len(data))
        upload.write(0, data, pace)
        upload.complete(1)

    def begin(self, path: str, size: int, label: str) -> Upload:
        """Start a hidden file; one that is there is started anew."""
        upload = _LocalUpload(self._place(path), label)
        upload.start(size)
        return upload

    def pending(self) -> Mapping[str, list[Upload]]:
        """Hidden files that killed runs have left."""
        found: dict[str, list[Upload]] = {}
        try:
            for folder, _, names in os.walk(self.root):
                for name in names:
                    match = _PENDING.fullmatch(name)
                    if match:
                        place = Path(folder) / match[1]
                        path = place.relative_to(self.root).as_posix()
                        found.setdefault(path, []).append(_LocalUpload(place, match[2]))
        except OSError as error:
            raise from_os_error(error, f"list {self.uri}") from error
        return found

    def furnish(self, folders: Iterable[str], links: Mapping[str, str]) -> None:
        """Make folders and symbolic links."""
        try:
            for path in folders:
                self._place(path).mkdir(parents=True, exist_ok=True)
            for path, text in links.items():
                place = self._place(path)
                place.parent.mkdir(parents=True, exist_ok=True)
                if not place.is_symlink() or str(place.readlink()) != text:
                    place.unlink(missing_ok=True)
                    place.symlink_to(text)
        except OSError as error:
            raise output_error(error, f"write {self.root}") from error

    def link_text(self, path: str) -> str | None:
        """Text of a symbolic link; ``None`` where there is none."""
        try:
            return str(self._place(path).readlink())
        except OSError:
            return None

    def remove(self, path: str) -> None:
        """Unlink a file."""
        try:
            self._place(path).unlink(missing_ok=True)
        except OSError as error:
            raise output_error(error, f"remove {path}") from error

    def close(self) -> None:
        """Nothing is held open."""

    def _place(self, path: str) -> Path:
        return self.root / check_path(path)

    def _walk(self, folder: Path, prefix: str, *, recursive: bool) -> Iterator[Listed]:
        with os.scandir(folder) as scanned:
            entries = sorted(scanned, key=lambda entry: entry.name)
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                if recursive:
                    yield from self._walk(
                        Path(entry.path), f"{prefix}{entry.name}/", recursive=True
                    )
                else:
                    yield Listed(f"{prefix}{entry.name}/", None)
            elif entry.is_file(follow_symlinks=False) and not _PENDING.fullmatch(entry.name):
                yield Listed(prefix + entry.name, entry.stat(follow_symlinks=False).st_size)


class _LocalUpload:
    def __init__(self, place: Path, label: str) -> None:
        self._place = place
        self._path = place.with_name(f".{place.name}.{label[:16]}.uploading")
        self._part = 0

    def start(self, size: int) -> None:
        self._part = part_size(size)
        handle = self._open(os.O_CREAT | os.O_TRUNC)
        try:
            os.ftruncate(handle, size)
        except OSError as error:
            raise output_error(error, f"write {self._place}") from error
        finally:
            os.close(handle)

    def found(self, size: int, part: int) -> Mapping[int, FoundPart]:
        parts: dict[int, FoundPart] = {}
        handle = self._open(0)
        try:
            if os.fstat(handle).st_size != size:
                os.ftruncate(handle, size)
            for number in range(1, -(-size // part) + 1):
                start = (number - 1) * part
                length = min(part, size - start)
                if _has_data(handle, start, length):
                    parts[number] = FoundPart(length, _md5(handle, start, length))
        except OSError as error:
            raise from_os_error(error, f"read {self._path}") from error
        finally:
            os.close(handle)
        self._part = part
        return parts

    def send(self, number: int, data: bytes, md5: bytes, pace: Pace) -> None:
        del md5  # nothing on the way could change it
        self.write((number - 1) * self._part, data, pace)

    def write(self, offset: int, data: bytes, pace: Pace) -> None:
        handle = self._open(0)
        try:
            pace(len(data))
            write_all(handle, [memoryview(data)], offset)
        except OSError as error:
            raise output_error(error, f"write {self._place}") from error
        finally:
            os.close(handle)

    def complete(self, count: int) -> None:
        del count
        try:
            handle = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
            self._path.rename(self._place)
            sync_directory(self._place.parent)
        except FileNotFoundError as error:
            raise InputMissing(f"{self._path} has gone", code=NO_UPLOAD) from error
        except OSError as error:
            raise output_error(error, f"write {self._place}") from error

    def abort(self) -> None:
        try:
            self._path.unlink(missing_ok=True)
        except OSError as error:
            raise output_error(error, f"remove {self._path}") from error

    def _open(self, flags: int) -> int:
        try:
            if flags & os.O_CREAT:
                self._place.parent.mkdir(parents=True, exist_ok=True)
            return os.open(
                self._path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o644
            )
        except OSError as error:
            raise output_error(error, f"write {self._place}") from error


def _has_data(handle: int, start: int, length: int) -> bool:
    """Whether anything of the range was ever written."""
    try:
        return os.lseek(handle, start, os.SEEK_DATA) < start + length
    except OSError:
        return False  # no data up to the end


def _md5(handle: int, start: int, length: int) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    end = start + length
    while start < end:
        data = os.pread(handle, min(1 << 20, end - start), start)
        if not data:
            break
        digest.update(data)
        start += len(data)
    return digest.hexdigest()


def _limited(names: Iterator[Listed], where: str) -> Iterator[Listed]:
    for number, name in enumerate(names):
        if number >= MAX_LISTED:
            raise LimitExceeded(f"{where} holds more than {MAX_LISTED} names")
        yield name
