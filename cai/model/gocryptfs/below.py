"""Reaching files below a directory step by step: no link is followed, no path is too long."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

_DIRECTORY = os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY | os.O_NOFOLLOW


@contextmanager
def above(root: int, path: str) -> Iterator[tuple[int, str]]:
    """The descriptor of the directory that holds ``path``, and the last part of ``path``.

    Args:
        root: descriptor of a directory.
        path: relative to it, parts joined by slashes.

    Raises:
        OSError: a part on the way is no directory.
    """
    *parts, last = path.split("/")
    handle = root
    try:
        for part in parts:
            below = os.open(part, _DIRECTORY, dir_fd=handle)
            if handle != root:
                os.close(handle)
            handle = below
        yield handle, last
    finally:
        if handle != root:
            os.close(handle)


def open_below(root: int, path: str, flags: int, mode: int = 0o600) -> int:
    """Open a file below a directory, never through a link; the caller closes it.

    Raises:
        OSError: it cannot be opened.
    """
    with above(root, path) as (handle, name):
        return os.open(name, flags | os.O_CLOEXEC | os.O_NOFOLLOW, mode, dir_fd=handle)


def write_below(root: int, path: str, data: bytes, mode: int) -> None:
    """Write a whole small new file.

    Raises:
        OSError: it exists already, or cannot be written.
    """
    handle = open_below(root, path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        os.fchmod(file.fileno(), mode)


def mode_below(root: int, path: str, mode: int) -> None:
    """Set the mode of a directory.

    Raises:
        OSError: it is no directory, or not ours.
    """
    with above(root, path) as (handle, name):
        os.chmod(name, mode, dir_fd=handle)
