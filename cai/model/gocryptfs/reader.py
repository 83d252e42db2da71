"""Random access to one encrypted file, with the manifest's tag digests or without them (§7).

The first read of a group checks its digest over all of its blocks' IVs and tags, and remembers the
IVs. Later reads of single blocks compare the IV alone: the tag binds the block to it, and whoever
holds the key draws each IV once, so no other block than the sealed one verifies under it.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict

from cai.errors import FormatError, StorageError, Tampered
from cai.model.files import SealedFiles
from cai.model.filling import fill
from cai.model.gocryptfs.blocks import (
    BlockCipher,
    block_ivs,
    encode_header,
    parse_header,
    tag_digest,
)
from cai.model.gocryptfs.entries import FileTags
from cai.model.gocryptfs.layout import (
    BLOCK,
    DIGEST_SIZE,
    GROUP,
    GROUP_PLAIN,
    GROUP_STORED,
    HEADER_SIZE,
    IV_SIZE,
    STORED_BLOCK,
    block_offset,
    plain_size,
    stored_size,
)

MAX_KEPT_GROUPS = 8192
"""Groups whose IVs one process remembers: 4 KiB each, for 8 GiB of files."""

_serial = itertools.count()


class _Scratch(threading.local):
    """Memory of one thread for the stored bytes of one group."""

    def __init__(self) -> None:
        self.stored = memoryview(bytearray(GROUP_STORED))


class _KeptIvs:
    """IVs of groups whose digests were right, by reader and group; the oldest go first."""

    def __init__(self) -> None:
        self._groups: OrderedDict[tuple[int, int], bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[int, int]) -> bytes | None:
        return self._groups.get(key)

    def put(self, key: tuple[int, int], ivs: bytes) -> None:
        with self._lock:
            self._groups[key] = ivs
            if len(self._groups) > MAX_KEPT_GROUPS:
                self._groups.popitem(last=False)


_scratch = _Scratch()
_kept = _KeptIvs()


class BlockReader:
    """An open encrypted file; safe to use from several threads and forks.

    Args:
        files: the stored files.
        stored: its stored path.
        cipher: under the content key.
        path: its plaintext path, for messages.
        size: its plaintext length.
        tags: what the manifest says of it; ``None`` trusts the stored bytes as far as stock does.
        holes: without tags, a block of zeros stands for zeros.

    Raises:
        Tampered: it is missing, or is not the sealed one as far as its header and length tell.
        StorageError: it cannot be read.
    """

    chunk_size = BLOCK

    def __init__(
        self, files: SealedFiles, stored: str, cipher: BlockCipher, *, path: str, size: int,
        tags: FileTags | None = None, holes: bool = False,
    ) -> None:
        self.stored = stored
        self.path = path
        self.size = size
        self._files, self._cipher, self._tags, self._holes = files, cipher, tags, holes
        self._serial = next(_serial)
        self._handle: int | None = files.open(stored)
        try:
            self._length = self._checked_length()
            self._file_id = self._checked_header() if size else b""
        except BaseException:
            self.close()
            raise

    def readinto(self, offset: int, buffer: memoryview) -> int:
        """Fill ``buffer`` with authenticated plaintext from ``offset``.

        Returns:
            Bytes filled: ``len(buffer)``, or fewer at the end of the file.

        Raises:
            Tampered: some byte of the range does not authenticate; the buffer is zeroed.
            StorageError: the ciphertext cannot be read.
        """
        return fill(buffer, offset, self.size, self._read_in_group)

    def read_group(self, group: int, stored: memoryview, plain: memoryview) -> memoryview:
        """Read and decrypt one whole group into the caller's memory.

        Args:
            group: its number.
            stored: receives the stored blocks, ``GROUP_STORED`` bytes at most.
            plain: receives the plaintext, exactly as long as it is.

        Returns:
            The part of ``stored`` that was filled.

        Raises:
            Tampered, StorageError: as ``readinto``; ``plain`` must then not be used.
        """
        sealed = self._fill(group * GROUP, self._blocks_of(group), stored)
        if self._tags is not None:
            self._check_group(group, sealed)
        self._decrypt(group * GROUP, sealed, plain)
        return sealed

    def header(self) -> bytes:
        """The stored header; empty for an empty file."""
        return encode_header(self._file_id) if self._file_id else b""

    def forget(self, offset: int, length: int) -> None:
        """The ciphertext of this part of the plaintext is not needed again."""
        if self._handle is not None and length > 0:
            start = block_offset(offset // BLOCK)
            end = block_offset(-(-(offset + length) // BLOCK))
            self._files.forget(self._handle, start, end - start)

    def close(self) -> None:
        """Close the stored file."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self._files.release(handle)

    def _read_in_group(self, offset: int, view: memoryview) -> int:
        """Read up to the end of a group; returns the bytes read."""
        group, within = divmod(offset, GROUP_PLAIN)
        length = min(len(view), GROUP_PLAIN - within)
        first, end = within // BLOCK, -(-(within + length) // BLOCK)
        stored = self._verified(group, first, end)
        skip = within - first * BLOCK
        self._decrypt(group * GROUP + first, stored, view[:length], skip=skip)
        return length

    def _verified(self, group: int, first: int, end: int) -> memoryview:
        """The stored blocks ``first`` to ``end - 1`` of a group; their IVs are the sealed ones."""
        count = self._blocks_of(group)
        ivs = _kept.get((self._serial, group)) if self._tags is not None else None
        if self._tags is None or ivs is not None:
            stored = self._fill(group * GROUP + first, end - first, _scratch.stored)
            if ivs is not None and block_ivs(stored) != ivs[first * IV_SIZE : end * IV_SIZE]:
                raise self._tampered(f"a block of group {group} is not the sealed one")
            return stored
        stored = self._fill(group * GROUP, count, _scratch.stored)
        self._check_group(group, stored)
        if (first, end) != (0, count):
            # Whoever reads parts is likely to come back; whoever reads it whole is not.
            _kept.put((self._serial, group), block_ivs(stored))
        return stored[first * STORED_BLOCK : end * STORED_BLOCK]

    def _check_group(self, group: int, stored: memoryview) -> None:
        assert self._tags is not None  # noqa: S101 - the callers ask only then
        expected = self._tags.groups[group * DIGEST_SIZE : (group + 1) * DIGEST_SIZE]
        if tag_digest(stored) != expected:
            raise self._tampered(f"the tags of group {group} are not the sealed ones")

    def _decrypt(
        self, first: int, stored: memoryview, out: memoryview, *, skip: int = 0
    ) -> None:
        try:
            self._cipher.decrypt(
                self._file_id, first, stored, out, skip=skip, holes=self._holes
            )
        except Tampered as error:
            raise self._tampered(error.message) from None

    def _blocks_of(self, group: int) -> int:
        return min(GROUP, -(-self.size // BLOCK) - group * GROUP)

    def _fill(self, first: int, count: int, room: memoryview) -> memoryview:
        """Read stored blocks into ``room``."""
        assert self._handle is not None  # noqa: S101 - a closed reader is a fault of the caller
        start = block_offset(first)
        view = room[: min(count * STORED_BLOCK, self._length - start)]
        done = 0
        while done < len(view):
            try:
                got = self._files.preadv(self._handle, [view[done:]], start + done)
            except OSError as error:
                raise StorageError(f"read {self.stored}: {error.strerror}") from error
            if not got:
                raise self._tampered("it ends early")
            done += got
        return view

    def _checked_length(self) -> int:
        assert self._handle is not None  # noqa: S101 - called while it is being opened
        length = self._files.length(self._handle)
        if self._tags is not None and length != stored_size(self.size):
            raise self._tampered(f"it has {length} bytes, expected {stored_size(self.size)}")
        if plain_size(length) != self.size:
            raise self._tampered("its length changed")
        return length

    def _checked_header(self) -> bytes:
        assert self._handle is not None  # noqa: S101 - called while it is being opened
        header = bytearray(HEADER_SIZE)
        try:
            got = self._files.preadv(self._handle, [memoryview(header)], 0)
        except OSError as error:
            raise StorageError(f"read {self.stored}: {error.strerror}") from error
        try:
            file_id = parse_header(bytes(header[:got]))
        except FormatError as error:
            raise self._tampered(error.message) from None
        if self._tags is not None and file_id != self._tags.file_id:
            raise self._tampered("its file id is not the sealed one")
        return file_id

    def _tampered(self, reason: str) -> Tampered:
        return Tampered(
            f"{self.stored} (of {self.path!r}) was altered: {reason}", path=self.stored,
            hint="fetch the sealed model again, or restore it from a copy",
        )
