"""The small part of CBOR: what is encoded comes back, everything else is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cai.errors import CaiError, FormatError, LimitExceeded
from tng.stock.cbor import MAX_DEPTH, MAX_ITEMS, Tagged, decode, encode


@pytest.mark.parametrize(
    ("value", "data"),
    [
        # RFC 8949, appendix A
        (0, "00"),
        (23, "17"),
        (24, "1818"),
        (1000, "1903e8"),
        (1000000, "1a000f4240"),
        (2**64 - 1, "1bffffffffffffffff"),
        (b"", "40"),
        (b"\x01\x02\x03\x04", "4401020304"),
        ("", "60"),
        ("ü", "62c3bc"),
        ([], "80"),
        ([1, [2, 3], [4, 5]], "8301820203820405"),
        ({"a": 1, "b": [2, 3]}, "a26161016162820203"),
        (None, "f6"),
        (Tagged(32, "http://a.b"), "d8206a687474703a2f2f612e62"),
        (Tagged(0xC0C000, [b"x", b""]), "da00c0c00082417840"),
    ],
)
def test_known_answers(value: object, data: str) -> None:
    assert encode(value).hex() == data  # type: ignore[arg-type]
    assert decode(bytes.fromhex(data)) == value


@pytest.mark.parametrize(
    "data",
    [
        "",  # nothing
        "18",  # truncated number
        "1b00",
        "42ff",  # truncated string
        "5bffffffffffffffff",  # a string of 2^64-1 bytes
        "81",  # truncated array
        "a161",  # truncated map
        "a16161",
        "c0",  # a tag of nothing
        "20",  # negative
        "f4", "f5", "f7", "fb3ff0000000000000",  # booleans, undefined, floats
        "5f4101ff", "7f6161ff", "9f01ff", "bf616101ff",  # indefinite lengths
        "0000",  # bytes after the value
        "61ff",  # not UTF-8
        "a2616101616102",  # a key twice
        "a10101", "a1414101",  # keys that are no text
        "1c", "1d", "1e", "1f", "ff",  # reserved
    ],
)  # fmt: skip
def test_everything_else_is_refused(data: str) -> None:
    with pytest.raises(FormatError):
        decode(bytes.fromhex(data))


@pytest.mark.parametrize(
    "data",
    [
        b"\x98" + bytes([MAX_ITEMS + 1]) + bytes(MAX_ITEMS + 1),
        b"\x9b" + b"\xff" * 8,
        b"\xbb" + b"\xff" * 8,
        b"\x81" * (MAX_DEPTH + 1) + b"\x00",
        b"\xc1" * 5000 + b"\x00",
    ],
)
def test_limits(data: bytes) -> None:
    with pytest.raises(LimitExceeded):
        decode(data)


@pytest.mark.parametrize("value", [-1, True, 2**64])
def test_what_cannot_be_encoded(value: int) -> None:
    with pytest.raises(FormatError):
        encode(value)


@given(st.binary(max_size=300))
def test_any_bytes_are_a_value_or_our_error(data: bytes) -> None:
    try:
        value = decode(data)
    except CaiError:
        return
    assert decode(encode(value)) == value
