"""ttrpc, the small RPC of containerd and of Trustee's guest components, as pure bytes.

A frame is ``length u32 BE ‖ stream id u32 BE ‖ type u8 ‖ flags u8 ‖ payload``; the payload of a
request is protobuf ``Request{1 service, 2 method, 3 payload, 4 timeout_nano}``, that of a response
``Response{1 Status{1 code, 2 message}, 2 payload}``. Client stream ids are odd. Layout:
containerd/ttrpc PROTOCOL.md; the attestation agent's use of it: reference "TNG" §2.2.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from cai.errors import FormatError, LimitExceeded

HEADER_SIZE = 10
"""Bytes in front of a payload."""

MAX_MESSAGE = 4 * 1024 * 1024
"""Largest payload, bytes (containerd's own limit)."""

MAX_SERVICE_NAME = 256
"""Longest service or method name, bytes."""

_HEADER = struct.Struct(">IIBB")


class MessageType(IntEnum):
    """Kinds of frame that are used."""

    REQUEST = 1
    RESPONSE = 2


class Status(IntEnum):
    """gRPC status codes that the agent answers with."""

    OK = 0
    INVALID_ARGUMENT = 3
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14


@dataclass(frozen=True, slots=True)
class Header:
    """The ten bytes in front of a payload."""

    length: int
    stream: int
    type: int

    def encode(self) -> bytes:
        """The header as bytes, flags zero."""
        return _HEADER.pack(self.length, self.stream, self.type, 0)

    @classmethod
    def decode(cls, data: bytes) -> Header:
        """Parse ten bytes.

        Raises:
            FormatError: not ten bytes.
            LimitExceeded: the payload would be longer than ``MAX_MESSAGE``.
        """
        if len(data) != HEADER_SIZE:
            raise FormatError(f"ttrpc header of {len(data)} bytes")
        length, stream, kind, _flags = _HEADER.unpack(data)
        if length > MAX_MESSAGE:
            raise LimitExceeded(f"ttrpc payload of {length} bytes, at most {MAX_MESSAGE}")
        return cls(length, stream, kind)


@dataclass(frozen=True, slots=True)
class Request:
    """One call."""

    service: str
    method: str
    payload: bytes
    timeout_nano: int = 0

    def encode(self) -> bytes:
        """The request's protobuf bytes."""
        parts = [
            bytes_field(1, self.service.encode()),
            bytes_field(2, self.method.encode()),
            bytes_field(3, self.payload),
        ]
        if self.timeout_nano:
            parts.append(varint_field(4, self.timeout_nano))
        return b"".join(parts)

    @classmethod
    def decode(cls, data: bytes) -> Request:
        """Parse protobuf bytes; unknown fields are skipped, as protobuf demands.

        Raises:
            FormatError: not a request.
        """
        fields = dict(read_fields(data))
        return cls(
            service=_text(fields.get(1, b"")),
            method=_text(fields.get(2, b"")),
            payload=_bytes(fields.get(3, b"")),
            timeout_nano=_integer(fields.get(4, 0)),
        )


@dataclass(frozen=True, slots=True)
class Response:
    """One answer: a status, and a payload when it is OK."""

    status: int
    message: str
    payload: bytes

    def encode(self) -> bytes:
        """The response's protobuf bytes."""
        parts = []
        if self.status or self.message:
            status = varint_field(1, self.status) + bytes_field(2, self.message.encode())
            parts.append(bytes_field(1, status))
        parts.append(bytes_field(2, self.payload))
        return b"".join(parts)

    @classmethod
    def decode(cls, data: bytes) -> Response:
        """Parse protobuf bytes.

        Raises:
            FormatError: not a response.
        """
        fields = dict(read_fields(data))
        status = dict(read_fields(_bytes(fields.get(1, b""))))
        return cls(
            status=_integer(status.get(1, 0)),
            message=_bytes(status.get(2, b"")).decode("utf-8", "replace"),
            payload=_bytes(fields.get(2, b"")),
        )


def varint_field(number: int, value: int) -> bytes:
    """A protobuf field of wire type 0."""
    return _varint(number << 3) + _varint(value)


def bytes_field(number: int, value: bytes) -> bytes:
    """A protobuf field of wire type 2."""
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def read_fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Walk the fields of a protobuf message.

    Raises:
        FormatError: truncated, or a wire type other than varint, 64-bit, bytes or 32-bit.
    """
    offset = 0
    while offset < len(data):
        key, offset = _read_varint(data, offset)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, offset = _read_varint(data, offset)
            yield number, value
            continue
        if wire == 2:
            size, offset = _read_varint(data, offset)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise FormatError(f"protobuf wire type {wire}")
        if size > len(data) - offset:
            raise FormatError("protobuf field is truncated")
        yield number, data[offset : offset + size]
        offset += size


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: bytes, offset: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if offset >= len(data):
            raise FormatError("protobuf varint is truncated")
        byte = data[offset]
        offset += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, offset
    raise FormatError("protobuf varint is longer than ten bytes")


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise FormatError("protobuf field is not bytes")
    return value


def _text(value: int | bytes) -> str:
    data = _bytes(value)
    if len(data) > MAX_SERVICE_NAME:
        raise FormatError("ttrpc name is too long")
    try:
        return data.decode("ascii")
    except UnicodeDecodeError as error:
        raise FormatError("ttrpc name is not ASCII") from error


def _integer(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise FormatError("protobuf field is not a number")
    return value
