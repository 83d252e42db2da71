"""``pull``: a sealed model out of a store, without its key (docs/stores.md).

Everything is made in ``OUT.partial-pull`` beside OUT and appears by one rename, or by one exchange
where OUT holds an older revision. Whatever of it is already on this disk (in OUT, or left by a pull
that was killed) is compared with the index piece by piece and not fetched again; nothing else is
remembered. No byte is written that does not have the digest that the index demands.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from cai import jcs
from cai.errors import CaiError, NoSpace, UsageError
from cai.model.index import StoredFile
from cai.model.layout import HEADER_FILE, INDEX_FILE, MAX_HEADER_FILE, PIECE
from cai.model.progress import ProgressBar, silent
from cai.model.stage import output_error, remove_tree, sync_directory, write_all
from cai.store.base import PART, Store
from cai.store.flow import Flow
from cai.store.publication import (
    Publication,
    read_pieces,
    read_publication,
    wrong_pieces,
)
from cai.store.throttle import Throttle
from cai.terminal import Advance

SUFFIX = ".partial-pull"
"""What is added to OUT for the directory that an unfinished pull fills."""

_EXCHANGE = 2
"""``RENAME_EXCHANGE`` of renameat2(2)."""


@dataclass(frozen=True, slots=True)
class PullReport:
    """What a pull did.

    Attributes:
        uri: where the model came from.
        out: where it is.
        model_id: hex; a claim until the model is opened with its key.
        revision: likewise.
        index_sha256: of the index that everything was compared with, hex.
        authenticated: that index was demanded by the caller; else the pull is complete, but what
            it is complete in regard to came from the store itself.
        files: listed files.
        total_bytes: of the listed files.
        fetched_bytes: that travelled now.
    """

    uri: str
    out: str
    model_id: str
    revision: int
    index_sha256: str
    authenticated: bool
    files: int
    total_bytes: int
    fetched_bytes: int

    def to_json(self) -> dict[str, object]:
        """The report as ``--json`` prints it."""
        return asdict(self)


def pull(
    store: Store, out: Path, *, index_sha256: str | None = None, workers: int = 0, rate: int = 0,
    progress: ProgressBar = silent,
) -> PullReport:
    """Fetch a sealed model.

    Args:
        store: where it is.
        out: where it shall be: nothing, an empty directory, or another revision of this model.
        index_sha256: the index to insist on (from the release record), hex.
        workers: transfers at once; 0 for the usual number.
        rate: bytes a second for all of them together; 0 for no limit.
        progress: shows the bytes done.

    Raises:
        Tampered: what the store holds is not what the index lists, or not the demanded index.
        InputError, FormatError: the store holds no sealed model.
        UsageError: OUT holds something else, or another pull is running.
        PeerError, StorageError, NoSpace: the store or the disk fails; the next pull continues.
    """
    publication = read_publication(store, index_sha256)
    place = out.parent.resolve() / out.name
    _refuse_other(place, publication)
    throttle = Throttle(rate)
    with _Partial(place) as partial, Flow(workers, throttle.stop) as flow:
        with progress("pull", publication.total) as advance:
            run = _Pull(store, publication, place, partial.path, throttle, advance)
            run.prepare(flow)
            run.fetch(flow)
        if run.is_complete():
            partial.discard()
        else:
            run.write_documents()
            flow.all(publication.files, run.sync)
            partial.commit()
    return PullReport(
        store.uri, str(out), publication.model_id, publication.revision, publication.index_sha256,
        publication.authenticated, len(publication.files), publication.total, run.fetched,
    )


class _Pull:
    def __init__(
        self, store: Store, publication: Publication, out: Path, partial: Path, throttle: Throttle,
        advance: Advance,
    ) -> None:
        self._store, self._of, self._out, self._partial = store, publication, out, partial
        self._throttle, self._advance = throttle, advance
        self._missing: dict[str, list[int]] = {}
        self._from_out: set[str] = set()
        self.fetched = 0

    def prepare(self, flow: Flow) -> None:
        """Find out which pieces are here, in the partial directory or in OUT."""
        try:
            self._remove_strangers()
            for folder in self._of.folders:
                (self._partial / folder).mkdir(parents=True, exist_ok=True)
            for path, text in self._of.links.items():
                (self._partial / path).symlink_to(text)
        except OSError as error:
            raise output_error(error, f"write {self._partial}") from error
        for path, missing in flow.each(self._of.files, self._adopt):
            self._missing[path] = missing
            listed = self._of.files[path]
            self._advance(listed.size - sum(_length(listed, number) for number in missing))
        wanted = sum(
            _length(self._of.files[path], number)
            for path, missing in self._missing.items() for number in missing
        )
        room = os.statvfs(self._partial)
        if wanted > room.f_bavail * room.f_frsize:
            raise NoSpace(
                f"{wanted} bytes are still to be fetched, {self._partial.parent} has no room "
                "for them", hint="free some space or choose another place",
            )

    def fetch(self, flow: Flow) -> None:
        """Fetch what is missing."""
        flow.all(self._runs(), self._fetch_run)

    def is_complete(self) -> bool:
        """Whether OUT holds exactly this revision already."""
        documents = {HEADER_FILE: self._of.header, INDEX_FILE: self._of.index}
        documents |= self._of.signatures
        if self._from_out != set(self._of.files):
            return False
        try:
            same = all(
                (self._out / path).read_bytes() == data for path, data in documents.items()
            )
            whole = {*documents, *self._of.files, *self._of.links}
            links = all(
                str((self._out / path).readlink()) == text for path, text in self._of.links.items()
            )
            return same and links and _files_below(self._out) == whole
        except OSError:
            return False

    def write_documents(self) -> None:
        """Write signatures, index and header."""
        documents = {**self._of.signatures, INDEX_FILE: self._of.index}
        for path, data in (documents | {HEADER_FILE: self._of.header}).items():
            try:
                handle = _open(self._partial / path, os.O_CREAT | os.O_EXCL)
                try:
                    write_all(handle, [memoryview(data)], 0)
                    os.fsync(handle)
                finally:
                    os.close(handle)
            except OSError as error:
                raise output_error(error, f"write {path}") from error

    def sync(self, path: str) -> None:
        """Make a file durable."""
        try:
            handle = _open(self._partial / path, 0)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            raise output_error(error, f"write {path}") from error

    def _remove_strangers(self) -> None:
        """Remove from the partial directory what no file of this revision can continue."""
        for folder, names, files in os.walk(self._partial, topdown=False):
            base = Path(folder)
            for name in [*names, *files]:
                path = base / name
                relative = path.relative_to(self._partial).as_posix()
                mode = path.lstat().st_mode
                if stat.S_ISDIR(mode):
                    if not any(path.iterdir()):
                        path.rmdir()
                elif relative not in self._of.files or not stat.S_ISREG(mode):
                    path.unlink()

    def _adopt(self, path: str) -> list[int]:
        """Bring what is here of a file into the partial directory; returns the missing pieces."""
        listed = self._of.files[path]
        target, old = self._partial / path, self._out / path
        try:
            missing = _missing_pieces(target, listed)
            if not missing and _size(target) == listed.size:
                if _same_file(target, old):
                    self._from_out.add(path)
                return []
            old_missing = _missing_pieces(old, listed)
            if not old_missing and _size(old) == listed.size:
                target.unlink(missing_ok=True)
                if _linked(old, target):
                    self._from_out.add(path)
                else:
                    shutil.copyfile(old, target)
                return []
            if len(old_missing) < len(missing):
                target.unlink(missing_ok=True)
                shutil.copyfile(old, target)
                missing = old_missing
            elif _size(target) >= 0 and target.stat().st_nlink > 1:
                _unshare(target)  # never repair a file that OUT shares
            handle = _open(target, os.O_CREAT)
            try:
                if os.fstat(handle).st_size != listed.size:
                    os.ftruncate(handle, listed.size)
            finally:
                os.close(handle)
        except OSError as error:
            raise output_error(error, f"write {target}") from error
        return missing

    def _runs(self) -> Iterator[tuple[str, int, int]]:
        """Missing pieces as (path, first, count), neighbours together."""
        for path, missing in self._missing.items():
            first = count = 0
            for number in missing:
                if count and number == first + count and count < PART // PIECE:
                    count += 1
                    continue
                if count:
                    yield path, first, count
                first, count = number, 1
            if count:
                yield path, first, count

    def _fetch_run(self, run: tuple[str, int, int]) -> None:
        path, first, count = run
        data = read_pieces(
            self._store, path, self._of.files[path], first, count, self._throttle
        )
        try:
            handle = _open(self._partial / path, 0)
            try:
                write_all(handle, [memoryview(data)], first * PIECE)
            finally:
                os.close(handle)
        except OSError as error:
            raise output_error(error, f"write {path}") from error
        self.fetched += len(data)
        self._advance(len(data))


class _Partial:
    """The directory that a pull fills; locked, so that two pulls never fill it together."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self.path = out.with_name(out.name + SUFFIX)
        self._lock = -1

    def __enter__(self) -> _Partial:
        try:
            self.path.mkdir(mode=0o700, exist_ok=True)
            self._lock = os.open(
                self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            )
            self.path.chmod(0o700)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._release()
            raise UsageError(
                f"another pull is filling {self.path}", hint="wait until it has ended"
            ) from error
        except OSError as error:
            self._release()
            raise output_error(error, f"create {self.path}") from error
        return self

    def __exit__(self, *_exception: object) -> None:
        # What an error or a signal leaves here, the next pull continues.
        self._release()

    def commit(self) -> None:
        """Let it appear as OUT."""
        try:
            for folder, _, _ in os.walk(self.path, topdown=False):
                sync_directory(Path(folder))
            self.path.chmod(0o755)
            if self._out.exists() and any(self._out.iterdir()):
                _exchange(self.path, self._out)
                remove_tree(self.path)
            else:
                self.path.rename(self._out)
            sync_directory(self._out.parent)
        except OSError as error:
            raise output_error(error, f"create {self._out}") from error

    def discard(self) -> None:
        """Remove it; OUT is as it should be."""
        remove_tree(self.path)

    def _release(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _refuse_other(out: Path, publication: Publication) -> None:
    """Refuse to replace what is not a revision of the same model."""
    try:
        if not stat.S_ISDIR(out.lstat().st_mode):
            raise UsageError(f"{out} is not a directory", hint="choose another output")
        names = {path.name for path in out.iterdir()}
    except FileNotFoundError:
        return
    except OSError as error:
        raise output_error(error, f"look at {out}") from error
    if not names:
        return
    try:
        header = _read_limited(out / HEADER_FILE)
        found = jcs.parse(header, what=HEADER_FILE, limit=MAX_HEADER_FILE)
        same = found.get("model_id") == publication.model_id
    except (CaiError, OSError, AttributeError):
        same = False
    if not same:
        raise UsageError(
            f"{out} exists already and holds something else than this model",
            hint="choose another output, or remove it first",
        )


def _read_limited(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_HEADER_FILE + 1)


def _missing_pieces(path: Path, listed: StoredFile) -> list[int]:
    """Numbers of the pieces of a file that are not the listed ones; holes are not even read."""
    missing: list[int] = []
    if _size(path) < 0:
        return list(range(len(listed.pieces)))
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        for number in range(len(listed.pieces)):
            start, length = number * PIECE, _length(listed, number)
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


def _length(listed: StoredFile, number: int) -> int:
    return min(PIECE, listed.size - number * PIECE)


def _unshare(path: Path) -> None:
    """Replace a hard link by a file of its own with the same bytes."""
    copy = path.with_name(path.name + ".copy")
    shutil.copyfile(path, copy)
    copy.rename(path)


def _linked(path: Path, new: Path) -> bool:
    """Whether a hard link could be made; some file systems have none."""
    try:
        os.link(path, new)
    except OSError:
        return False
    return True


def _size(path: Path) -> int:
    """Bytes of a regular file; -1 where there is none."""
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return -1
    return found.st_size if stat.S_ISREG(found.st_mode) else -1


def _same_file(path: Path, other: Path) -> bool:
    return _size(other) >= 0 and path.samefile(other)


def _files_below(root: Path) -> set[str]:
    """Everything below but directories."""
    return {
        path.relative_to(root).as_posix()
        for path in root.rglob("*") if path.is_symlink() or not path.is_dir()
    }


def _open(path: Path, flags: int) -> int:
    return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o644)


def _exchange(path: Path, other: Path) -> None:
    """Exchange two directories at once; where the file system cannot, by two renames."""
    libc = ctypes.CDLL(None, use_errno=True)
    at = -100  # AT_FDCWD
    if libc.renameat2(at, os.fsencode(path), at, os.fsencode(other), _EXCHANGE) == 0:
        return
    number = ctypes.get_errno()
    if number not in (errno.EINVAL, errno.ENOSYS):
        raise OSError(number, os.strerror(number))
    aside = other.with_name(other.name + ".partial-old")
    remove_tree(aside)
    other.rename(aside)
    path.rename(other)
    aside.rename(path)
