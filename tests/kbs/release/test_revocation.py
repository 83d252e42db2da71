"""Revocation: one authorised person blocks, every release and renewal obeys, lifting is logged."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import delete, insert, select, update

from cai.attest.ticket import platform_id
from cai.errors import CaiError, FormatError
from kbs.database.tables import BLOCK
from kbs.release.revocation import BlockKind, Target
from tests.kbs.release.guests import (
    MODEL_ID,
    MODEL_ROOT,
    OWNER,
    ask,
    failed,
    lease,
    record,
    refused,
    renew,
    request,
)
from tests.kbs.world import SECRET_TEXT, STATEMENT, URI, Site, Visitor


def names(visitor: Visitor) -> dict[str, list[str]]:
    """Everything by which this guest and the record can be revoked."""
    facts = visitor.facts()
    owner = OWNER.public_key().public_bytes_raw().hex()
    return {
        "model": [MODEL_ID, URI],
        "version": [MODEL_ROOT, f"{URI}@2"],
        "platform": [
            platform_id(facts.tdx), facts.tdx.ppid, facts.tdx.platform_instance_id,
            facts.devices[0].ueid,
        ],
        "launch": [STATEMENT.launch_digest],
        "owner": [owner],
    }  # fmt: skip


def block(site: Site, kind: str, value: str, reason: str = "stolen") -> dict[str, Any]:
    answer = site.admin("POST", f"block/{kind}/{value}", {"reason": reason})
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


@pytest.mark.parametrize("kind", list(BlockKind))
def test_a_renewal_of_what_is_revoked_is_refused_with_its_code(
    leasing: Site, visitor: Visitor, kind: str
) -> None:
    for value in names(visitor)[kind]:
        if not value:
            continue
        held = lease(leasing, visitor)
        told = block(leasing, kind, value)
        assert told["leases"] >= 1
        assert told["last_ends"] > 0
        _, cookie = visitor.attested(leasing)
        answer = ask(leasing, cookie, request(renews=held.grant.lease))
        refused(answer, 403, f"revoked.{kind}")
        assert "stolen" in answer.json()["detail"]
        row = leasing.last("renewal")
        assert (row["decision"], failed(row)) == ("deny", {f"revoked.{kind}"})
        assert "served" not in row
        assert leasing.admin("DELETE", f"block/{kind}/{value}").status_code == 200
        renew(leasing, visitor, held)


def test_plain_releases_obey_blocks(allowed: Site, visitor: Visitor) -> None:
    _, cookie = visitor.attested(allowed)
    assert visitor.open(allowed.get(cookie)) == SECRET_TEXT
    block(allowed, "model", URI)
    refused(allowed.get(cookie), 403, "revoked.model")
    block(allowed, "launch", STATEMENT.launch_digest)
    assert failed_after(allowed, cookie) == {"revoked.model", "revoked.launch"}
    assert allowed.admin("DELETE", f"block/model/{URI}").status_code == 200
    refused(allowed.get(cookie), 403, "revoked.launch")


def failed_after(site: Site, cookie: str) -> set[str]:
    assert site.get(cookie).status_code == 403
    return failed(site.last("release"))


def test_a_token_of_before_releases_nothing(allowed: Site, visitor: Visitor) -> None:
    answer, _ = visitor.attested(allowed)
    block(allowed, "platform", visitor.facts().tdx.ppid)
    header = {"Authorization": f"Bearer {answer.json()['token']}"}
    refused(allowed.get(None, headers=header), 403, "revoked.platform")


def test_the_measured_launch_event_counts_without_a_statement(
    leasing: Site, visitor: Visitor
) -> None:
    from cai.attest.facts import Facts
    from kbs.names import ResourceName
    from kbs.release.model import ModelFacts
    from kbs.release.revocation import targets

    facts = visitor.but(statement=None).facts()
    measured = Facts.from_json(
        facts.to_json() | {"runtime_events": ["cai launch " + "ab" * 48, "cai ready"]}
    )
    named = targets(measured, ResourceName.parse(URI), version=1, model=ModelFacts())
    assert Target(BlockKind.LAUNCH, "ab" * 48) in named


def test_another_version_of_the_resource_is_not_blocked(leasing: Site, visitor: Visitor) -> None:
    block(leasing, "version", f"{URI}@2")
    assert leasing.admin("POST", f"resource/{URI}", record()).status_code == 200
    lease(leasing, visitor)


def test_blocks_are_listed_with_their_reasons(leasing: Site, visitor: Visitor) -> None:
    block(leasing, "owner", "aa" * 32, "left the company")
    block(leasing, "owner", "aa" * 32, "left the company for good")
    block(leasing, "model", "bb" * 32)
    listed = leasing.admin("GET", "block").json()["blocks"]
    assert [(item["kind"], item["reason"]) for item in listed] == [
        ("model", "stolen"), ("owner", "left the company for good"),
    ]  # fmt: skip
    assert [row["action"] for row in leasing.audit()[-3:]] == ["block.set"] * 3
    assert leasing.last("block.set")["subject"] == "model/" + "bb" * 32


def test_what_is_not_revoked_cannot_be_lifted(leasing: Site) -> None:
    assert leasing.admin("DELETE", "block/model/" + "bb" * 32).status_code == 404


@pytest.mark.parametrize("how", ["deleted", "emptied", "older"])
def test_a_block_that_was_edited_away_still_blocks(
    leasing: Site, visitor: Visitor, how: str
) -> None:
    block(leasing, "model", MODEL_ID, "one")
    database = leasing.broker.core.database
    with database.read() as connection:
        before = connection.execute(select(BLOCK)).one()
    block(leasing, "model", MODEL_ID, "two")
    with database.write() as connection:
        if how == "emptied":
            connection.execute(update(BLOCK).values(sealed=b""))
        else:
            connection.execute(delete(BLOCK))
        if how == "older":
            connection.execute(insert(BLOCK).values(**before._mapping))
    _, cookie = visitor.attested(leasing)
    answer = ask(leasing, cookie, request())
    assert answer.status_code == 500
    assert answer.json()["code"] == "tampered"
    assert leasing.last("release")["decision"] == "deny"


def test_a_block_of_one_thing_is_none_of_another(leasing: Site, visitor: Visitor) -> None:
    block(leasing, "model", "bb" * 32)
    with leasing.broker.core.database.write() as connection:
        wanted = Target(BlockKind.MODEL, MODEL_ID).id
        connection.execute(update(BLOCK).values(id=wanted))
    _, cookie = visitor.attested(leasing)
    assert ask(leasing, cookie, request()).json()["code"] == "tampered"


def test_a_block_set_while_a_decision_is_prepared_is_obeyed(
    allowed: Site, visitor: Visitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, cookie = visitor.attested(allowed)
    store = allowed.broker.core.resources
    real, calls = store.open, []

    def slow(sealed: Any) -> Any:
        if not calls:
            calls.append(1)
            block(allowed, "model", URI)
        return real(sealed)

    monkeypatch.setattr(store, "open", slow)
    refused(allowed.get(cookie), 403, "revoked.model")


def test_a_policy_changed_while_a_decision_is_prepared_is_obeyed(
    allowed: Site, visitor: Visitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, cookie = visitor.attested(allowed)
    store = allowed.broker.core.resources
    real, calls = store.open, []

    def slow(sealed: Any) -> Any:
        if not calls:
            calls.append(1)
            allowed.set_policy("resource-policy", b"package policy\ndefault allow := false\n")
        return real(sealed)

    monkeypatch.setattr(store, "open", slow)
    refused(allowed.get(cookie), 403, "release.allow")


def test_a_broker_that_cannot_settle_refuses(
    allowed: Site, visitor: Visitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, cookie = visitor.attested(allowed)
    store = allowed.broker.core.resources
    real, calls = store.open, []

    def slow(sealed: Any) -> Any:
        calls.append(1)
        block(allowed, "model", f"{len(calls):064x}")
        return real(sealed)

    monkeypatch.setattr(store, "open", slow)
    refused(allowed.get(cookie), 503, "unsettled", "Busy")
    assert len(calls) == 3
    assert failed(allowed.last("release")) == {"kbs.unsettled"}


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("model", "short"), ("model", "a/b"), ("version", "a/b/c"), ("version", "a/b/c@0"),
        ("version", "a/b/c@01"), ("platform", "xyz"), ("launch", "ab" * 32), ("owner", "AB" * 32),
        ("gpu", "1"), ("", "x"), ("owner", ""),
    ],
)
def test_what_names_nothing_is_refused(leasing: Site, kind: str, value: str) -> None:
    with pytest.raises(FormatError):
        Target.parse(kind, value)
    answer = leasing.admin("POST", f"block/{kind}/{value}", {"reason": "x"})
    assert answer.status_code in (400, 404)


@pytest.mark.parametrize(
    "body", [b"[]", b'{"reason":1}', b'{"reason":""}', b'{"reason":"a\\nb"}', b'{"why":"x"}',
             b'{"reason":"' + b"x" * 600 + b'"}'],
)  # fmt: skip
def test_unsound_reasons_are_refused(leasing: Site, body: bytes) -> None:
    assert leasing.admin("POST", "block/owner/" + "aa" * 32, body).status_code == 400
    assert leasing.admin("GET", "block").json() == {"blocks": []}


def test_only_administrators_revoke(leasing: Site) -> None:
    path = "/kbs/v0/block/owner/" + "aa" * 32
    for method in ("POST", "DELETE"):
        assert leasing.call(method, path, {"reason": "x"}, app="admin").status_code == 401
        assert leasing.call(method, path, {"reason": "x"}).status_code in (404, 405)
    assert leasing.admin("GET", "block").json() == {"blocks": []}


def test_the_resources_of_people_are_named_as_they_write_them() -> None:
    assert Target.parse("model", f"kbs:///{URI}").value == URI
    assert Target.parse("version", f"kbs:///{URI}@3").value == f"{URI}@3"
    assert Target.parse("model", URI).id != Target.parse("version", f"{URI}@1").id


def test_a_lease_shows_who_ended_it(leasing: Site, visitor: Visitor) -> None:
    held = lease(leasing, visitor)
    block(leasing, "model", MODEL_ID)
    (row,) = leasing.admin("GET", "lease").json()["leases"]
    assert (row["id"], row["state"]) == (held.grant.lease, "revoked")
    assert row["revoked_by"] == [f"model/{MODEL_ID}"]
    leasing.clock.ahead = timedelta(seconds=2000)
    assert block(leasing, "owner", "aa" * 32)["leases"] == 0


def test_revocation_needs_no_living_lease(leasing: Site) -> None:
    assert block(leasing, "launch", "ab" * 48) | {"created": 0} == {
        "kind": "launch", "value": "ab" * 48, "reason": "stolen", "created": 0, "leases": 0,
        "last_ends": 0,
    }  # fmt: skip


def test_errors_of_ours_only(leasing: Site) -> None:
    for value in ("é", "\x00", "a/b/c@" + "9" * 40, "/" * 200):
        with pytest.raises(CaiError):
            Target.parse("version", value)
