"""RFC 8785 as we write and demand it."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import suppress
from enum import IntEnum, StrEnum
from hashlib import sha384

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cai import jcs
from cai.errors import CaiError, FormatError, LimitExceeded

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-jcs.MAX_INTEGER, jcs.MAX_INTEGER) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


def test_trustee_constant() -> None:
    digest = sha384(jcs.canonical({"b": 1, "a": "test", "c": {"d": "e"}})).hexdigest()
    assert digest == (
        "e71ce8e70d814ba6639c3612ebee0ff1f76f650f8dbb5e47157e0f3f525cd22c"
        "4597480a186427c813ca941da78870c3"
    )


def test_members_sort_by_utf16_code_units() -> None:
    """RFC 8785 §3.2.3: U+1F600 is D83D DE00 and therefore sorts before U+FB33."""
    names = ["\u20ac", "\r", "\ufb33", "1", "\U0001f600", "\u0080", "\u00f6"]
    expected = ["\r", "1", "\u0080", "\u00f6", "\u20ac", "\U0001f600", "\ufb33"]
    value = jcs.parse(jcs.canonical(dict.fromkeys(names)), what="x", limit=1000)
    assert list(value) == expected


def test_string_escapes() -> None:
    """RFC 8785 §3.2.2.2, its own example."""
    text = "\u20ac$\u000f\u000aA'B\"\\\\\"/"
    assert jcs.canonical(text) == b'"\xe2\x82\xac$\\u000f\\nA\'B\\"\\\\\\\\\\"/"'


@given(VALUES)
def test_round_trip(value: object) -> None:
    data = jcs.canonical(value)
    assert jcs.parse_canonical(data, what="value", limit=len(data)) == value


@given(VALUES)
def test_both_writers_agree(value: object) -> None:
    out: list[str] = []
    jcs._write(value, out, 0)
    assert jcs.canonical(value) == "".join(out).encode()


class Odd(StrEnum):
    MEMBER = "text"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Odd.MEMBER, b'"text"'),
        ({Odd.MEMBER: Odd.MEMBER}, b'{"text":"text"}'),
        (OrderedDict(b=1, a=2), b'{"a":2,"b":1}'),
        ((1, [True, None]), b"[1,[true,null]]"),
        (IntEnum("Few", "ONE").ONE, b"1"),  # type: ignore[attr-defined]
    ],
)
def test_kinds_that_are_not_quite_json(value: object, expected: bytes) -> None:
    assert jcs.canonical(value) == expected


def test_the_deepest_value_is_written_and_one_more_is_not() -> None:
    value: object = 1
    for _ in range(jcs.MAX_DEPTH):
        value = [value]
    assert jcs.canonical(value) == b"[" * jcs.MAX_DEPTH + b"1" + b"]" * jcs.MAX_DEPTH
    with pytest.raises(FormatError):
        jcs.canonical([value])


@pytest.mark.parametrize(
    "value", [1.5, 2**53, {1: "x"}, "\ud800", {"\ud800": 1}, b"bytes", {"a": {1, 2}}]
)
def test_values_without_a_canonical_form(value: object) -> None:
    with pytest.raises(FormatError):
        jcs.canonical(value)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b'{"a":1,"a":2}', b"1.0", b"1e3", b"NaN", b"Infinity", b"9007199254740993",
        b"\xff", b'{"a":1} x', b"123456789012345678901234567890", b"-" + b"9" * 5000,
    ],
)
def test_refused_input(data: bytes) -> None:
    with pytest.raises(FormatError):
        jcs.parse(data, what="input", limit=10_000)


@pytest.mark.parametrize("data", [b' {"a":1}', b'{"b":1,"a":2}', b'{"a":"\\u0041"}', b"-0"])
def test_other_spellings_are_not_canonical(data: bytes) -> None:
    with pytest.raises(FormatError, match="canonical"):
        jcs.parse_canonical(data, what="input", limit=100)


def test_limits() -> None:
    with pytest.raises(LimitExceeded):
        jcs.parse(b"[]", what="input", limit=1)
    with pytest.raises(LimitExceeded):
        jcs.parse(b"[" * 65 + b"]" * 65, what="input", limit=1000)
    with pytest.raises(LimitExceeded):
        jcs.parse(b"[" * 100_000, what="input", limit=200_000)
    assert jcs.parse(b"[" * 64 + b"]" * 64, what="input", limit=1000)


@given(st.binary(max_size=60))
def test_garbage_never_leaks_a_builtin_exception(data: bytes) -> None:
    with suppress(CaiError):
        jcs.parse(data, what="input", limit=100)
