"""EME wide-block encryption over AES-256, as gocryptfs uses it for names (spec-gocryptfs §3.1).

Halevi and Rogaway, "A Parallelizable Enciphering Mode" (2003). Every bit of the ciphertext depends
on every bit of the name, so equal beginnings of names do not show. No library of Python has it; it
needs AES in ECB mode and arithmetic in GF(2^128), here on integers.
"""

from __future__ import annotations

from collections.abc import Callable

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from cai.errors import FormatError

BLOCK = 16
MAX_BLOCKS = 128
"""Most blocks of one text; the proof of security ends there."""

_ALL = (1 << 128) - 1
_REDUCTION = 0x87


class Eme:
    """EME under one AES key; safe to use from several threads.

    Args:
        key: 32 bytes.
    """

    def __init__(self, key: bytes) -> None:
        # ECB as a bare block cipher is what a mode of operation is built from.
        self._cipher = Cipher(algorithms.AES(key), modes.ECB())  # noqa: S305
        masks, mask = [], _integer(self._encrypt(bytes(BLOCK)))
        for _ in range(MAX_BLOCKS):
            mask = _double(mask)
            masks.append(mask)
        self._masks = masks

    def encrypt(self, tweak: bytes, plain: bytes) -> bytes:
        """Encrypt 1 to 128 blocks under a tweak of 16 bytes.

        Raises:
            FormatError: another length.
        """
        return self._transform(self._encrypt, tweak, plain)

    def decrypt(self, tweak: bytes, sealed: bytes) -> bytes:
        """Decrypt; nothing is authenticated, another key or tweak gives other bytes.

        Raises:
            FormatError: another length.
        """
        return self._transform(self._decrypt, tweak, sealed)

    def _encrypt(self, blocks: bytes) -> bytes:
        return self._cipher.encryptor().update(blocks)

    def _decrypt(self, blocks: bytes) -> bytes:
        return self._cipher.decryptor().update(blocks)

    def _transform(self, blockwise: Callable[[bytes], bytes], tweak: bytes, data: bytes) -> bytes:
        count, rest = divmod(len(data), BLOCK)
        if rest or not 1 <= count <= MAX_BLOCKS or len(tweak) != BLOCK:
            raise FormatError(f"EME takes 1 to {MAX_BLOCKS} blocks of 16 bytes, not {len(data)}")
        # All masks side by side are one long integer, so one XOR masks the whole text.
        mask = sum(self._masks[j] << (128 * j) for j in range(count))
        first = blockwise(_bytes(_integer(data) ^ mask, count))
        inner = [_integer(first[at : at + BLOCK]) for at in range(0, len(first), BLOCK)]
        t = _integer(tweak)
        mixed = t
        for value in inner:
            mixed ^= value
        middle = _integer(blockwise(_bytes(mixed, 1)))
        step = mixed ^ middle
        outer = [0] * count
        lead = middle ^ t
        for j in range(1, count):
            step = _double(step)
            outer[j] = inner[j] ^ step
            lead ^= outer[j]
        outer[0] = lead
        joined = sum(value << (128 * j) for j, value in enumerate(outer))
        last = blockwise(_bytes(joined, count))
        return _bytes(_integer(last) ^ mask, count)


def _double(value: int) -> int:
    """Multiply by x in GF(2^128), byte 0 least significant."""
    doubled = value << 1
    return (doubled & _ALL) ^ _REDUCTION if doubled >> 128 else doubled


def _integer(data: bytes) -> int:
    return int.from_bytes(data, "little")


def _bytes(value: int, blocks: int) -> bytes:
    return value.to_bytes(BLOCK * blocks, "little")
