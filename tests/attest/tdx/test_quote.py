"""The strict quote parser: exact framing, no leaked built-in exceptions."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cai.attest.tdx.quote import (
    BODY_LAYOUT,
    HEADER_SIZE,
    MAX_QUOTE,
    TD10,
    TD15,
    Quote,
    parse_header,
    parse_quote,
)
from cai.errors import FormatError, LimitExceeded

BODY_END = HEADER_SIZE + 584
LENGTH_AT = BODY_END
SECTION_AT = LENGTH_AT + 4


def section(
    *, outer: int = 6, inner: int = 5, outer_extra: int = 0, chain_extra: int = 0,
    auth: bytes = b"a" * 32, chain: bytes = b"certificates",
) -> bytes:
    wrapped = bytes(384) + bytes(64) + len(auth).to_bytes(2, "little") + auth
    wrapped += inner.to_bytes(2, "little")
    wrapped += (len(chain) + chain_extra).to_bytes(4, "little") + chain
    size = (len(wrapped) + outer_extra).to_bytes(4, "little")
    return bytes(64) + bytes(64) + outer.to_bytes(2, "little") + size + wrapped


def quote(
    *, version: int = 4, key_type: int = 2, tee: int = 0x81, body: bytes = bytes(584),
    vendor: str = "939a7233f79c4ca9940a0db3957f0607", descriptor: bytes = b"",
    length_extra: int = 0, after: bytes = b"", **parts: Any,
) -> bytes:
    header = version.to_bytes(2, "little") + key_type.to_bytes(2, "little")
    header += tee.to_bytes(4, "little") + bytes(4) + bytes.fromhex(vendor) + bytes(20)
    tail = section(**parts)
    length = (len(tail) + length_extra).to_bytes(4, "little")
    return header + descriptor + body + length + tail + after


def descriptor(kind: int, size: int) -> bytes:
    return kind.to_bytes(2, "little") + size.to_bytes(4, "little")


def test_every_field_has_its_place() -> None:
    body = bytes(range(256)) * 2 + bytes(range(72))
    parsed = parse_quote(quote(body=body, after=bytes(70)))
    assert parsed.body_type == TD10
    assert parsed.body["tcb_svn"] == body[:16]
    assert parsed.body["td_attributes"] == body[120:128]
    assert parsed.body["mr_td"] == body[136:184]
    assert parsed.body["rtmr_3"] == body[472:520]
    assert parsed.body["report_data"] == body[520:584]
    assert b"".join(parsed.body.values()) == body
    assert parsed.pck_chain == b"certificates"
    assert parsed.auth_data == b"a" * 32
    assert len(parsed.signed) == BODY_END
    assert len(parsed.data) == len(quote(body=body))


def test_version_5_bodies() -> None:
    for kind, size in ((TD10, 584), (TD15, 648)):
        body = bytes(reversed(range(216))) * 3
        data = quote(version=5, descriptor=descriptor(kind, size), body=body[:size])
        parsed = parse_quote(data)
        assert parsed.body_type == kind
        assert sum(map(len, parsed.body.values())) == size
        assert len(parsed.signed) == HEADER_SIZE + 6 + size
    assert parsed.body["mr_service_td"] == body[600:648]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "ends inside version"),
        (b"\x04", "ends inside version"),
        (quote()[:47], "ends inside user_data"),
        (quote()[:600], "ends inside"),
        (quote()[:SECTION_AT - 1], "ends inside signature length"),
        (quote()[:-1], "ends inside signature section"),
        (quote(version=0), "version 0"),
        (quote(version=3), "version 3"),
        (quote(version=6), "version 6"),
        (quote(key_type=3), "key type 3"),
        (quote(tee=0), "TEE type 0x0"),
        (quote(tee=0x82), "TEE type 0x82"),
        (quote(vendor="00" * 16), "QE vendor"),
        (quote(length_extra=1), "ends inside signature section"),
        (quote(length_extra=1, after=bytes(8)), "does not fill"),
        (quote(length_extra=-1), "zero padding"),
        (quote(length_extra=2**31), "ends inside signature section"),
        (quote(outer=7), "outer certification data type 7"),
        (quote(outer=5), "outer certification data type 5"),
        (quote(outer_extra=1), "does not fill"),
        (quote(outer_extra=-1), "does not fill"),
        (quote(inner=4), "inner certification data type 4"),
        (quote(chain_extra=1), "certificate chain does not fill"),
        (quote(chain_extra=-1), "certificate chain does not fill"),
        (quote(after=b"\x00" * 60 + b"\x01"), "zero padding"),
        (quote(after=b"x"), "zero padding"),
        (quote(version=5), "body type 0"),
        (quote(version=5, descriptor=descriptor(1, 384)), "body type 1"),
        (quote(version=5, descriptor=descriptor(4, 885)), "body type 4"),
        (quote(version=5, descriptor=descriptor(3, 584)), "body size 584"),
        (quote(version=5, descriptor=descriptor(2, 648)), "body size 648"),
    ],
)
def test_refused(data: bytes, text: str) -> None:
    with pytest.raises(FormatError, match=text):
        parse_quote(data)


def test_a_quote_has_a_limit() -> None:
    parse_quote(quote().ljust(MAX_QUOTE, b"\x00"))
    with pytest.raises(LimitExceeded):
        parse_quote(quote().ljust(MAX_QUOTE + 1, b"\x00"))


def test_header_alone_is_read_without_judging() -> None:
    assert parse_header(quote(version=3, tee=0)[:HEADER_SIZE]).version == 3
    with pytest.raises(FormatError):
        parse_header(bytes(47))


def test_layouts_have_the_documented_sizes() -> None:
    sizes = {kind: sum(size for _, size in layout) for kind, layout in BODY_LAYOUT.items()}
    assert sizes == {TD10: 584, TD15: 648}


def outcome(data: bytes) -> Quote | None:
    try:
        return parse_quote(data)
    except (FormatError, LimitExceeded):
        return None


@given(st.binary(max_size=2000))
def test_arbitrary_bytes_leak_nothing(data: bytes) -> None:
    assert outcome(data) is None


@given(st.integers(0, len(quote()) - 1), st.binary(min_size=1, max_size=9), st.booleans())
def test_altered_quotes_leak_nothing(at: int, patch: bytes, cut: bool) -> None:
    data = quote()
    altered = data[:at] + patch + (b"" if cut else data[at + len(patch) :])
    parsed = outcome(altered)
    if parsed is not None:
        rest = altered[len(parsed.data) :]
        assert not any(rest)
