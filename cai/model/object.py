"""One stored object: header, tag table and chunks (docs/spec-format.md §3).

Ciphertext lies at the plaintext's offset plus a constant, page aligned; tags lie in front. Chunks
are enciphered straight from and into the caller's buffers, outside the interpreter lock.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cai.errors import FormatError, Tampered
from cai.model.derive import file_key
from cai.model.layout import (
    MAX_CHUNK_LOG2,
    MAX_CHUNKS,
    MAX_OBJECT_SIZE,
    OBJECT_HEADER_SIZE,
    TAG_SIZE,
    chunk_log2,
    head_size,
)
from cai.model.members import Members

MAGIC = b"CAIOBJ1\n"
VERSION = 1
SUITE_NUMBER = 1
SALT_SIZE = 32


@dataclass(frozen=True, slots=True)
class Shape:
    """Length and chunking of an object; all of its offsets follow.

    Attributes:
        size: plaintext bytes, 1 to 2^40.
        chunk: bytes of a chunk, a power of two from 64 KiB to 4 MiB.
    """

    size: int
    chunk: int

    def __post_init__(self) -> None:
        if chunk_log2(self.chunk) is None:
            raise FormatError(f"chunk size {self.chunk} is not a power of two, 64 KiB to 4 MiB")
        if not 1 <= self.size <= MAX_OBJECT_SIZE or self.chunks > MAX_CHUNKS:
            raise FormatError(
                f"an object of {self.size} bytes in chunks of {self.chunk} is beyond the limits"
            )

    @classmethod
    def read(cls, members: Members, size: int) -> Shape:
        """A shape of known size whose chunk size is the member ``chunk`` of a document.

        Raises:
            FormatError: naming the document, when they do not fit the limits.
        """
        length = members.integer("chunk", least=1, most=1 << MAX_CHUNK_LOG2)
        try:
            return cls(size, length)
        except FormatError as error:
            raise FormatError(f"{members.where}: {error.message}") from error

    @property
    def chunks(self) -> int:
        """Number of chunks, N."""
        return -(-self.size // self.chunk)

    @property
    def head(self) -> int:
        """Bytes in front of the ciphertext."""
        return head_size(self.size, self.chunk)

    @property
    def stored(self) -> int:
        """Bytes of the stored file."""
        return self.head + self.size

    def chunk_length(self, index: int) -> int:
        """Plaintext bytes of chunk ``index``."""
        return min(self.chunk, self.size - index * self.chunk)


def encode_header(shape: Shape, salt: bytes) -> bytes:
    """The 4096 header bytes (§3.1)."""
    log2 = chunk_log2(shape.chunk)
    assert log2 is not None, "Shape allows no other"  # noqa: S101
    fields = (
        MAGIC
        + VERSION.to_bytes(2, "big")
        + SUITE_NUMBER.to_bytes(2, "big")
        + bytes([log2, 0, 0, 0])
        + salt
        + shape.size.to_bytes(8, "big")
    )
    return fields.ljust(OBJECT_HEADER_SIZE, b"\x00")


def check_header(header: bytes, shape: Shape) -> None:
    """Check that a header is the one form that this shape allows (§8, O3).

    Raises:
        FormatError: any fixed, zero or known byte differs.
    """
    if header != encode_header(shape, header[16 : 16 + SALT_SIZE]):
        raise FormatError("not an object header of the known length and chunk size")


def object_digest(head: bytes | bytearray) -> str:
    """``object_digest`` over header and padded tag table, hex (§3.4)."""
    return sha256(head).hexdigest()


class ChunkCipher:
    """Encrypts or decrypts the chunks of one object; safe to use from several threads.

    Args:
        object_key: the 32 bytes from the manifest entry.
        header: the object's 4096 header bytes.
        shape: its length and chunking.
    """

    def __init__(self, object_key: bytes, header: bytes, shape: Shape) -> None:
        self._aead = AESGCM(file_key(object_key, header))
        self.shape = shape

    def encrypt(self, index: int, plain: memoryview, out: memoryview) -> None:
        """Encrypt chunk ``index`` into ``out``: its ciphertext, then its tag."""
        nonce, aad = self._bound(index)
        self._aead.encrypt_into(nonce, plain, aad, out)

    def decrypt(self, index: int, sealed: memoryview, out: memoryview) -> None:
        """Decrypt chunk ``index`` (ciphertext, then tag) into ``out``.

        Raises:
            Tampered: the chunk does not verify; ``out`` is zeroed, for what the library leaves
                there is unverified plaintext.
        """
        nonce, aad = self._bound(index)
        try:
            self._aead.decrypt_into(nonce, sealed, aad, out)
        except InvalidTag:
            out[:] = bytes(len(out))
            raise Tampered(f"chunk {index} does not verify") from None

    def _bound(self, index: int) -> tuple[bytes, bytes]:
        """Nonce and AAD of a chunk (§3.3)."""
        last = b"\x01" if index == self.shape.chunks - 1 else b"\x00"
        number = index.to_bytes(8, "big")
        length = self.shape.chunk_length(index).to_bytes(4, "big")
        return last + b"\x00\x00\x00" + number, number + length + last


def tag_table(tags: bytes | bytearray, shape: Shape) -> bytes:
    """The padded tag table (§3.2)."""
    return bytes(tags).ljust(shape.head - OBJECT_HEADER_SIZE, b"\x00")


def split_head(head: bytes, shape: Shape) -> tuple[bytes, bytes]:
    """Header and tags of an object's head.

    Raises:
        FormatError: header or padding are not of the known form (§8, O3 and O4).
    """
    header, table = head[:OBJECT_HEADER_SIZE], head[OBJECT_HEADER_SIZE:]
    check_header(header, shape)
    end = shape.chunks * TAG_SIZE
    if any(table[end:]):
        raise FormatError("bytes after the last tag")
    return header, table[:end]
