"""Leases: granted with a ticket, renewed by attesting again, refused with a code of their own."""

from __future__ import annotations

import itertools
from dataclasses import replace
from datetime import timedelta

import pytest

from cai import jcs, merkle
from cai.attest.checkpoint import read_checkpoint
from cai.attest.lease import KnownCheckpoint
from cai.attest.ticket import ChannelView, platform_id, ticket_digest, verify_ticket
from cai.merkle import leaf_hash
from kbs.audit.log import read_leaves
from tests.kbs.release.guests import (
    CHANNEL_KEY,
    MODEL_ROOT,
    Held,
    ask,
    failed,
    lease,
    log_key,
    opened,
    record,
    refused,
    renew,
    request,
    ticket_key,
)
from tests.kbs.world import SECRET_TEXT, STATEMENT, URI, Site, Visitor


def test_a_lease_brings_record_and_ticket_bound_to_the_nonce(
    leasing: Site, visitor: Visitor
) -> None:
    held = lease(leasing, visitor)
    assert held.grant.contents.reveal() == record()
    assert (held.grant.ttl_s, held.grant.drain_s) == (900, 120)
    assert held.grant.nonce == held.request.nonce == held.ticket.claims.nonce
    assert held.grant.ticket == ticket_digest(held.answer.ticket)
    claims = held.ticket.claims
    assert claims.channel_keys == (CHANNEL_KEY,)
    assert claims.models == (MODEL_ROOT,)
    assert claims.realm == "simulated"
    assert claims.kbs == leasing.broker.instance.id
    assert claims.launch_digest == STATEMENT.launch_digest
    assert claims.platform == platform_id(visitor.facts().tdx)


def test_the_ticket_verifies_with_both_pinned_keys(leasing: Site, visitor: Visitor) -> None:
    held = lease(leasing, visitor)
    view = ChannelView(
        channel_key=CHANNEL_KEY, launch_digest=STATEMENT.launch_digest,
        platform=platform_id(visitor.facts().tdx), models=(MODEL_ROOT,),
        ticket_digest=ticket_digest(held.answer.ticket), nonce=held.request.nonce,
    )  # fmt: skip
    verdict, ticket = verify_ticket(
        held.answer.ticket, keys=(ticket_key(leasing),), view=view, simulated=True,
        now=leasing.clock(), log_keys=(log_key(leasing),),
    )  # fmt: skip
    assert ticket is not None, verdict.failures
    assert not [item for item in verdict.checks if item.outcome != "pass"]


def test_the_decisions_leaf_names_the_ticket(leasing: Site, visitor: Visitor) -> None:
    held = lease(leasing, visitor)
    row = leasing.last("release")
    assert row["decision"] == "allow"
    assert row["served"] == 2
    assert row["change"]["object"] == f"lease/{held.grant.lease}"
    assert row["details"]["ticket_claims"] == held.ticket.claims.digest
    assert row["details"]["lease"] == held.grant.lease
    _, leaves = read_leaves(leasing.broker.core.database, start=row["seq"], limit=1)
    assert leaf_hash(leaves[0]) == held.ticket.audit.leaf
    assert record().hex() not in jcs.canonical(row).hex()


def test_a_plain_get_of_a_record_is_refused(leasing: Site, visitor: Visitor) -> None:
    _, cookie = visitor.attested(leasing)
    refused(leasing.get(cookie), 403, "lease-required", "LeaseRequired")
    row = leasing.last("release")
    assert row["decision"] == "deny"
    assert failed(row) == {"kbs.lease-required"}
    assert "served" not in row


def test_what_asks_for_no_lease_stays_plain(allowed: Site, visitor: Visitor) -> None:
    _, cookie = visitor.attested(allowed)
    assert visitor.open(allowed.get(cookie)) == SECRET_TEXT
    held = lease(allowed, visitor)
    assert held.grant.contents.reveal() == SECRET_TEXT
    assert (held.grant.ttl_s, held.grant.drain_s) == (900, 300)
    assert held.ticket.claims.models == ()


def test_a_renewal_keeps_the_lease_and_proves_that_the_log_grew(
    leasing: Site, visitor: Visitor
) -> None:
    first = lease(leasing, visitor)
    second = renew(leasing, visitor, first)
    assert second.grant.lease == first.grant.lease
    row = leasing.last("renewal")
    assert row["details"]["renewals"] == 1
    assert row["change"]["version"] == 2
    old, new = (read_checkpoint(held.ticket.audit.proof.note) for held in (first, second))
    path = [bytes.fromhex(step) for step in second.answer.consistency]
    assert new.size > old.size
    assert merkle.consistent(old.size, old.root, new.size, new.root, path)


def test_a_checkpoint_of_another_log_gets_no_proof(leasing: Site, visitor: Visitor) -> None:
    for known in (
        KnownCheckpoint("another/log", 1, "00" * 32),
        KnownCheckpoint(f"cai-kbs/{leasing.broker.instance.id}", 10**9, "00" * 32),
    ):
        assert lease(leasing, visitor, checkpoint=known).answer.consistency == ()


def test_an_ended_lease_begins_anew(leasing: Site, visitor: Visitor) -> None:
    first = lease(leasing, visitor)
    leasing.clock.ahead = timedelta(seconds=900 + 120 + 1)
    second = renew(leasing, visitor, first)
    assert second.grant.lease != first.grant.lease
    assert leasing.last("renewal")["details"]["renewals"] == 0


def test_an_unknown_lease_begins_anew(leasing: Site, visitor: Visitor) -> None:
    assert lease(leasing, visitor, renews="ee" * 16).grant.lease != "ee" * 16


def test_the_lease_of_another_resource_is_refused(leasing: Site, visitor: Visitor) -> None:
    first = lease(leasing, visitor)
    assert leasing.admin("POST", "resource/models/other/key", record()).status_code == 200
    _, cookie = visitor.attested(leasing)
    wanted = request(resource="kbs:///models/other/key", renews=first.grant.lease)
    refused(ask(leasing, cookie, wanted), 403, "lease-foreign")
    row = leasing.last("renewal")
    assert (row["decision"], failed(row)) == ("deny", {"kbs.lease-foreign"})


def test_a_lease_lives_no_longer_than_its_record_says(leasing: Site, visitor: Visitor) -> None:
    from cai.model.record import Lease

    leasing.admin("POST", f"resource/{URI}", record(lease=Lease(60, 0)))
    held = lease(leasing, visitor)
    assert (held.grant.ttl_s, held.grant.drain_s) == (60, 0)
    assert (held.ticket.claims.ttl_s, held.ticket.claims.drain_s) == (60, 0)


def test_a_bearer_token_leases_as_its_session(leasing: Site, visitor: Visitor) -> None:
    answer, _ = visitor.attested(leasing)
    header = {"Authorization": f"Bearer {answer.json()['token']}"}
    wanted = request()
    opened(visitor, wanted, ask(leasing, None, wanted, headers=header))


def test_without_a_policy_there_is_no_lease(site: Site, visitor: Visitor) -> None:
    site.admin("POST", f"resource/{URI}", record())
    _, cookie = visitor.attested(site)
    refused(ask(site, cookie, request()), 403, "policy.verification")
    row = site.last("release")
    assert failed(row) == {"policy.verification", "policy.release"}
    assert "change" not in row


def test_a_missing_resource_is_not_found(leasing: Site, visitor: Visitor) -> None:
    _, cookie = visitor.attested(leasing)
    answer = ask(leasing, cookie, request(resource="kbs:///models/minilm/none"))
    assert answer.status_code == 404


def test_a_session_that_has_not_attested_gets_no_lease(leasing: Site) -> None:
    _, cookie = leasing.auth()
    assert ask(leasing, cookie, request()).status_code == 401
    assert ask(leasing, None, request()).status_code == 401


def bent(name: str, value: object) -> bytes:
    body = jcs.parse(request().encode(), what="request", limit=1 << 16)
    if value is None:
        del body[name]
    else:
        body[name] = value
    return jcs.canonical(body)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{}", b"null", b"[]", b"\xff", request().encode() + b"\n",
        request().encode().replace(b'"nonce"', b'"nonce":"00","nonce"'),
        bent("cai-lease", 2), bent("resource", "models/minilm/key"), bent("resource", ""),
        bent("resource", "kbs:///a/b"), bent("resource", 1), bent("nonce", "ab"),
        bent("nonce", "AB" * 32), bent("nonce", None), bent("channel_keys", ["ab"]),
        bent("channel_keys", ["cd" * 32, "ab" * 32]), bent("channel_keys", ["ab" * 32] * 2),
        bent("channel_keys", [f"{i:064x}" for i in range(65)]), bent("renews", "x"),
        bent("renews", None), bent("checkpoint", None), bent("checkpoint", {"size": 1}),
        bent("checkpoint", {"origin": "", "size": 1, "root": "00" * 32}),
        bent("checkpoint", {"origin": "o", "size": -1, "root": "00" * 32}),
        bent("extra", 1), b'{"a":' * 5000,
    ],
    ids=itertools.count(),
)  # fmt: skip
def test_malformed_requests_are_refused(leasing: Site, visitor: Visitor, body: bytes) -> None:
    _, cookie = visitor.attested(leasing)
    before = len(leasing.audit())
    assert ask(leasing, cookie, body).status_code in (400, 404, 413)
    assert len(leasing.audit()) == before


def test_an_oversize_request_is_refused(leasing: Site, visitor: Visitor) -> None:
    _, cookie = visitor.attested(leasing)
    assert ask(leasing, cookie, b"x" * (17 * 1024)).status_code == 413


def test_a_grant_answers_its_own_request_only(leasing: Site, visitor: Visitor) -> None:
    from cai.errors import Tampered

    held = lease(leasing, visitor)
    for other, ticket in (
        (replace(held.request, nonce="00" * 32), held.answer.ticket),
        (replace(held.request, resource="kbs:///a/b/c"), held.answer.ticket),
        (held.request, held.answer.ticket + b" "),
    ):
        with pytest.raises(Tampered):
            held.grant.require_answer_to(other, ticket)


def test_leases_are_listed(leasing: Site, visitor: Visitor) -> None:
    held = lease(leasing, visitor)
    rows = leasing.admin("GET", "lease").json()["leases"]
    assert [(row["id"], row["state"], row["renewals"]) for row in rows] == [
        (held.grant.lease, "living", 0)
    ]
    assert rows[0]["expires"] - rows[0]["issued"] == 900
    leasing.clock.ahead = timedelta(seconds=901)
    assert leasing.admin("GET", "lease").json()["leases"][0]["state"] == "draining"
    leasing.clock.ahead = timedelta(seconds=1021)
    assert leasing.admin("GET", "lease").json()["leases"][0]["state"] == "ended"


def test_ended_leases_are_swept(leasing: Site, visitor: Visitor) -> None:
    lease(leasing, visitor)
    leasing.clock.ahead = timedelta(hours=2)
    held = lease(leasing, visitor)
    rows = leasing.admin("GET", "lease").json()["leases"]
    assert [row["id"] for row in rows] == [held.grant.lease]


def test_an_edited_lease_row_is_not_renewed(leasing: Site, visitor: Visitor) -> None:
    from sqlalchemy import update

    from kbs.database.tables import LEASE

    held: Held = lease(leasing, visitor)
    with leasing.broker.core.database.write() as connection:
        connection.execute(update(LEASE).values(ends=LEASE.c.ends + 1000))
    _, cookie = visitor.attested(leasing)
    answer = ask(leasing, cookie, request(renews=held.grant.lease))
    assert answer.status_code == 500
    assert leasing.last("renewal")["decision"] == "deny"


def test_the_main_listener_lists_no_leases(leasing: Site) -> None:
    assert leasing.call("GET", "/kbs/v0/lease").status_code == 404
    assert leasing.call("GET", "/kbs/v0/lease", app="admin").status_code == 401
