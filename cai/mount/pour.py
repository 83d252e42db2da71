"""Decrypts whole files into memory, with all cores, each piece verified before it is written."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

from cai.errors import NoSpace, Tampered
from cai.model.tree import Entry, FileReader, ModelTree
from cai.mount import memory

PIECE = 2 * 1024 * 1024
"""Bytes that one thread decrypts and writes at a time: one large page, which the kernel then need
not clear first, and little enough to stay in the processor's cache."""

MAX_THREADS = 8
"""Most threads that decrypt."""

Progress = Callable[[int], None]


class Pourer:
    """Decrypts files of one tree, one or several at a time; to be used as a context manager.

    Args:
        tree: the opened model.
        progress: called with each number of bytes done, from any thread.
    """

    def __init__(self, tree: ModelTree, progress: Progress | None = None) -> None:
        self._tree = tree
        self._progress = progress or (lambda _amount: None)
        self._local = threading.local()
        self._pool = ThreadPoolExecutor(
            min(MAX_THREADS, os.cpu_count() or 1), thread_name_prefix="cai-pour"
        )

    def pour(self, entry: Entry, out: int) -> None:
        """Write the whole plaintext of a file.

        Args:
            entry: the file.
            out: descriptor of an empty file in memory.

        Raises:
            Tampered: some byte does not authenticate; ``out`` must be thrown away.
            InputMissing, StorageError: the file cannot be read.
            NoSpace: memory is full.
        """
        # The final size first: only then are large pages used inside it.
        os.ftruncate(out, entry.size)
        # An empty file is opened too: its object must be there and be the sealed one.
        reader = self._tree.open(entry.path)
        try:
            # Where memory is short, the ciphertext must not stay beside the plaintext.
            forget = getattr(reader, "forget", None) if memory.is_tight(entry.size) else None

            def work(offset: int) -> None:
                self._write(entry, reader, out, offset)
                if forget is not None:
                    forget(offset, PIECE)

            for _done in self._pool.map(work, range(0, entry.size, PIECE)):
                pass
        finally:
            reader.close()

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self.close()

    def _write(self, entry: Entry, reader: FileReader, out: int, offset: int) -> None:
        piece = self._buffer()[: min(PIECE, entry.size - offset)]
        filled = reader.readinto(offset, piece)
        if filled != len(piece):
            raise Tampered(f"{entry.path} is shorter than it was sealed")
        _write_all(out, piece, offset)
        self._progress(len(piece))

    def _buffer(self) -> memoryview:
        """Reused memory of the calling thread."""
        if not hasattr(self._local, "buffer"):
            self._local.buffer = memoryview(mmap.mmap(-1, PIECE))
        buffer: memoryview = self._local.buffer
        return buffer


def _write_all(out: int, piece: memoryview, offset: int) -> None:
    done = 0
    while done < len(piece):
        try:
            done += os.pwrite(out, piece[done:], offset + done)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.ENOMEM):
                raise NoSpace("memory is full", hint="use --kind fuse") from error
            raise
