"""OUT of a pull, and the directory beside it that an unfinished pull fills."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
from pathlib import Path

from cai import jcs
from cai.errors import CaiError, UsageError
from cai.model.layout import HEADER_FILE, MAX_HEADER_FILE
from cai.model.stage import output_error, remove_tree, sync_directory

SUFFIX = ".partial-pull"
"""What is added to OUT for the directory that an unfinished pull fills."""

_EXCHANGE = 2
"""``RENAME_EXCHANGE`` of renameat2(2)."""


class Partial:
    """The directory that a pull fills; locked, so that two pulls never fill it together."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self.path = out.with_name(out.name + SUFFIX)
        self._lock = -1

    def __enter__(self) -> Partial:
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


def refuse_other(out: Path, model_id: str) -> None:
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
        same = found.get("model_id") == model_id
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
