"""Bytes from outside: nothing but our own errors leaves the readers of proposals and records."""

from __future__ import annotations

import contextlib
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from cai import jcs
from cai.errors import CaiError
from kbs.admin.people import AdminRecord
from kbs.admin.proposal_form import Proposal
from kbs.admin.tokens import AdminToken

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda children: st.lists(children, max_size=3)
    | st.dictionaries(st.text(max_size=8), children, max_size=3),
    max_leaves=6,
)
GOOD = Proposal.about(
    b"x", kbs="ab", realm="simulated", action="a.b", object="o", state="", proposer="p",
    created=1, expires=2,
).to_json()  # fmt: skip
RECORD = {"key": "ab" * 32, "roles": ["admin"], "tenant": "", "expires": 0, "added_by": ""}


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(GOOD)), JSON)
def test_bent_proposals(member: str, value: Any) -> None:
    with contextlib.suppress(CaiError):
        proposal = Proposal.from_json({**GOOD, member: value})
        assert proposal.to_json() == {**GOOD, member: value}
        proposal.is_about(b"x")


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(RECORD)), JSON)
def test_bent_records(member: str, value: Any) -> None:
    with contextlib.suppress(CaiError):
        data = jcs.canonical({**RECORD, member: value})
        assert AdminRecord.parse(data).encode() == data


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60))
def test_bent_tokens(text: str) -> None:
    with contextlib.suppress(CaiError):
        AdminToken.parse(f"Bearer {text}")
    with contextlib.suppress(CaiError):
        AdminToken.parse(text)
