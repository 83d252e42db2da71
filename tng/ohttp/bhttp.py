"""Binary HTTP (RFC 9292), indeterminate length, read and written as a stream.

TNG leaves scheme and authority empty; the host travels as a header field. Field names and values
are checked here, because they become HTTP/1.1 text at the other end: what could end a line or a
name there never gets that far.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

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

_Part = TypeVar("_Part")
Parsing = Generator[None, None, _Part]
"""A part of a message that is being read; it yields wherever more bytes are needed."""


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


class MessageReader:
    """Reads one message as its bytes arrive, each byte once.

    Args:
        request: what is expected.
    """

    def __init__(self, *, request: bool) -> None:
        self._request = request
        self._buffer = bytearray()
        self._at = 0
        self._parser = self._parse()
        self.done = False

    def feed(self, data: bytes) -> Iterator[Event]:
        """What these bytes complete; content is given as it comes.

        Raises:
            FormatError, LimitExceeded: it is no such message.
        """
        self._buffer += data
        while (event := next(self._parser, None)) is not None:
            yield event
        del self._buffer[: self._at]
        self._at = 0

    def _parse(self) -> Iterator[Event | None]:
        """The whole message; ``None`` wherever more bytes are needed."""
        framing = yield from self._number()
        expected = REQUEST_FRAMING if self._request else RESPONSE_FRAMING
        if framing != expected:
            raise FormatError(f"binary HTTP: framing {framing}, expected {expected}")
        yield (yield from (self._request_head() if self._request else self._response_head()))
        while size := (yield from self._number()):
            if size > MAX_CONTENT_CHUNK:
                raise LimitExceeded(f"binary HTTP: a content chunk of {size} bytes")
            while size:
                data = bytes(self._buffer[self._at : self._at + size])
                self._at += len(data)
                size -= len(data)
                yield Content(data) if data else None
        # Trailers are read and dropped: HTTP/1.1 clients of models know none.
        yield from self._fields()
        self.done = True
        yield End()
        while True:
            # Padding (RFC 9292 §3.8) is zeros.
            if any(memoryview(self._buffer)[self._at :]):
                raise FormatError("binary HTTP: bytes after the message")
            self._at = len(self._buffer)
            yield None

    def _request_head(self) -> Parsing[RequestHead]:
        method = yield from self._text()
        scheme = yield from self._text()
        authority = yield from self._text()
        path = yield from self._text()
        if not _TOKEN.fullmatch(method) or method == b"CONNECT":
            raise FormatError("binary HTTP: not a method that can be carried")
        if scheme not in (b"", b"http", b"https") or authority:
            raise FormatError("binary HTTP: scheme or authority where none is expected")
        if not _TARGET.fullmatch(path) or not path.startswith(b"/"):
            raise FormatError("binary HTTP: not a path")
        return RequestHead(method, path, (yield from self._fields()))

    def _response_head(self) -> Parsing[ResponseHead]:
        status = yield from self._number()
        if not 200 <= status <= 599:
            raise FormatError(f"binary HTTP: status {status}")
        return ResponseHead(status, (yield from self._fields()))

    def _fields(self) -> Parsing[tuple[tuple[bytes, bytes], ...]]:
        fields: list[tuple[bytes, bytes]] = []
        total = 0
        while name := (yield from self._text()):
            value = yield from self._text()
            total += len(name) + len(value)
            if len(fields) == MAX_FIELDS or total > MAX_SECTION:
                raise LimitExceeded("binary HTTP: too many fields, or too long ones")
            if not _TOKEN.fullmatch(name) or name != name.lower():
                raise FormatError("binary HTTP: not a field name")
            if not _VALUE.fullmatch(value):
                raise FormatError("binary HTTP: not a field value")
            fields.append((name, value.strip(b" \t")))
        return tuple(fields)

    def _text(self) -> Parsing[bytes]:
        size = yield from self._number()
        if size > MAX_CONTROL:
            raise LimitExceeded(f"binary HTTP: a text of {size} bytes, at most {MAX_CONTROL}")
        while len(self._buffer) - self._at < size:
            yield None
        data = bytes(self._buffer[self._at : self._at + size])
        self._at += size
        return data

    def _number(self) -> Parsing[int]:
        while (found := decode_varint(self._buffer, self._at)) is None:
            yield None
        value, self._at = found
        return value


def _section(fields: Fields) -> bytes:
    lines = (_counted(name.lower()) + _counted(value) for name, value in fields)
    return b"".join(lines) + b"\x00"


def _counted(data: bytes) -> bytes:
    return encode_varint(len(data)) + data
