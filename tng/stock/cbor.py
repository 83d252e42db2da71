"""The small part of CBOR (RFC 8949) that RATS-TLS certificates use.

Definite lengths, unsigned integers, byte and text strings, arrays, maps with text keys, tags and
null. Anything else is refused, so a parser of evidence has nothing to misread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cai.errors import FormatError, LimitExceeded

MAX_ITEMS = 64
"""Most members of one array or map."""

MAX_DEPTH = 8
"""Deepest nesting."""

_NULL: Final = 0xF6


@dataclass(frozen=True, slots=True)
class Tagged:
    """A tagged value."""

    tag: int
    value: Value


Value = int | bytes | str | None | list["Value"] | dict[str, "Value"] | Tagged
"""What is encoded and decoded."""


def encode(value: Value) -> bytes:
    """A value as CBOR, maps in their own order.

    Raises:
        FormatError: a negative number, or a kind that is not used.
    """
    if value is None:
        return bytes([_NULL])
    if isinstance(value, Tagged):
        return _head(6, value.tag) + encode(value.value)
    if isinstance(value, bytes):
        return _head(2, len(value)) + value
    if isinstance(value, str):
        text = value.encode("utf-8")
        return _head(3, len(text)) + text
    if isinstance(value, list):
        return _head(4, len(value)) + b"".join(map(encode, value))
    if isinstance(value, dict):
        pairs = (encode(name) + encode(item) for name, item in value.items())
        return _head(5, len(value)) + b"".join(pairs)
    if isinstance(value, bool) or value < 0:
        raise FormatError("CBOR: only unsigned numbers are used")
    return _head(0, value)


def decode(data: bytes) -> Value:
    """The one value in ``data``.

    Raises:
        FormatError: truncated, trailing bytes, a duplicate key, or a kind that is not used.
        LimitExceeded: too deep, or too many members.
    """
    value, end = _decode(data, 0, 0)
    if end != len(data):
        raise FormatError("CBOR: bytes after the value")
    return value


def _head(major: int, number: int) -> bytes:
    if number < 24:
        return bytes([major << 5 | number])
    for code, size in ((24, 1), (25, 2), (26, 4), (27, 8)):
        if number < 1 << 8 * size:
            return bytes([major << 5 | code]) + number.to_bytes(size)
    raise FormatError("CBOR: a number of more than 64 bits")


def _decode(data: bytes, at: int, depth: int) -> tuple[Value, int]:
    if depth > MAX_DEPTH:
        raise LimitExceeded(f"CBOR: deeper than {MAX_DEPTH}")
    if at >= len(data):
        raise FormatError("CBOR: truncated")
    if data[at] == _NULL:
        return None, at + 1
    major, number, at = _read_head(data, at)
    if major == 0:
        return number, at
    if major in (2, 3):
        if number > len(data) - at:
            raise FormatError("CBOR: truncated string")
        raw = data[at : at + number]
        return (raw if major == 2 else _text(raw)), at + number
    if major == 6:
        inner, at = _decode(data, at, depth + 1)
        return Tagged(number, inner), at
    if major in (4, 5) and number > MAX_ITEMS:
        raise LimitExceeded(f"CBOR: more than {MAX_ITEMS} members")
    if major == 4:
        items: list[Value] = []
        for _ in range(number):
            item, at = _decode(data, at, depth + 1)
            items.append(item)
        return items, at
    if major == 5:
        members: dict[str, Value] = {}
        for _ in range(number):
            name, at = _decode(data, at, depth + 1)
            if not isinstance(name, str) or name in members:
                raise FormatError("CBOR: a key that is no text, or twice there")
            members[name], at = _decode(data, at, depth + 1)
        return members, at
    raise FormatError(f"CBOR: major type {major} is not used here")


def _read_head(data: bytes, at: int) -> tuple[int, int, int]:
    major, short = data[at] >> 5, data[at] & 31
    if short < 24:
        return major, short, at + 1
    size = {24: 1, 25: 2, 26: 4, 27: 8}.get(short)
    if size is None or at + 1 + size > len(data):
        raise FormatError("CBOR: truncated or indefinite length")
    return major, int.from_bytes(data[at + 1 : at + 1 + size]), at + 1 + size


def _text(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError("CBOR: a text is not UTF-8") from error
