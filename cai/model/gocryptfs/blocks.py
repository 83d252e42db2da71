"""Blocks of a file's content: IV, ciphertext, tag (spec-gocryptfs §4).

Blocks are enciphered in groups of 256 between buffers of the caller. At 4 KiB a call, handing the
interpreter lock over costs more than the cipher, so speed comes from processes (``crew``).
"""

from __future__ import annotations

import os
from hashlib import sha256

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cai.errors import FormatError, Tampered
from cai.model.gocryptfs.keys import CipherKeys
from cai.model.gocryptfs.layout import (
    BLOCK,
    FILE_ID_SIZE,
    HEADER_SIZE,
    HEADER_VERSION,
    IV_SIZE,
    OVERHEAD,
    STORED_BLOCK,
    TAG_SIZE,
)

_ZERO_IV = bytes(IV_SIZE)
_HOLE = bytes(STORED_BLOCK)


class BlockCipher:
    """Encrypts and decrypts blocks under the content key of one directory."""

    def __init__(self, keys: CipherKeys) -> None:
        self._aead = AESGCM(keys.content)

    def encrypt(self, file_id: bytes, first: int, plain: memoryview, out: memoryview) -> memoryview:
        """Encrypt blocks under fresh IVs.

        Args:
            file_id: of the file, 16 bytes.
            first: number of the first block.
            plain: their plaintext; only the last block of a file may be shorter than 4096 bytes.
            out: receives them as they are stored.

        Returns:
            The part of ``out`` that was filled.
        """
        encrypt_into = self._aead.encrypt_into
        whole, rest = divmod(len(plain), BLOCK)
        count = whole + (rest > 0)
        stored = out[: len(plain) + OVERHEAD * count]
        ivs = os.urandom(IV_SIZE * count)
        # Every n-th byte of all IVs at once: 16 copies, not one for each block.
        for n in range(IV_SIZE):
            stored[n::STORED_BLOCK][:count] = ivs[n::IV_SIZE]
        start = IV_SIZE
        for i in range(count):
            encrypt_into(
                ivs[i * IV_SIZE : (i + 1) * IV_SIZE],
                plain[i * BLOCK : (i + 1) * BLOCK],
                (first + i).to_bytes(8, "big") + file_id,
                stored[start : start + BLOCK + TAG_SIZE],
            )
            start += STORED_BLOCK
        return stored

    def decrypt(
        self, file_id: bytes, first: int, stored: memoryview, out: memoryview, *,
        skip: int = 0, holes: bool = False,
    ) -> None:
        """Decrypt stored blocks into ``out``.

        Args:
            file_id: of the file.
            first: number of the first block.
            stored: the blocks as they are stored.
            out: receives their plaintext, without the first ``skip`` bytes, until it is full.
            skip: less than a block.
            holes: a full block of zeros stands for zeros, as stock takes it.

        Raises:
            Tampered: a block does not verify; its message names the block. ``out`` then holds
                bytes that must not be used.
        """
        decrypt_into = self._aead.decrypt_into
        position = 0
        for i in range(-(-len(stored) // STORED_BLOCK)):
            start = i * STORED_BLOCK
            block = stored[start : start + STORED_BLOCK]
            length = len(block) - OVERHEAD
            if length <= 0:
                raise Tampered(f"block {first + i} is cut off")
            whole = not skip and len(out) - position >= length
            target = out[position : position + length] if whole else memoryview(bytearray(length))
            if holes and block[:IV_SIZE] == _ZERO_IV:
                if block != _HOLE:
                    raise Tampered(f"block {first + i} has an IV of zeros")
                target[:] = bytes(length)
            else:
                aad = (first + i).to_bytes(8, "big") + file_id
                try:
                    decrypt_into(block[:IV_SIZE], block[IV_SIZE:], aad, target)
                except InvalidTag:
                    target[:] = bytes(length)
                    raise Tampered(f"block {first + i} does not verify") from None
            if whole:
                position += length
                continue
            part = target[skip : skip + len(out) - position]
            out[position : position + len(part)] = part
            position += len(part)
            skip = 0


def tag_digest(stored: memoryview) -> bytes:
    """SHA-256 over the IV and tag of every block of a group (§6)."""
    # The tag of one block lies beside the IV of the next.
    borders = range(STORED_BLOCK - TAG_SIZE, len(stored) - OVERHEAD, STORED_BLOCK)
    pairs = [stored[at : at + OVERHEAD] for at in borders]
    return sha256(b"".join([stored[:IV_SIZE], *pairs, stored[-TAG_SIZE:]])).digest()


def block_ivs(stored: memoryview) -> bytes:
    """The IVs of stored blocks, side by side."""
    return b"".join(
        [stored[at : at + IV_SIZE] for at in range(0, len(stored), STORED_BLOCK)]
    )


def new_file_id() -> bytes:
    """A fresh file id."""
    return os.urandom(FILE_ID_SIZE)


def encode_header(file_id: bytes) -> bytes:
    """The header in front of the first block."""
    return HEADER_VERSION + file_id


def parse_header(header: bytes) -> bytes:
    """The file id of a header.

    Raises:
        FormatError: another version, or an id of zeros.
    """
    if len(header) != HEADER_SIZE or not header.startswith(HEADER_VERSION):
        raise FormatError("its header is of another version")
    file_id = header[len(HEADER_VERSION) :]
    if not any(file_id):
        raise FormatError("its file id is zero")
    return file_id
