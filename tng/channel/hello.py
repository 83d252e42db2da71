"""The protocols that a TLS client offers, read before its handshake begins.

A gateway presents another key in each dialect (decisions §4), and OpenSSL chooses the certificate
before it asks which protocol to speak; so the first message is looked at here. It is parsed for
this one extension, with every length checked; what OpenSSL makes of it later decides.
"""

from __future__ import annotations

from typing import Final

from cai.errors import FormatError, LimitExceeded

TLS_HANDSHAKE: Final = 0x16
"""First byte of every TLS connection: content type handshake (RFC 8446 §5.1)."""

MAX_HELLO = 64 * 1024
"""Longest first message that is waited for, bytes."""

MAX_PROTOCOLS = 32
"""Most ALPN names of one client."""

_CLIENT_HELLO = 1
_ALPN_EXTENSION = 16


class _Reader:
    """Reads big-endian numbers and counted bytes; a length never reaches beyond the end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, size: int) -> bytes:
        if size > len(self._data) - self._at:
            raise FormatError("TLS: the first message is truncated")
        part = self._data[self._at : self._at + size]
        self._at += size
        return part

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size))

    def counted(self, size: int) -> bytes:
        return self.take(self.number(size))

    @property
    def done(self) -> bool:
        return self._at >= len(self._data)


def offered_protocols(data: bytes) -> tuple[bytes, ...] | None:
    """ALPN names (RFC 7301) of the ClientHello at the beginning of a connection.

    Args:
        data: what has arrived so far; it begins with a handshake record.

    Returns:
        The names in order, empty when there are none; ``None`` while the message is not complete.

    Raises:
        FormatError: not a ClientHello.
        LimitExceeded: longer than ``MAX_HELLO``.
    """
    message = _handshake_message(data)
    if message is None:
        return None
    hello = _Reader(message)
    hello.take(2 + 32)  # legacy_version, random
    hello.counted(1)  # legacy_session_id
    hello.counted(2)  # cipher_suites
    hello.counted(1)  # legacy_compression_methods
    if hello.done:
        return ()
    extensions = _Reader(hello.counted(2))
    while not extensions.done:
        kind, body = extensions.number(2), extensions.counted(2)
        if kind == _ALPN_EXTENSION:
            return _names(body)
    return ()


def _names(body: bytes) -> tuple[bytes, ...]:
    listed = _Reader(_Reader(body).counted(2))
    names: list[bytes] = []
    while not listed.done:
        names.append(listed.counted(1))
        if len(names) > MAX_PROTOCOLS:
            raise LimitExceeded(f"TLS: more than {MAX_PROTOCOLS} protocols offered")
    return tuple(names)


def _handshake_message(data: bytes) -> bytes | None:
    """The first handshake message, put together from its records."""
    message = bytearray()
    at = 0
    while True:
        if len(message) >= 4:
            if message[0] != _CLIENT_HELLO:
                raise FormatError("TLS: the first message is no ClientHello")
            size = int.from_bytes(message[1:4])
            if size > MAX_HELLO:
                raise LimitExceeded(f"TLS: a first message of {size} bytes, at most {MAX_HELLO}")
            if len(message) >= 4 + size:
                return bytes(message[4 : 4 + size])
        if len(data) - at < 5:
            return None
        if data[at] != TLS_HANDSHAKE:
            raise FormatError("TLS: the first message is interrupted")
        length = int.from_bytes(data[at + 3 : at + 5])
        if not 0 < length <= 2**14:
            raise FormatError("TLS: a record of no or too much length")
        if len(data) - at - 5 < length:
            return None
        message += data[at + 5 : at + 5 + length]
        at += 5 + length
