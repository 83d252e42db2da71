"""Bytes from outside become values or errors of ours, never anything else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cai import jcs
from cai.errors import CaiError
from kbs.policy.names import PolicyName
from kbs.policy.pool import RegoPool
from kbs.policy.reference_keys import ReferenceKey, SignedBundle
from kbs.policy.reference_store import ReferenceName
from kbs.policy.references import Bundle, parse_message, parse_time
from kbs.policy.rego import RegoPolicy
from kbs.policy.store import parse_binding
from kbs.policy.vector import LEAST, MOST, parse_vector, status_of

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner,
                                                                max_size=3),
    max_leaves=8,
)  # fmt: skip
PIECES = st.sampled_from(
    [
        "package policy\n", "import rego.v1\n", "default allow := false\n", "allow if ", "{", "}",
        "(", ")", "[", "]", "x", " := ", "=", "|", "some ", " in ", "every ", "input", ".", "data",
        '"', "`", "\\", "#", "\n", "1", "opa.runtime()", "with ", "not ", "else", "query_reference",
        "query_reference_value(", "_", ":", ",", ";", "\x00", "é", "$", "contains ", "as ",
    ]
)  # fmt: skip


@pytest.fixture(scope="module")
def pool() -> Iterator[RegoPool]:
    pool = RegoPool()
    yield pool
    pool.close()


@given(st.binary(max_size=200))
def test_bytes(data: bytes) -> None:
    for parse in (Bundle.parse, SignedBundle.parse, parse_message, ReferenceKey.parse,
                  parse_binding):  # fmt: skip
        with suppress(CaiError):
            parse(data)


@given(JSON)
def test_json(value: object) -> None:
    data = jcs.canonical(value)
    for parse in (Bundle.parse, SignedBundle.parse, parse_message):
        with suppress(CaiError):
            parse(data)
    with suppress(CaiError):
        vector = parse_vector(value)
        assert all(LEAST <= tier <= MOST for tier in vector.values())
        assert status_of(vector) in ("none", "affirming", "warning", "contraindicated")


@given(st.text(max_size=40))
def test_texts(text: str) -> None:
    for parse in (PolicyName.parse, ReferenceName.parse, parse_time):
        with suppress(CaiError):
            parse(text)


@given(st.lists(st.sampled_from(["key", "bundle", "values", "/", "a", "..", "", " ", "_"])))
def test_a_row_name_is_its_path(parts: list[str]) -> None:
    with suppress(CaiError):
        name = ReferenceName.parse("".join(parts))
        assert ReferenceName.parse(name.path) == name


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text=st.lists(PIECES, max_size=30).map("".join))
def test_rego_that_is_none(pool: RegoPool, text: str) -> None:
    """Whatever the engine does with it, an upload is refused with an error of ours or sound."""
    with suppress(CaiError):
        policy = RegoPolicy.checked_resource(text.encode("utf-8"), pool)
        answer = pool.evaluate(policy.text, ("allow",), data={}, input={})
        assert answer.values.get("allow") in (True, False)
