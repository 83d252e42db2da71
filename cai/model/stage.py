"""Output that appears whole or not at all: built beside its place, then renamed (spec-format §9).

Everything is made in ``OUT.partial-<random>``, mode 0700, which its maker holds locked. Any
failure, Ctrl-C or SIGTERM removes it; a crash or a power cut leaves a name that no reader takes for
a model, and that the next run for the same output takes up or clears away: the lock of a dead
process is free.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from cai.errors import CaiError, InputError, InputMissing, StorageError, UsageError, from_os_error


class Stage:
    """A directory in the making, to be used as a context manager.

    Args:
        out: where it shall appear; missing, or an empty directory.
        mode: its permission bits in the end.
        adopt: asked for each directory that a dead run for the same output left behind, whether it
            can be gone on with; without it, and when it says no, that directory is removed.

    Attributes:
        path: where to write meanwhile.
        adopted: it is what a dead run left.

    Raises:
        UsageError: ``out`` is there already and is not an empty directory.
        StorageError, NoSpace: the place cannot be written.
    """

    def __init__(
        self, out: Path, *, mode: int = 0o755, adopt: Callable[[Path], bool] | None = None
    ) -> None:
        # Not resolved: a last part that is a symbolic link must be seen as one.
        self.out = out.parent.resolve() / out.name
        self._shown = out
        self._mode = mode
        self._committed = False
        refuse_occupied(self.out)
        self.adopted = False
        try:
            found = _take_up(self.out, adopt)
            self.adopted = found is not None
            self.path, self._lock = found or locked_directory(self.out)
        except OSError as error:
            raise output_error(error, f"create {out}") from error

    def commit(
        self, *, folders_synced: bool = False, last: Callable[[], None] | None = None
    ) -> None:
        """Make every folder durable and let it all appear at its place.

        Args:
            folders_synced: the caller has synced all folders below, and perhaps closed them.
            last: called when nothing but the renaming is left to do; may raise ``OSError``.

        Raises:
            StorageError, NoSpace, UsageError: it could not; nothing has appeared.
        """
        try:
            if not folders_synced:
                for directory, _, _ in os.walk(self.path, topdown=False):
                    sync_directory(Path(directory))
            sync_directory(self.path)
            self.path.chmod(self._mode)
            refuse_occupied(self.out)
            if last is not None:
                last()
            self.path.rename(self.out)
        except OSError as error:
            raise output_error(error, f"create {self._shown}") from error
        self._committed = True
        try:
            sync_directory(self.out.parent)
        except OSError as error:
            raise output_error(error, f"write {self._shown}") from error

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_exception: object) -> None:
        if not self._committed:
            remove_tree(self.path)
        os.close(self._lock)


def locked_directory(out: Path) -> tuple[Path, int]:
    """A new directory ``OUT.partial-<random>`` and the descriptor that holds it locked.

    Raises:
        OSError: it cannot be made.
    """
    while True:
        path = Path(tempfile.mkdtemp(prefix=f"{out.name}.partial-", dir=out.parent))
        handle = _locked(path)
        if handle is not None:
            return path, handle
        # Somebody who clears away took it for a dead run's, between the two calls.


def leftovers(out: Path) -> Iterator[tuple[Path, int]]:
    """What dead runs for this output left: each directory, locked; the caller closes it.

    A folder that cannot be listed may still be written to: nothing is found in it.
    """
    pattern = re.compile(re.escape(out.name) + r"\.partial-[a-z0-9_]{8}")
    try:
        paths = sorted(out.parent.iterdir())
    except OSError:
        return
    for path in paths:
        if pattern.fullmatch(path.name):
            with suppress(OSError):
                handle = _locked(path)
                if handle is not None:
                    yield path, handle


def _locked(path: Path) -> int | None:
    """A descriptor that locks the directory; ``None`` when another process does, or it is gone."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        with suppress(FileNotFoundError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held, there = os.fstat(handle), path.lstat()
            if held.st_uid == os.geteuid() and os.path.samestat(held, there):
                return handle
    except BlockingIOError:
        pass
    except BaseException:
        os.close(handle)
        raise
    os.close(handle)
    return None


def _take_up(out: Path, adopt: Callable[[Path], bool] | None) -> tuple[Path, int] | None:
    """The first leftover that can be gone on with; removes all others."""
    taken: tuple[Path, int] | None = None
    for path, handle in leftovers(out):
        if taken is None and adopt is not None and adopt(path):
            taken = path, handle
        else:
            remove_tree(path)
            os.close(handle)
    return taken


def refuse_occupied(out: Path) -> None:
    """Refuse an output that is there already, unless it is an empty directory.

    Raises:
        UsageError: it is there.
        StorageError: that cannot be told.
    """
    try:
        free = stat.S_ISDIR(out.lstat().st_mode) and not any(out.iterdir())
    except FileNotFoundError:
        return
    except OSError as error:
        raise output_error(error, f"create {out}") from error
    if not free:
        raise UsageError(
            f"{out} exists already and is not an empty directory",
            hint="choose another output, or remove it first",
        )


def output_error(error: OSError, doing: str) -> CaiError:
    """An ``OSError`` on an output: always of the storage family, whatever its number."""
    translated = from_os_error(error, doing)
    if isinstance(translated, InputMissing):
        return StorageError(translated.message, hint="create the folder it shall stand in first")
    if isinstance(translated, InputError):
        return StorageError(translated.message, hint="check that its folder is a directory")
    return translated


def new_file(path: Path, *, mode: int = 0o644) -> int:
    """Create a file that must not exist yet; the caller closes the descriptor.

    Raises:
        OSError: it cannot be created.
    """
    return os.open(
        path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode
    )


def write_file(path: Path, data: bytes) -> None:
    """Write a whole small file, durably.

    Raises:
        StorageError, NoSpace: it cannot be written.
    """
    try:
        with os.fdopen(new_file(path), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise output_error(error, f"write {path.name}") from error


def write_all(fd: int, views: list[memoryview], offset: int) -> None:
    """Write every byte of the views at ``offset``, however often the system stops short.

    Raises:
        OSError: it cannot be written.
    """
    rest = views
    while rest:
        done = os.pwritev(fd, rest, offset)
        offset += done
        while rest and done >= len(rest[0]):
            done -= len(rest[0])
            rest = rest[1:]
        if rest:
            rest = [rest[0][done:], *rest[1:]]


def remove_tree(path: Path) -> None:
    """Remove what was half-made, directories without write permission too; best effort."""
    for directory, _, _ in os.walk(path):
        try:
            os.chmod(directory, 0o700)  # noqa: PTH101 - os.walk gives strings
        except OSError:
            continue
    shutil.rmtree(path, ignore_errors=True)


def sync_directory(path: Path) -> None:
    """Make the entries of a directory durable.

    Raises:
        OSError: the system refused.
    """
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
