"""A bounded cache of verified pieces that threads and forked processes share.

The pieces lie in a memory file, the table of who is where in shared memory, both made before any
fork. Fetching a piece is a matter of one process: it holds a record lock for the piece, which the
kernel releases if that process dies, so nobody waits for the dead.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import threading
import time
import weakref
from collections.abc import Callable

from cai.errors import StorageError, from_os_error
from cai.model.layout import PIECE
from cai.model.stage import write_all

MIN_SLOTS, MAX_SLOTS = 4, 4096
"""Smallest and largest cache, pieces: 16 MiB to 16 GiB."""

_ROW = struct.Struct("<QQII")  # key + 1, tick of the last use, length, generation
_HEAD = 16  # the clock
_TABLE_LOCK = 0  # offsets of record locks in the memory file: the table, then the keys

_FIRST_POLL_S, _LONGEST_POLL_S = 0.0005, 0.01
"""Pauses of who waits until another process has fetched a piece, seconds."""


class PieceCache:
    """Pieces by key; the least recently used one makes room.

    Args:
        size: bytes, rounded down to whole pieces.

    Raises:
        StorageError: there is no memory for it.
    """

    def __init__(self, size: int) -> None:
        self.slots = min(MAX_SLOTS, max(MIN_SLOTS, size // PIECE))
        try:
            self._memory = os.memfd_create("cai-pieces", os.MFD_CLOEXEC)
            os.ftruncate(self._memory, self.slots * PIECE)
            self._table = mmap.mmap(-1, _HEAD + self.slots * _ROW.size)
        except OSError as error:
            raise from_os_error(error, "make the cache") from error
        # Record locks belong to a process: threads of one process are kept apart by these.
        self._mutex = threading.Lock()
        self._key_mutexes = [threading.Lock() for _ in range(self.slots)]
        forked = weakref.WeakMethod(self._after_fork)

        def in_child() -> None:
            if renew := forked():
                renew()

        os.register_at_fork(after_in_child=in_child)

    def get(self, key: int, offset: int, view: memoryview) -> int | None:
        """Copy from a cached piece; bytes copied, or ``None`` when it is not here."""
        while True:
            slot, row = self._find(key)
            if slot < 0:
                return None
            length = max(0, min(len(view), row[2] - offset))
            done = 0
            while done < length:
                count = os.preadv(
                    self._memory, [view[done:length]], slot * PIECE + offset + done
                )
                if not count:
                    raise StorageError("the cache of pieces is shorter than it was made")
                done += count
            # Nobody took the slot meanwhile, or what was copied may be of two pieces.
            if self._row(slot)[3] == row[3]:
                return length

    def has(self, key: int) -> bool:
        """Whether a piece is here."""
        return self._find(key)[0] >= 0

    def fill(self, key: int, fetch: Callable[[], bytes]) -> bytes:
        """Fetch a piece and keep it; one process and thread fetches, others wait for it.

        Returns:
            The piece.

        Raises:
            CaiError: what ``fetch`` raises; nothing is kept then.
        """
        # Which lock guards the fetching of a key does not depend on where it will lie.
        number = key % self.slots
        with self._key_mutexes[number], _RecordLock(self._memory, 1 + number, polling=True):
            held = bytearray(self._find(key)[1][2])
            if held and self.get(key, 0, memoryview(held)) == len(held):
                return bytes(held)
            data = fetch()
            self._store(key, data)
            return data

    def close(self) -> None:
        """Give the memory back, of this process."""
        if self._memory >= 0:
            os.close(self._memory)
            self._memory = -1

    def _store(self, key: int, data: bytes) -> None:
        with self._mutex, _RecordLock(self._memory, _TABLE_LOCK):
            rows = [self._row(slot) for slot in range(self.slots)]
            slot = min(range(self.slots), key=lambda number: (rows[number][0] > 0, rows[number][1]))
            # The old piece goes before its bytes are overwritten; the key of the new one comes
            # last and at once, for readers take no lock.
            start = _HEAD + slot * _ROW.size
            struct.pack_into("<Q", self._table, start, 0)
            _ROW.pack_into(
                self._table, start, 0, self._tick(), len(data), (rows[slot][3] + 1) % 2**32
            )
            write_all(self._memory, [memoryview(data)], slot * PIECE)
            struct.pack_into("<Q", self._table, start, key + 1)

    def _find(self, key: int) -> tuple[int, tuple[int, int, int, int]]:
        wanted = (key + 1).to_bytes(8, "little")
        start = _HEAD
        while True:
            at = self._table.find(wanted, start)
            if at < 0:
                return -1, (0, 0, 0, 0)
            slot, inside = divmod(at - _HEAD, _ROW.size)
            if inside == 0:
                row = self._row(slot)
                if row[0] == key + 1:
                    self._touch(slot)
                    return slot, row
            start = at + 1

    def _row(self, slot: int) -> tuple[int, int, int, int]:
        key, tick, length, generation = _ROW.unpack_from(self._table, _HEAD + slot * _ROW.size)
        return key, tick, length, generation

    def _touch(self, slot: int) -> None:
        # Unlocked: a lost update makes a piece look a little older than it is.
        struct.pack_into("<Q", self._table, _HEAD + slot * _ROW.size + 8, self._tick())

    def _tick(self) -> int:
        now: int = struct.unpack_from("<Q", self._table)[0] + 1
        struct.pack_into("<Q", self._table, 0, now)
        return now

    def _after_fork(self) -> None:
        self._mutex = threading.Lock()
        self._key_mutexes = [threading.Lock() for _ in range(self.slots)]


class _RecordLock:
    """One byte of the memory file, locked for this process.

    Locks that may be held for long are polled: the kernel looks for deadlocks between processes,
    not threads, and would find some that are none.
    """

    def __init__(self, handle: int, offset: int, *, polling: bool = False) -> None:
        self._handle, self._offset, self._polling = handle, offset, polling

    def __enter__(self) -> None:
        pause = _FIRST_POLL_S
        while self._polling:
            try:
                fcntl.lockf(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, self._offset)
            except BlockingIOError:
                time.sleep(pause)
                pause = min(_LONGEST_POLL_S, 2 * pause)
            else:
                return
        fcntl.lockf(self._handle, fcntl.LOCK_EX, 1, self._offset)

    def __exit__(self, *_exception: object) -> None:
        fcntl.lockf(self._handle, fcntl.LOCK_UN, 1, self._offset)
