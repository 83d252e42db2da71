"""Chunked OHTTP as TNG sends it: HPKE for the request, a derived AEAD for the response.

A chunk is a QUIC-style varint length and ciphertext; the last one has length 0 and additional data
``final`` (reference "TNG" §2.5). Both directions are streams: a chunk is opened as it arrives.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from cai.errors import FormatError, LimitExceeded, Tampered
from tng.ohttp.hpke import (
    KDF_ID,
    KEM_ID,
    KEY_SIZE,
    NONCE_SIZE,
    Aead,
    Context,
    CounterCipher,
    expand,
    extract,
    setup_recipient,
    setup_sender,
)

HEADER_SIZE = 7
"""Bytes of ``key_id u8 ‖ kem u16 ‖ kdf u16 ‖ aead u16``."""

MAX_PLAINTEXT = 16 * 1024
"""Most plaintext in one chunk that is sent, bytes."""

MAX_CHUNK = 1024 * 1024
"""Longest chunk that is accepted, bytes."""

TAG_SIZE = 16
"""Bytes of an AEAD tag."""

REQUEST_LABEL: Final = b"message/bhttp chunked request"
RESPONSE_LABEL: Final = b"message/bhttp chunked response"

_FINAL: Final = b"final"


@dataclass(frozen=True, slots=True)
class Header:
    """What stands before an encapsulated request."""

    key_id: int
    aead: Aead

    def encode(self) -> bytes:
        """Seven bytes."""
        numbers = (KEM_ID, KDF_ID, int(self.aead))
        return bytes([self.key_id]) + b"".join(number.to_bytes(2) for number in numbers)

    @classmethod
    def decode(cls, data: bytes) -> Header:
        """Parse seven bytes.

        Raises:
            FormatError: another KEM, KDF or AEAD than those that are served.
        """
        if len(data) != HEADER_SIZE:
            raise FormatError("encapsulated request: truncated header")
        kem, kdf, aead = (int.from_bytes(data[at : at + 2]) for at in (1, 3, 5))
        if kem != KEM_ID or kdf != KDF_ID or aead not in tuple(Aead):
            raise FormatError("encapsulated request: algorithms that are not served")
        return cls(data[0], Aead(aead))

    @property
    def info(self) -> bytes:
        """HPKE's ``info`` of requests under this header."""
        return REQUEST_LABEL + b"\x00" + self.encode()


class Sealer:
    """Cuts plaintext into sealed chunks."""

    def __init__(self, cipher: CounterCipher) -> None:
        self._cipher = cipher

    def chunk(self, plaintext: bytes) -> bytes:
        """Chunks for this plaintext; nothing for none."""
        return b"".join(
            self._framed(self._cipher.seal(plaintext[at : at + MAX_PLAINTEXT]))
            for at in range(0, len(plaintext), MAX_PLAINTEXT)
        )

    def final(self) -> bytes:
        """The last chunk, empty, after which nothing is sent."""
        return b"\x00" + self._cipher.seal(b"", _FINAL)

    @staticmethod
    def _framed(ciphertext: bytes) -> bytes:
        return encode_varint(len(ciphertext)) + ciphertext


class Opener:
    """Opens chunks as their bytes arrive.

    The final chunk has no length of its own, so it ends with the stream: only ``finish`` says that
    the message is whole.
    """

    def __init__(self, cipher: CounterCipher) -> None:
        self._cipher = cipher
        self._buffer = bytearray()
        self._last = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Plaintext of each chunk that these bytes complete.

        Raises:
            Tampered: a chunk is not the next one that was sealed.
            FormatError, LimitExceeded: the framing is broken.
        """
        self._buffer += data
        while not self._last:
            found = decode_varint(self._buffer)
            if found is None:
                return
            size, start = found
            if size == 0:
                self._last = True
                del self._buffer[:start]
                break
            if size > MAX_CHUNK:
                raise LimitExceeded(f"encapsulated chunk of {size} bytes, at most {MAX_CHUNK}")
            if len(self._buffer) < start + size:
                return
            ciphertext = bytes(self._buffer[start : start + size])
            del self._buffer[: start + size]
            yield self._cipher.open(ciphertext)
        if len(self._buffer) > MAX_CHUNK:
            raise LimitExceeded(f"final chunk of more than {MAX_CHUNK} bytes")

    def finish(self) -> bytes:
        """Plaintext of the final chunk, at the end of the stream.

        Raises:
            Tampered: the stream was cut, or the final chunk is not what was sealed.
        """
        if not self._last:
            raise Tampered("the encapsulated message was cut off")
        return self._cipher.open(bytes(self._buffer), _FINAL)


class RequestSender:
    """The client's end of one exchange.

    Args:
        header: key and algorithms.
        recipient: the server's public key, 32 bytes.
        sender: this end's key, when it has proven itself (mode Auth).
    """

    def __init__(
        self, header: Header, recipient: bytes, sender: X25519PrivateKey | None = None
    ) -> None:
        self._enc, self._context = setup_sender(
            header.aead, recipient, header.info, sender=sender
        )
        self.head = header.encode() + self._enc
        self.sealer = Sealer(self._context.cipher)

    def response(self, nonce: bytes) -> Opener:
        """Opens the response that begins with this nonce.

        Raises:
            FormatError: the nonce has another size.
        """
        return Opener(_response_cipher(self._context, self._enc, nonce))

    @property
    def nonce_size(self) -> int:
        """Bytes that a response begins with."""
        return response_nonce_size(self._context.aead)


class RequestReceiver:
    """The server's end of one exchange.

    Args:
        header: as received.
        enc: the client's encapsulated key, 32 bytes.
        key: the private key that the header names.
        sender: the client's proven public key (mode Auth).
    """

    def __init__(
        self, header: Header, enc: bytes, key: X25519PrivateKey, sender: bytes | None = None
    ) -> None:
        if len(enc) != KEY_SIZE:
            raise FormatError("encapsulated request: truncated key")
        self._enc = enc
        self._context = setup_recipient(header.aead, enc, key, header.info, sender=sender)
        self.opener = Opener(self._context.cipher)

    def response(self) -> tuple[bytes, Sealer]:
        """The nonce that the response begins with, and what seals it."""
        nonce = os.urandom(response_nonce_size(self._context.aead))
        return nonce, Sealer(_response_cipher(self._context, self._enc, nonce))


def response_nonce_size(aead: Aead) -> int:
    """``max(Nn, Nk)`` bytes (RFC 9458 §4.4)."""
    return max(NONCE_SIZE, aead.key_size)


def _response_cipher(context: Context, enc: bytes, nonce: bytes) -> CounterCipher:
    size = response_nonce_size(context.aead)
    if len(nonce) != size:
        raise FormatError("encapsulated response: truncated nonce")
    secret = context.export(RESPONSE_LABEL, size)
    prk = extract(enc + nonce, secret)
    key = expand(prk, b"key", context.aead.key_size)
    return CounterCipher(context.aead, key, expand(prk, b"nonce", NONCE_SIZE))


def encode_varint(value: int) -> bytes:
    """A QUIC variable-length integer (RFC 9000 §16).

    Raises:
        FormatError: more than 62 bits.
    """
    for prefix, size in ((0, 1), (1, 2), (2, 4), (3, 8)):
        if value < 1 << (8 * size - 2):
            return (value | prefix << (8 * size - 2)).to_bytes(size)
    raise FormatError("varint: more than 62 bits")


def decode_varint(data: bytes | bytearray, at: int = 0) -> tuple[int, int] | None:
    """Value and the offset after it; ``None`` while it is not complete."""
    if at >= len(data):
        return None
    size = 1 << (data[at] >> 6)
    if len(data) < at + size:
        return None
    mask = (1 << (8 * size - 2)) - 1
    return int.from_bytes(data[at : at + size]) & mask, at + size
