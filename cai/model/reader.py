"""Random access to one object: authenticated chunks into the caller's buffer (spec-format §8).

Reads use ``preadv`` at explicit offsets and scratch memory of the calling thread, so one reader
serves several threads and forked processes without a lock.
"""

from __future__ import annotations

import itertools
import threading

from cai.errors import FormatError, StorageError, Tampered
from cai.model.files import SealedFiles
from cai.model.filling import fill
from cai.model.layout import INLINE_SIZE, TAG_SIZE
from cai.model.object import ChunkCipher, Shape, object_digest, split_head

BATCH = 1024 * 1024
"""Bytes that one system call reads where a request spans several chunks."""

_serial = itertools.count()


class _Scratch(threading.local):
    """Memory of one thread: ciphertext on its way, and the last chunk that was read in parts."""

    def __init__(self) -> None:
        self.sealed = bytearray()
        self.plain = bytearray()
        self.held = (-1, -1)

    def sealed_view(self, size: int) -> memoryview:
        if len(self.sealed) < size:
            self.sealed = bytearray(size)
        return memoryview(self.sealed)[:size]

    def plain_view(self, size: int) -> memoryview:
        if len(self.plain) < size:
            self.plain = bytearray(size)
        return memoryview(self.plain)[:size]


_scratch = _Scratch()


class ObjectReader:
    """An open object, verified as far as its head (O1 to O5).

    Args:
        files: the sealed model.
        stored: the object's stored path.
        shape: its known length and chunking.
        digest: its known ``object_digest``, hex.
        key: its object key.
        path: the plaintext path, for messages; empty for the manifest.
        size: plaintext bytes that belong to the file; the rest of the object is padding.

    Raises:
        Tampered: the stored object is missing or is not the sealed one.
        StorageError: it cannot be read.
    """

    def __init__(
        self, files: SealedFiles, stored: str, shape: Shape, digest: str, key: bytes, *,
        path: str = "", size: int | None = None,
    ) -> None:
        self.stored = stored
        self.path = path
        self.shape = shape
        self.size = shape.size if size is None else size
        self.chunk_size = shape.chunk
        self._serial = next(_serial)
        self._files = files
        self._handle = files.open(stored)
        try:
            self.head = self._verified_head(digest)
            header, self._tags = split_head(self.head, shape)
        except FormatError as error:
            self.close()
            raise self._tampered(error.message) from error
        except BaseException:
            self.close()
            raise
        # (O5) the file key
        self._cipher = ChunkCipher(key, header, shape)

    def readinto(self, offset: int, buffer: memoryview) -> int:
        """Fill ``buffer`` with authenticated plaintext from ``offset``.

        Returns:
            Bytes filled: ``len(buffer)``, or fewer at the end of the file.

        Raises:
            Tampered: some byte of the range does not authenticate; the buffer is zeroed.
            StorageError: the ciphertext cannot be read.
        """
        return fill(buffer, offset, self.size, self._read_some)

    def read_chunks(
        self, first: int, count: int, sealed: memoryview, plain: memoryview
    ) -> list[memoryview]:
        """Read and decrypt whole chunks into the caller's memory.

        Args:
            first: number of the first chunk.
            count: how many; they must exist.
            sealed: scratch, at least ``count * (chunk + 16)`` bytes.
            plain: receives the plaintext, at least the chunks' length.

        Returns:
            The ciphertext of each chunk, as views into ``sealed``.

        Raises:
            Tampered, StorageError: as ``readinto``; ``plain`` then holds nothing unverified.
        """
        step = self.chunk_size + TAG_SIZE
        lengths = [self.shape.chunk_length(i) for i in range(first, first + count)]
        views = [sealed[i * step : i * step + length] for i, length in enumerate(lengths)]
        self._fill(views, self.shape.head + first * self.chunk_size)
        position = 0
        for i, length in enumerate(lengths):
            at, end = i * step, i * step + length
            number = first + i
            sealed[end : end + TAG_SIZE] = self._tags[number * TAG_SIZE : (number + 1) * TAG_SIZE]
            try:
                self._cipher.decrypt(
                    number, sealed[at : end + TAG_SIZE], plain[position : position + length]
                )
            except Tampered as error:
                raise self._tampered(error.message) from None
            position += length
        return views

    def forget(self, offset: int, length: int) -> None:
        """Tell the kernel that this part of the ciphertext is not needed again."""
        self._files.forget(self._handle, self.shape.head + offset, length)

    def close(self) -> None:
        """Close the stored file."""
        handle, self._handle = self._handle, -1
        if handle >= 0:
            self._files.release(handle)

    def _read_some(self, offset: int, view: memoryview) -> int:
        """Read one run of whole chunks, or a part of one chunk; returns its length."""
        index, skip = divmod(offset, self.chunk_size)
        whole = len(view) // self.chunk_size
        if not skip and not whole and len(view) == self.shape.chunk_length(index):
            whole = 1
        if not skip and whole:
            count = min(whole, max(1, BATCH // self.chunk_size))
            sealed = _scratch.sealed_view(count * (self.chunk_size + TAG_SIZE))
            self.read_chunks(index, count, sealed, view)
            return min(len(view), count * self.chunk_size)
        part = self._held_chunk(index)[skip : skip + len(view)]
        view[: len(part)] = part
        return len(part)

    def _held_chunk(self, index: int) -> memoryview:
        """The chunk's plaintext in this thread's memory; the last one is kept."""
        length = self.shape.chunk_length(index)
        if _scratch.held != (self._serial, index):
            _scratch.held = (-1, -1)
            sealed = _scratch.sealed_view(self.chunk_size + TAG_SIZE)
            self.read_chunks(index, 1, sealed, _scratch.plain_view(self.chunk_size))
            _scratch.held = (self._serial, index)
        return _scratch.plain_view(length)

    def _verified_head(self, digest: str) -> bytes:
        # (O1) the length, before anything of that size is allocated
        found = self._files.length(self._handle)
        if found != self.shape.stored:
            raise self._tampered(f"it has {found} bytes, expected {self.shape.stored}")
        head = bytearray(self.shape.head)
        self._fill([memoryview(head)], 0)
        # (O2) the digest; (O3) and (O4) follow in split_head
        if object_digest(head) != digest:
            raise self._tampered("its header or tags are not the sealed ones")
        return bytes(head)

    def _fill(self, views: list[memoryview], offset: int) -> None:
        rest = views
        while rest:
            try:
                done = self._files.preadv(self._handle, rest, offset)
            except OSError as error:
                raise StorageError(f"read {self.stored}: {error.strerror}") from error
            if not done:
                raise self._tampered("it ends early")
            offset += done
            rest = _after(rest, done)

    def _tampered(self, reason: str) -> Tampered:
        of = f" (of {self.path!r})" if self.path else ""
        return Tampered(
            f"{self.stored}{of} was altered: {reason}", path=self.stored,
            hint="fetch the sealed model again, or restore it from a copy",
        )


class InlineReader:
    """A file whose content the manifest holds."""

    chunk_size = INLINE_SIZE

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.size = len(content)

    def readinto(self, offset: int, buffer: memoryview) -> int:
        """Fill ``buffer`` from ``offset``; fewer bytes at the end of the file."""
        view = memoryview(buffer).cast("B")
        part = self._content[offset : offset + len(view)]
        view[: len(part)] = part
        return len(part)

    def close(self) -> None:
        """Nothing to release."""


def _after(views: list[memoryview], done: int) -> list[memoryview]:
    """The views without their first ``done`` bytes."""
    for number, view in enumerate(views):
        if done < len(view):
            return [view[done:], *views[number + 1 :]]
        done -= len(view)
    return []
