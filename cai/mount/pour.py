"""Decrypts whole files into memory, with all cores, each piece verified or not left there.

Threads do it where chunks are large; the interpreter lock is then free while one is decrypted. Many
small chunks, as those of gocryptfs, keep threads waiting for that lock, so they get processes.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Self

from cai import errors
from cai.errors import CaiError, StorageError, Tampered, from_os_error
from cai.model.tree import Entry, FileReader, ModelTree
from cai.mount import memory
from cai.mount.target import PIECE, target

MAX_THREADS = 8
"""Most threads or processes that decrypt."""

MAX_TOLD = 4000
"""Longest error that a process tells, bytes: what a pipe takes at once."""

LARGE_CHUNK = 64 * 1024
"""From this chunk size on threads are as fast as processes, bytes."""

WORTH_PROCESSES = 4 * PIECE
"""Shorter files are not worth a process, bytes."""

Progress = Callable[[int], None]


class Pourer:
    """Decrypts files of one tree, one or several at a time; to be used as a context manager.

    Args:
        tree: the opened model.
        progress: called with each number of bytes done.
        large_pages: the memory that is filled has large pages.
    """

    def __init__(
        self, tree: ModelTree, progress: Progress | None = None, *, large_pages: bool = False
    ) -> None:
        self._tree = tree
        self._progress = progress or (lambda _amount: None)
        self._large_pages = large_pages
        self._pool = ThreadPoolExecutor(
            min(MAX_THREADS, os.cpu_count() or 1), thread_name_prefix="cai-pour"
        )

    def pour(self, entry: Entry, out: int) -> None:
        """Write the whole plaintext of a file.

        Args:
            entry: the file.
            out: descriptor of an empty file in memory, for reading and writing.

        Raises:
            Tampered: some byte does not authenticate; ``out`` must be thrown away.
            InputMissing, StorageError: the file cannot be read.
            NoSpace: memory is full.
        """
        # The final size first: only then are large pages used inside it.
        os.ftruncate(out, entry.size)
        # An empty file is opened too: its object must be there and be the sealed one.
        reader = self._tree.open(entry.path)
        into = target(out, entry.size, large_pages=self._large_pages)
        try:
            # Where memory is short, the ciphertext must not stay beside the plaintext.
            forget = getattr(reader, "forget", None) if memory.is_tight(entry.size) else None

            def work(offset: int) -> int:
                length = min(PIECE, entry.size - offset)
                into.put(offset, length, partial(_read, entry, reader, offset))
                if forget is not None:
                    forget(offset, PIECE)
                return length

            offsets = range(0, entry.size, PIECE)
            if reader.chunk_size < LARGE_CHUNK and entry.size >= WORTH_PROCESSES:
                in_processes(offsets, work, self._progress)
            else:
                for done in self._pool.map(work, offsets):
                    self._progress(done)
        finally:
            into.close()
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


def in_processes(
    offsets: Sequence[int], work: Callable[[int], int], progress: Progress
) -> None:
    """Do ``work`` on every offset in forked processes, one for each core.

    Raises:
        CaiError: what one of them raised first; or that one was killed.
    """
    count = min(MAX_THREADS, os.cpu_count() or 1)
    reading, writing = os.pipe()
    pids: list[int] = []
    try:
        for number in range(count):
            pid = os.fork()
            if pid == 0:
                _child(offsets[number::count], work, writing)
            pids.append(pid)
        os.close(writing)
        writing = -1
        with os.fdopen(os.dup(reading), "rb") as said:
            for line in said:
                if line.startswith(b"{"):
                    raise _told(line)
                progress(int(line))
        failed = [os.waitstatus_to_exitcode(os.waitpid(pids.pop(), 0)[1]) for _ in range(count)]
        if any(failed):
            raise StorageError("a process that decrypts was killed or failed")
    except OSError as error:
        raise from_os_error(error, "decrypt in several processes") from error
    finally:
        os.close(reading)
        if writing >= 0:
            os.close(writing)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _child(offsets: Sequence[int], work: Callable[[int], int], writing: int) -> None:
    """Never returns: nothing of the parent's stack may run in the child."""
    status = 1
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        for offset in offsets:
            os.write(writing, b"%d\n" % work(offset))
        status = 0
    except CaiError as error:
        told = {"kind": type(error).__name__, "message": error.message, "hint": error.hint or ""}
        os.write(writing, json.dumps(told).encode()[:MAX_TOLD] + b"\n")
    finally:
        os._exit(status)


def _told(line: bytes) -> CaiError:
    """The error that a child wrote."""
    try:
        told = json.loads(line)
    except ValueError:
        return StorageError("a process that decrypts failed")
    kind: type[CaiError] = getattr(errors, told["kind"])
    return kind(told["message"], hint=told["hint"] or None)


def _read(entry: Entry, reader: FileReader, offset: int, piece: memoryview) -> None:
    if reader.readinto(offset, piece) != len(piece):
        raise Tampered(f"{entry.path} is shorter than it was sealed")
