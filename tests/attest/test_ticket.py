"""Admission tickets: the vectors of docs/spec-lease.md, and that nothing else gets through."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cai import jcs
from cai.attest.lease import LeaseAnswer, LeaseGrant, LeaseRequest
from cai.attest.ticket import ChannelView, Ticket, policy_hash, ticket_digest, verify_ticket
from cai.errors import CaiError, FormatError

VECTORS: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "vectors" / "ticket.json").read_text("utf-8")
)
CASES = {item["name"]: item for item in VECTORS["cases"]}
GOOD = CASES["good"]["ticket"].encode()


def verdict_of(item: dict[str, Any]) -> tuple[set[str], Ticket | None, list[str]]:
    view = item["view"]
    models = None if view["models"] is None else tuple(view["models"])
    verdict, ticket = verify_ticket(
        item["ticket"].encode(),
        keys=[bytes.fromhex(key) for key in item["keys"]],
        view=ChannelView(**(view | {"models": models})),
        simulated=item["simulated"],
        now=datetime.fromisoformat(item["now"]).astimezone(UTC),
        log_keys=[bytes.fromhex(key) for key in item["log_keys"]],
    )
    asked = [check.name for check in verdict.checks if check.outcome != "not asked"]
    return {check.name for check in verdict.failures}, ticket, asked


@pytest.mark.parametrize("name", list(CASES))
def test_the_vectors(name: str) -> None:
    fails, ticket, _ = verdict_of(CASES[name])
    assert fails == set(CASES[name]["fails"])
    assert (ticket is None) == bool(fails)


def test_the_vectors_are_what_the_maker_makes() -> None:
    from tests.vectors import make_ticket

    assert VECTORS["cases"] == make_ticket.cases()
    assert VECTORS["claims_digest"] == make_ticket.CLAIMS.digest == Ticket.parse(GOOD).claims.digest
    assert VECTORS["ticket_digest"] == ticket_digest(GOOD)


def test_everything_is_asked_of_a_full_view() -> None:
    _, _, asked = verdict_of(CASES["good"])
    assert len(asked) == 13
    _, _, asked = verdict_of(CASES["nothing asked of the channel"])
    assert len(asked) == 7


def test_a_guests_own_ticket_is_not_held_against_its_clock() -> None:
    verdict, ticket = verify_ticket(
        GOOD, keys=[bytes.fromhex(CASES["good"]["keys"][0])], view=ChannelView(), simulated=False,
        now=None,
    )  # fmt: skip
    assert ticket is not None
    names = {check.name for check in verdict.checks if check.outcome == "not asked"}
    assert {"ticket.issued", "ticket.expired"} <= names


@settings(max_examples=300, deadline=None)
@given(place=st.integers(0, len(GOOD) - 1), bit=st.integers(0, 7))
def test_no_bit_can_be_changed(place: int, bit: int) -> None:
    data = bytearray(GOOD)
    data[place] ^= 1 << bit
    keys = [bytes.fromhex(CASES["good"]["keys"][0])]
    verdict, ticket = verify_ticket(
        bytes(data), keys=keys, view=ChannelView(), simulated=False,
        now=datetime(2026, 11, 20, 12, 1, tzinfo=UTC),
    )  # fmt: skip
    assert ticket is None
    assert not verdict.passed


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_rubbish_is_a_failed_check_and_nothing_else(data: bytes) -> None:
    verdict, ticket = verify_ticket(
        data, keys=[], view=ChannelView(), simulated=False, now=datetime.now(UTC)
    )
    assert ticket is None
    assert [check.name for check in verdict.checks] == ["ticket.form"]


def test_a_pinned_key_of_another_size_is_an_error_of_the_caller() -> None:
    with pytest.raises(FormatError):
        verify_ticket(
            GOOD, keys=[b"short"], view=ChannelView(), simulated=False, now=datetime.now(UTC)
        )


def test_policy_hashes_do_not_depend_on_order() -> None:
    one = policy_hash({"a": "1", "b": "2"})
    assert one == policy_hash({"b": "2", "a": "1"}) != policy_hash({"a": "2", "b": "1"})


# The messages around it.


def test_the_messages_round_trip() -> None:
    request = LeaseRequest.parse(VECTORS["request"].encode())
    assert request.encode().decode() == VECTORS["request"]
    grant = LeaseGrant.parse(VECTORS["grant"].encode())
    assert grant.encode().decode() == VECTORS["grant"]
    grant.require_answer_to(request, GOOD)
    answer = LeaseAnswer(b'{"ciphertext":"x"}', GOOD, ("ab" * 32,))
    assert LeaseAnswer.parse(json.dumps(answer.to_json()).encode()) == answer


def test_what_lives_outside_the_broker_has_version_0() -> None:
    good = json.loads(VECTORS["grant"])
    assert LeaseGrant.parse(jcs.canonical(good | {"version": 0})).version == 0
    with pytest.raises(FormatError):
        LeaseGrant.parse(jcs.canonical(good | {"version": -1}))


def test_a_grant_hides_its_contents() -> None:
    grant = LeaseGrant.parse(VECTORS["grant"].encode())
    assert "contents" not in repr(grant).replace("contents=<", "")
    assert "Y29udGVudHM" not in repr(grant)


@pytest.mark.parametrize("message", ["request", "grant"])
@pytest.mark.parametrize("change", [None, 7, "", [], {}, "zz", "\ud800"])
def test_every_member_is_checked(message: str, change: Any) -> None:
    parse = LeaseRequest.parse if message == "request" else LeaseGrant.parse
    good = json.loads(VECTORS[message])
    allowed = {"request": {"checkpoint": [None], "channel_keys": [[]], "renews": [""],
                           "resource": ["zz"]},
               "grant": {"version": [7], "ttl_s": [7], "drain_s": [7], "contents": [""],
                         "resource": ["zz"]}}  # fmt: skip
    for name in good:
        if change in allowed[message].get(name, []):
            continue
        try:
            data = jcs.canonical(good | {name: change})
        except FormatError:
            continue
        with pytest.raises(CaiError):
            parse(data)
        without = {key: value for key, value in good.items() if key != name}
        with pytest.raises(CaiError):
            parse(jcs.canonical(without))


@pytest.mark.parametrize(
    "data",
    [
        b"", b"[]", b"{}", b'{"cai-lease":1}', b'{"cai-lease":1,"jwe":[],"ticket":{}}',
        b'{"cai-lease":1,"jwe":{},"ticket":"x","consistency":[]}',
        b'{"cai-lease":1,"jwe":{},"ticket":{},"consistency":["x"]}',
        b'{"cai-lease":1,"jwe":{},"ticket":{},"consistency":[],"more":1}',
        b'{"cai-lease":2,"jwe":{},"ticket":{},"consistency":[]}',
    ],
)
def test_malformed_answers(data: bytes) -> None:
    with pytest.raises(CaiError):
        LeaseAnswer.parse(data)


def test_a_lease_of_another_nonce_is_not_ours() -> None:
    grant = LeaseGrant.parse(VECTORS["grant"].encode())
    request = LeaseRequest.parse(VECTORS["request"].encode())
    for other, ticket, code in (
        (replace(request, nonce="00" * 32), GOOD, "lease-nonce"),
        (replace(request, resource="kbs:///a/b/c"), GOOD, "lease-nonce"),
        (request, GOOD[:-1], "lease-ticket"),
    ):
        with pytest.raises(CaiError) as caught:
            grant.require_answer_to(other, ticket)
        assert caught.value.machine_code == code
