"""Binary HTTP (RFC 9292), indeterminate length, read and written as a stream.

TNG leaves scheme and authority empty; the host travels as a header field. Field names and values
are checked here, because they become HTTP/1.1 text at the other end: what could end a line or a
name there never gets that far.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from cai.errors import FormatError, LimitExceeded
from tng.ohttp.chunked import decode_varint, encode_varint

REQUEST_FRAMING = 2
"""Framing indicator of an indeterminate-length request."""

RESPONSE_FRAMING = 3
"""Framing indicator of an indeterminate-length response."""

MAX_CONTROL = 64 * 1024
"""Longest path, method, name or value, bytes."""

MAX_FIELDS = 256
"""Most field lines of one section."""

MAX_SECTION = 256 * 1024
"""Longest field section, bytes."""

MAX_CONTENT_CHUNK = 16 * 1024 * 1024
"""Longest content chunk, bytes."""

Fields = Sequence[tuple[bytes, bytes]]

_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")
_TARGET = re.compile(rb"[\x21-\x7e\x80-\xff]+")


@dataclass(frozen=True, slots=True)
class RequestHead:
    """A request's beginning; the path carries the query."""

    method: bytes
    path: bytes
    fields: tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """A final response's beginning."""

    status: int
    fields: tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True, slots=True)
class Content:
    """Some bytes of the body."""

    data: bytes


@dataclass(frozen=True, slots=True)
class End:
    """The message is whole."""


Event = RequestHead | ResponseHead | Content | End


def encode_request(method: bytes, path: bytes, fields: Fields) -> bytes:
    """Framing, control data and fields of a request."""
    control = b"".join(_counted(part) for part in (method, b"", b"", path))
    return encode_varint(REQUEST_FRAMING) + control + _section(fields)


def encode_response(status: int, fields: Fields) -> bytes:
    """Framing, status and fields of a response."""
    return encode_varint(RESPONSE_FRAMING) + encode_varint(status) + _section(fields)


def encode_content(data: bytes) -> bytes:
    """One content chunk; nothing for none, since a length of 0 ends the content."""
    return _counted(data) if data else b""


def encode_end() -> bytes:
    """The end of the content, and an empty trailer section."""
    return b"\x00\x00"


class _State(Enum):
    HEAD = auto()
    CONTENT = auto()
    TRAILER = auto()
    DONE = auto()


class MessageReader:
    """Reads one message as its bytes arrive.

    Args:
        request: what is expected.
    """

    def __init__(self, *, request: bool) -> None:
        self._request = request
        self._buffer = bytearray()
        self._state = _State.HEAD

    @property
    def done(self) -> bool:
        """Whether the message is whole."""
        return self._state is _State.DONE

    def feed(self, data: bytes) -> Iterator[Event]:
        """What these bytes complete.

        Raises:
            FormatError, LimitExceeded: it is no such message.
        """
        self._buffer += data
        while (event := self._next()) is not None:
            yield event
        if len(self._buffer) > MAX_SECTION + MAX_CONTENT_CHUNK:
            raise LimitExceeded("binary HTTP: a part is too long")

    def _next(self) -> Event | None:
        if self._state is _State.HEAD:
            return self._head()
        if self._state is _State.CONTENT:
            found = decode_varint(self._buffer)
            if found is None:
                return None
            size, start = found
            if size == 0:
                del self._buffer[:start]
                self._state = _State.TRAILER
                return self._next()
            if size > MAX_CONTENT_CHUNK:
                raise LimitExceeded(f"binary HTTP: a content chunk of {size} bytes")
            if len(self._buffer) < start + size:
                return None
            data = bytes(self._buffer[start : start + size])
            del self._buffer[: start + size]
            return Content(data)
        if self._state is _State.TRAILER:
            # Trailers are read and dropped: HTTP/1.1 clients of models know none.
            found_fields = _read_section(self._buffer, 0)
            if found_fields is None:
                return None
            del self._buffer[: found_fields[1]]
            self._state = _State.DONE
            return End()
        # Padding (RFC 9292 §3.8) is zeros.
        if any(self._buffer):
            raise FormatError("binary HTTP: bytes after the message")
        self._buffer.clear()
        return None

    def _head(self) -> Event | None:
        framing = decode_varint(self._buffer)
        if framing is None:
            return None
        expected = REQUEST_FRAMING if self._request else RESPONSE_FRAMING
        if framing[0] != expected:
            raise FormatError(f"binary HTTP: framing {framing[0]}, expected {expected}")
        return self._request_head(framing[1]) if self._request else self._response_head(framing[1])

    def _request_head(self, at: int) -> Event | None:
        parts: list[bytes] = []
        for _ in range(4):
            found = _read_counted(self._buffer, at)
            if found is None:
                return None
            part, at = found
            parts.append(part)
        fields = _read_section(self._buffer, at)
        if fields is None:
            return None
        method, scheme, authority, path = parts
        if not _TOKEN.fullmatch(method) or method == b"CONNECT":
            raise FormatError("binary HTTP: not a method that can be carried")
        if scheme not in (b"", b"http", b"https") or authority:
            raise FormatError("binary HTTP: scheme or authority where none is expected")
        if not _TARGET.fullmatch(path) or not path.startswith(b"/"):
            raise FormatError("binary HTTP: not a path")
        return self._took(RequestHead(method, path, fields[0]), fields[1])

    def _response_head(self, at: int) -> Event | None:
        status = decode_varint(self._buffer, at)
        if status is None:
            return None
        if not 200 <= status[0] <= 599:
            raise FormatError(f"binary HTTP: status {status[0]}")
        fields = _read_section(self._buffer, status[1])
        if fields is None:
            return None
        return self._took(ResponseHead(status[0], fields[0]), fields[1])

    def _took(self, event: Event, end: int) -> Event:
        del self._buffer[:end]
        self._state = _State.CONTENT
        return event


def _section(fields: Fields) -> bytes:
    lines = (_counted(name.lower()) + _counted(value) for name, value in fields)
    return b"".join(lines) + b"\x00"


def _counted(data: bytes) -> bytes:
    return encode_varint(len(data)) + data


def _read_counted(data: bytearray, at: int) -> tuple[bytes, int] | None:
    found = decode_varint(data, at)
    if found is None:
        return None
    size, start = found
    if size > MAX_CONTROL:
        raise LimitExceeded(f"binary HTTP: a text of {size} bytes, at most {MAX_CONTROL}")
    if len(data) < start + size:
        return None
    return bytes(data[start : start + size]), start + size


def _read_section(
    data: bytearray, at: int
) -> tuple[tuple[tuple[bytes, bytes], ...], int] | None:
    fields: list[tuple[bytes, bytes]] = []
    begin = at
    while True:
        name = _read_counted(data, at)
        if name is None:
            break
        if not name[0]:
            return tuple(fields), name[1]
        value = _read_counted(data, name[1])
        if value is None:
            break
        if not _TOKEN.fullmatch(name[0]) or name[0] != name[0].lower():
            raise FormatError("binary HTTP: not a field name")
        if not _VALUE.fullmatch(value[0]):
            raise FormatError("binary HTTP: not a field value")
        fields.append((name[0], value[0].strip(b" \t")))
        at = value[1]
        if len(fields) > MAX_FIELDS or at - begin > MAX_SECTION:
            raise LimitExceeded("binary HTTP: too many fields")
    if len(data) - begin > MAX_SECTION:
        raise LimitExceeded("binary HTTP: a field section is too long")
    return None
