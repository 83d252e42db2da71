"""The pure part of the guard on arbitrary input: refused, or forwarded as it was read."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cai.errors import CaiError
from tng.config.guard import is_plain_path
from tng.guard.bodies import STRICT, cache_salt, judge, parse_body
from tng.guard.jwt import Jwt, KeySet
from tng.guard.refusals import GuardRefused
from tng.guard.routes import INFERENCE, KNOWN, OTHERS, REFUSED
from tng.guard.usage import EventAnswer, PlainAnswer, Usage

DOCS = Path(__file__).parents[3] / "docs" / "tng-guard.md"
CHAT = KNOWN["/v1/chat/completions"]

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)
NAMES = st.sampled_from(sorted(CHAT.fields | CHAT.ignored | set(REFUSED))) | st.text()


@given(st.binary())
def test_any_bytes_are_refused_or_an_object(data: bytes) -> None:
    with contextlib.suppress(GuardRefused):
        assert isinstance(parse_body(data), dict)


@settings(max_examples=300)
@given(st.dictionaries(NAMES, VALUES))
def test_any_value_is_refused_or_forwarded_as_it_was_read(value: dict[str, Any]) -> None:
    data = json.dumps(value).encode()
    try:
        judged = judge(parse_body(data), CHAT, "salt", STRICT)
    except GuardRefused:
        return
    found = parse_body(judged.data)
    assert found.pop("cache_salt") == "salt"
    if judged.stream:
        found.pop("stream_options")
        value.pop("stream_options", None)
    assert set(found) <= CHAT.fields
    for name, item in found.items():
        assert json.dumps(item) == json.dumps(value[name])


@given(st.text())
def test_any_text_is_refused_or_a_token(text: str) -> None:
    with contextlib.suppress(CaiError):
        Jwt.parse(text)
    with contextlib.suppress(CaiError):
        KeySet.parse(text.encode("utf-8", "replace"))


@given(st.text())
def test_a_plain_path_has_one_spelling(path: str) -> None:
    if is_plain_path(path):
        assert path.isascii()
        assert "//" not in path
        assert "%" not in path
        assert "/../" not in path + "/"


@given(st.lists(st.binary(max_size=40)), st.booleans())
def test_a_stream_passes_whole(parts: list[bytes], drop: bool) -> None:
    watch = EventAnswer(Usage(), drop_usage=drop)
    passed = b"".join(watch.passes(part) for part in parts) + watch.rest()
    assert passed == b"".join(parts)
    plain = PlainAnswer(Usage())
    assert b"".join(plain.passes(part) for part in parts) + plain.rest() == b"".join(parts)


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_only_the_event_of_the_gateway_is_taken_out(cut: int) -> None:
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}\n\n'
    word = b'data: {"choices":[{"text":"\\"usage\\""}],"usage":null}\n\n'
    other = b'data: {"choices":[],"system":"usage"}\r\n\r\n: comment\n\n'
    done = b"data: [DONE]\n\n"
    data = word + other + usage + done
    found = Usage()
    watch = EventAnswer(found, drop_usage=True)
    parts = [data[at : at + cut] for at in range(0, len(data), cut)]
    assert b"".join(watch.passes(part) for part in parts) + watch.rest() == word + other + done
    assert (found.prompt, found.completion, found.told) == (3, 2, True)


@pytest.mark.parametrize("usage", [
    1, "x", [], {"prompt_tokens": -1}, {"prompt_tokens": True}, {"completion_tokens": "9"}, {},
])  # fmt: skip
def test_a_strange_usage_counts_nothing(usage: object) -> None:
    found = Usage()
    found.take(usage)
    assert (found.prompt, found.completion) == (0, 0)


def test_salts_of_kinds_of_callers_never_meet() -> None:
    names = ["token:a", "jwt:a", "key:a", "session:a", "token:b", "token:"]
    assert len({cache_salt(bytes(32), name) for name in names}) == len(names)
    assert cache_salt(bytes(32), "token:a") != cache_salt(b"\x01" * 32, "token:a")


def test_the_documentation_names_every_path_and_refused_member() -> None:
    text = DOCS.read_text()
    for route in (*INFERENCE, *OTHERS):
        assert f"{route.path}`" in text, route.path
    for name in set(REFUSED) - {"media_io_kwargs", "mm_processor_kwargs", "return_mm_kwargs"}:
        assert f"`{name}`" in text or name == "prompt", name
