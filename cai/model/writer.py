"""Writing one object: encrypt in threads, hash in order, head last (docs/spec-format.md §3)."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from cai.model.index import PieceHasher, StoredFile, hash_pieces
from cai.model.lanes import Lanes, Slot, batches
from cai.model.layout import OBJECT_HEADER_SIZE, PIECE, TAG_SIZE
from cai.model.object import ChunkCipher, Shape, encode_header, object_digest, tag_table
from cai.model.stage import new_file, output_error, write_all

Read = Callable[[int, memoryview], None]
"""Fills a buffer with the plaintext at an offset; called in several threads."""

Done = Callable[[int, memoryview], None]
"""Gets each offset and its plaintext in order, the very bytes that were encrypted."""


def write_object(
    path: Path, shape: Shape, key: bytes, salt: bytes, lanes: Lanes, *, read: Read, done: Done
) -> tuple[str, StoredFile]:
    """Write a new object.

    Args:
        path: must not exist.
        shape: length and chunking.
        key: a fresh object key, 32 bytes.
        salt: fresh, 32 bytes.
        lanes: where it is encrypted.
        read: gives the plaintext.
        done: gets it once more, in order.

    Returns:
        ``object_digest`` in hex, and the stored file for the index.

    Raises:
        StorageError, NoSpace: it cannot be written.
        CaiError: what ``read`` or ``done`` raises.
    """
    try:
        fd = new_file(path)
    except OSError as error:
        raise output_error(error, f"write {path.name}") from error
    try:
        return _write(fd, shape, key, salt, lanes, read, done)
    except OSError as error:
        raise output_error(error, f"write {path.name}") from error
    finally:
        os.close(fd)


def _write(
    fd: int, shape: Shape, key: bytes, salt: bytes, lanes: Lanes, read: Read, done: Done
) -> tuple[str, StoredFile]:
    header = encode_header(shape, salt)
    cipher = ChunkCipher(key, header, shape)
    tags = bytearray(shape.chunks * TAG_SIZE)
    pieces = PieceHasher(shape.head)

    def work(job: tuple[int, int], slot: Slot) -> tuple[memoryview, list[memoryview]]:
        first, count = job
        plain = slot.plain[: min(count * shape.chunk, shape.size - first * shape.chunk)]
        read(first * shape.chunk, plain)
        sealed = _encrypt(cipher, first, count, plain, slot.sealed, tags)
        write_all(fd, sealed, shape.head + first * shape.chunk)
        return plain, sealed

    for (first, _), _slot, (plain, sealed) in lanes.run(batches(shape), work):
        offset = first * shape.chunk
        # Two hashes need the bytes in order: the slower one here, the other beside it.
        beside = lanes.aside(partial(pieces.update_all, sealed))
        try:
            done(offset, plain)
        finally:
            beside.result()
        # Starts writing back, so that the last fsync does not have to wait for everything.
        os.posix_fadvise(fd, shape.head + offset, len(plain), os.POSIX_FADV_DONTNEED)

    head = header + tag_table(tags, shape)
    write_all(fd, [memoryview(head)], 0)
    # The pieces under the head were passed before the head was known.
    early = hash_pieces(fd, 0, -(-shape.head // PIECE))
    digests = early | pieces.finish()
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    ordered = tuple(digests[number] for number in sorted(digests))
    return object_digest(head), StoredFile(shape.stored, ordered)


def _encrypt(
    cipher: ChunkCipher, first: int, count: int, plain: memoryview, room: memoryview,
    tags: bytearray,
) -> list[memoryview]:
    """Encrypt chunks into ``room``, their tags into the table; gives the ciphertexts."""
    chunk, views = cipher.shape.chunk, []
    for i in range(count):
        part = plain[i * chunk : (i + 1) * chunk]
        at = i * (chunk + TAG_SIZE)
        end = at + len(part)
        cipher.encrypt(first + i, part, room[at : end + TAG_SIZE])
        number = first + i
        tags[number * TAG_SIZE : (number + 1) * TAG_SIZE] = room[end : end + TAG_SIZE]
        views.append(room[at:end])
    return views


assert PIECE % OBJECT_HEADER_SIZE == 0  # noqa: S101 - heads end on a page, pieces hold whole pages
