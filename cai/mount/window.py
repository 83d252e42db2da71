"""Reads of any alignment out of a reader that authenticates whole chunks.

The kernel's read-ahead is not aligned to our chunks, and small random reads ask for a few KiB of a
chunk. Each worker keeps the chunks of its last read, so that neither decrypts a chunk twice in a
row. The buffer is allocated once and reused.
"""

from __future__ import annotations

import mmap

from cai.errors import CaiError, FormatError, LimitExceeded, StorageError, Tampered
from cai.model.tree import FileReader
from cai.mount.protocol import MAX_READ

MAX_CHUNK = 4 * 1024 * 1024
"""Largest chunk size of a reader, bytes."""


class Window:
    """The last authenticated chunks of one file, contiguous in one reused buffer."""

    def __init__(self) -> None:
        self._buffer = memoryview(b"")
        self._file = -1
        self._start = 0
        self._end = 0

    def read(
        self, file: int, reader: FileReader, size: int, offset: int, length: int
    ) -> memoryview:
        """Authenticated plaintext.

        Args:
            file: number that names the file.
            reader: the file.
            size: its length, bytes.
            offset: first byte wanted.
            length: bytes wanted, ``MAX_READ`` at most.

        Returns:
            The bytes that there are, fewer than ``length`` only at the end of the file; valid
            until the next call.

        Raises:
            Tampered: a chunk does not authenticate; its message names the chunk.
            StorageError: the ciphertext cannot be read.
        """
        length = max(0, min(length, size - offset))
        if length == 0:
            return self._buffer[:0]
        chunk = _checked_chunk(reader.chunk_size)
        if not (file == self._file and self._start <= offset and offset + length <= self._end):
            start = offset - offset % chunk
            end = min(size, -(-(offset + length) // chunk) * chunk)
            self._fill(file, reader, chunk, start, end)
        first = offset - self._start
        return self._buffer[first : first + length]

    def _fill(self, file: int, reader: FileReader, chunk: int, start: int, end: int) -> None:
        # Both ends are multiples of the chunk size, or the end of the file.
        self._reserve(end - start)
        kept = 0
        if file == self._file and self._start <= start < self._end:
            # The read goes on in a chunk that is here already: it moves to the front.
            kept = min(self._end, end) - start
            first = start - self._start
            self._buffer[:kept] = self._buffer[first : first + kept]
        self._file = -1
        try:
            filled = reader.readinto(start + kept, self._buffer[kept : end - start])
        except Tampered as error:
            bad = _first_bad_chunk(reader, chunk, start + kept, end, self._buffer)
            raise Tampered(
                f"chunk {bad} does not authenticate: {error.message}", path=error.path
            ) from error
        if filled != end - start - kept:
            raise StorageError(f"{filled} bytes read where {end - start - kept} were sealed")
        self._file, self._start, self._end = file, start, end

    def _reserve(self, needed: int) -> None:
        if len(self._buffer) < needed:
            # Anonymous memory in whole pages: forked workers share none of it.
            self._buffer = memoryview(mmap.mmap(-1, max(needed, MAX_READ)))
            self._file = -1


def _checked_chunk(chunk: int) -> int:
    if chunk < 1:
        raise FormatError(f"chunk size {chunk}")
    if chunk > MAX_CHUNK:
        raise LimitExceeded(f"chunk size {chunk} is above {MAX_CHUNK}")
    return chunk


def _first_bad_chunk(
    reader: FileReader, chunk: int, start: int, end: int, scratch: memoryview
) -> int:
    """Number of the first chunk of a failed range that fails alone."""
    for offset in range(start, end, chunk):
        try:
            reader.readinto(offset, scratch[: min(chunk, end - offset)])
        except CaiError:
            return offset // chunk
    return start // chunk
