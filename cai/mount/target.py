"""Where the plaintext of one file goes: written piece by piece, or decrypted into a mapping.

Writes to one file wait for each other, and each takes new memory while it holds the others up. Into
a mapping all threads do so at once. That is faster on large pages, and slower on small ones, where
each page is a fault of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Callable
from typing import Protocol

from cai.errors import NoSpace
from cai.mount import system

PIECE = 2 * 1024 * 1024
"""Most bytes that are put at once: one large page, which the kernel then need not clear before it
is written, and little enough to stay in the processor's cache."""

Read = Callable[[memoryview], None]
"""Fills a view with authenticated plaintext, or raises and leaves nothing of it."""


class Target(Protocol):
    """A file in memory that is being filled; safe to use from several threads and forks."""

    def put(self, offset: int, length: int, read: Read) -> None:
        """Let ``read`` give the bytes at ``offset``, a multiple of ``PIECE``.

        Raises:
            NoSpace: memory is full.
            CaiError: what ``read`` raises.
        """

    def close(self) -> None:
        """Release what is held; the file's descriptor is the caller's."""


def target(out: int, size: int, *, large_pages: bool) -> Target:
    """The faster way to fill a file.

    Args:
        out: descriptor of the file, for reading and writing; it has its final size.
        size: of the file, bytes.
        large_pages: the memory has large pages.
    """
    if large_pages and size >= PIECE:
        with contextlib.suppress(OSError):
            return Mapped(out, size)
    return Written(out)


class Written:
    """Fills a file by writing to it."""

    def __init__(self, out: int) -> None:
        self._out = out
        self._local = threading.local()

    def put(self, offset: int, length: int, read: Read) -> None:
        """As ``Target.put``."""
        piece = self._buffer()[:length]
        read(piece)
        done = 0
        while done < length:
            try:
                done += os.pwrite(self._out, piece[done:], offset + done)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.ENOMEM):
                    raise _full() from error
                raise

    def close(self) -> None:
        """Nothing is held."""

    def _buffer(self) -> memoryview:
        """Reused memory of the calling thread."""
        if not hasattr(self._local, "buffer"):
            self._local.buffer = memoryview(mmap.mmap(-1, PIECE))
        buffer: memoryview = self._local.buffer
        return buffer


class Mapped:
    """Fills a file through a mapping of it.

    Raises:
        OSError: the kernel cannot take pages of a mapping in advance (Linux 5.14 can).
    """

    def __init__(self, out: int, size: int) -> None:
        self._map = mmap.mmap(out, size)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._view = memoryview(self._map)
        try:
            system.populate(self._address, mmap.PAGESIZE)
        except OSError:
            self.close()
            raise

    def put(self, offset: int, length: int, read: Read) -> None:
        """As ``Target.put``."""
        try:
            # Without it a page that cannot be had would kill the process.
            system.populate(self._address + offset, length)
        except OSError as error:
            raise _full() from error
        with self._view[offset : offset + length] as piece:
            read(piece)

    def close(self) -> None:
        """Remove the mapping; where an error still holds a view of it, it goes with that."""
        with contextlib.suppress(BufferError):
            self._view.release()
            self._map.close()


def _full() -> NoSpace:
    return NoSpace("memory is full", hint="use --kind fuse")
