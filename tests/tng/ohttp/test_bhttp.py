"""Binary HTTP: messages in pieces, and fields that would become something else as HTTP/1.1."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cai.errors import CaiError, FormatError, LimitExceeded
from tng.ohttp.bhttp import (
    MAX_CONTENT_CHUNK,
    MAX_CONTROL,
    MAX_FIELDS,
    Content,
    End,
    Event,
    MessageReader,
    RequestHead,
    ResponseHead,
    encode_content,
    encode_end,
    encode_request,
    encode_response,
)
from tng.ohttp.chunked import encode_varint

FIELDS = ((b"host", b"h"), (b"x-a", b"1"), (b"x-a", b"2"))


def read(data: bytes, *, request: bool = True) -> list[Event]:
    reader = MessageReader(request=request)
    found = list(reader.feed(data))
    assert reader.done
    return found


def raw(
    method: bytes = b"GET", scheme: bytes = b"", authority: bytes = b"", path: bytes = b"/",
    fields: bytes = b"",
) -> bytes:  # fmt: skip
    parts = (method, scheme, authority, path)
    control = b"".join(encode_varint(len(part)) + part for part in parts)
    return b"\x02" + control + fields + b"\x00" + encode_end()


def field(name: bytes, value: bytes) -> bytes:
    return encode_varint(len(name)) + name + encode_varint(len(value)) + value


def test_a_request_is_read_as_written() -> None:
    data = encode_request(b"POST", b"/p?q", FIELDS) + encode_content(b"body") + encode_end()
    assert read(data) == [RequestHead(b"POST", b"/p?q", FIELDS), Content(b"body"), End()]


def test_a_response_is_read_as_written() -> None:
    data = encode_response(404, FIELDS) + encode_end()
    assert read(data, request=False) == [ResponseHead(404, FIELDS), End()]


def test_names_are_written_in_lower_case() -> None:
    data = encode_request(b"GET", b"/", [(b"X-Big", b"V")]) + encode_end()
    assert read(data)[0] == RequestHead(b"GET", b"/", ((b"x-big", b"V"),))


def test_empty_content_is_no_end() -> None:
    assert encode_content(b"") == b""


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=90), max_size=4), st.integers(1, 17))
def test_any_cut_reads_the_same(parts: list[bytes], step: int) -> None:
    data = encode_request(b"POST", b"/", FIELDS)
    data += b"".join(encode_content(part) for part in parts) + encode_end()
    reader = MessageReader(request=True)
    found: list[Event] = []
    for at in range(0, len(data), step):
        found += reader.feed(data[at : at + step])
    assert reader.done
    whole = read(data)
    assert (found[0], found[-1]) == (whole[0], whole[-1])
    assert content(found) == content(whole) == b"".join(parts)


def content(events: list[Event]) -> bytes:
    return b"".join(item.data for item in events if isinstance(item, Content))


def test_content_is_given_as_it_comes() -> None:
    """A long chunk that never ends is never kept."""
    reader = MessageReader(request=True)
    list(reader.feed(encode_request(b"POST", b"/", FIELDS)))
    assert list(reader.feed(encode_varint(MAX_CONTENT_CHUNK) + b"a")) == [Content(b"a")]
    for _ in range(100):
        assert content(list(reader.feed(b"b" * 10_000))) == b"b" * 10_000
    assert len(reader._buffer) == 0


def test_a_head_in_single_bytes_costs_no_more_than_its_length() -> None:
    fields = tuple((b"x%d" % number, b"v" * 400) for number in range(200))
    data = encode_request(b"POST", b"/", fields) + encode_end()
    reader = MessageReader(request=True)
    steps = sum(len(list(reader.feed(bytes([byte])))) for byte in data)
    assert reader.done
    assert steps == 2


def test_every_truncation_leaves_it_undone() -> None:
    data = encode_request(b"POST", b"/", FIELDS) + encode_content(b"abc") + encode_end()
    for size in range(len(data)):
        reader = MessageReader(request=True)
        list(reader.feed(data[:size]))
        assert not reader.done


def test_padding_is_zeros_only() -> None:
    reader = MessageReader(request=True)
    list(reader.feed(raw() + b"\x00\x00"))
    with pytest.raises(FormatError):
        list(reader.feed(b"\x01"))


def test_trailers_are_dropped() -> None:
    data = encode_request(b"GET", b"/", FIELDS) + b"\x00" + field(b"x-t", b"1") + b"\x00"
    assert read(data)[-1] == End()


@pytest.mark.parametrize(
    "data",
    [
        raw(method=b""),
        raw(method=b"GET /x HTTP/1.1\r\nx:"),
        raw(method=b"G\x00T"),
        raw(method=b"CONNECT"),
        raw(scheme=b"ftp"),
        raw(authority=b"other"),
        raw(path=b""),
        raw(path=b"x"),
        raw(path=b"*"),
        raw(path=b"http://other/"),
        raw(path=b"/ HTTP/1.1\r\nx: y"),
        raw(path=b"/a b"),
        raw(path=b"/\x7f"),
        raw(fields=field(b"x y", b"1")),
        raw(fields=field(b"x:", b"1")),
        raw(fields=field(b"X-Upper", b"1")),
        raw(fields=field(b":path", b"/other")),
        raw(fields=field(b"x\r\ny", b"1")),
        raw(fields=field(b"x", b"1\r\ntransfer-encoding: chunked")),
        raw(fields=field(b"x", b"1\ny: 2")),
        raw(fields=field(b"x", b"\x00")),
        raw(fields=field(b"x", b"\x7f")),
        b"\x00" + raw()[1:],
        b"\x01" + raw()[1:],
        b"\x03" + raw()[1:],
        b"\x07" + raw()[1:],
    ],
)
def test_what_would_be_something_else_as_http1_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError):
        read(data)


@pytest.mark.parametrize("status", [0, 99, 100, 101, 103, 199, 600, 999, 70000])
def test_only_final_statuses_are_read(status: int) -> None:
    data = b"\x03" + encode_varint(status) + b"\x00" + encode_end()
    with pytest.raises(FormatError):
        read(data, request=False)


def test_too_many_fields_are_refused() -> None:
    with pytest.raises(LimitExceeded):
        read(raw(fields=field(b"x", b"") * (MAX_FIELDS + 1)))


@pytest.mark.parametrize(
    "data",
    [
        b"\x02" + encode_varint(MAX_CONTROL + 1),
        b"\x02" + encode_varint(2**60),
        raw()[:-3] + encode_varint(MAX_CONTROL + 1),
        raw()[:-2] + encode_varint(MAX_CONTENT_CHUNK + 1),
    ],
)
def test_an_announced_length_beyond_the_limit_is_refused_at_once(data: bytes) -> None:
    with pytest.raises(LimitExceeded):
        list(MessageReader(request=True).feed(data))


def test_a_section_of_many_large_fields_is_refused() -> None:
    large = field(b"x", b"y" * 60_000)
    with pytest.raises(LimitExceeded):
        list(MessageReader(request=True).feed(raw(fields=large * 6)))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_end_in_our_errors(data: bytes, request: bool) -> None:
    try:
        list(MessageReader(request=request).feed(data))
    except CaiError:
        return
