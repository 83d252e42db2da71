"""The two-person rule: what is proposed, who may sign it, when it is applied, when it is void."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import delete, select, update

from cai import jcs
from cai.attest.jwk import b64u_decode, b64u_encode
from cai.errors import FormatError, Refused
from kbs.admin.app import admin_app
from kbs.admin.changes import Applied, ChangeKind, ChangeKinds, Outdated, Proposed, Role
from kbs.admin.office import Administrator, Office
from kbs.admin.people import FIRST
from kbs.admin.proposal_form import Proposal
from kbs.admin.settings import AdminSettings, LegacyKey, TwoPerson
from kbs.database.tables import PROPOSAL
from tests.kbs.admin.crew import Person, first, hire, switch
from tests.kbs.admin.test_tokens import claims, jwt, pem
from tests.kbs.world import SECRET_TEXT, URI, Site

RULE = TwoPerson()
ALLOW = b"package policy\ndefault allow := true\n"


@pytest.fixture
def crew(site: Site) -> dict[str, Person]:
    """Four administrators under the rule that two must sign."""
    people = {
        "admin": first(site),
        "alice": hire(site, "alice", "resource", "policy"),
        "bob": hire(site, "bob", "resource", "policy"),
        "eve": hire(site, "eve", "auditor"),
    }
    switch(site, AdminSettings(two_person=RULE))
    return people


def propose(person: Person, contents: bytes = SECRET_TEXT, path: str = URI) -> dict[str, Any]:
    answer = person.call("POST", f"resource/{path}", contents)
    assert answer.status_code == 202, answer.text
    shown: dict[str, Any] = answer.json()
    return shown


def changes(site: Site, action: str = "resource.set") -> int:
    return sum(row["action"] == action for row in site.audit())


def waiting(person: Person) -> list[str]:
    answer = person.call("GET", "proposal")
    assert answer.status_code == 200, answer.text
    return [item["id"] for item in answer.json()["proposals"]]


def test_a_change_waits_for_two_persons(site: Site, crew: dict[str, Person]) -> None:
    alice, bob = crew["alice"], crew["bob"]
    shown = propose(alice)
    assert (shown["needed"], shown["missing"], shown["code"]) == (2, 2, "proposed")
    assert {"type", "detail"} <= set(shown)
    assert changes(site) == 0
    once = alice.sign(shown).json()
    assert (once["applied"], once["missing"], once["signed_by"]) == (False, 1, ["alice"])
    assert changes(site) == 0
    done = bob.sign(shown)
    assert done.status_code == 200, done.text
    assert done.json()["applied"] is True
    assert done.json()["answer"]["version"] == 1
    leaf = site.last("resource.set")
    assert leaf["actor"] == {
        "kind": "admin", "name": "alice", "roles": "policy resource", "proposal": shown["id"],
        "approved_by": "alice bob",
    }  # fmt: skip
    assert waiting(crew["admin"]) == []
    assert bob.sign(shown).status_code == 404


def test_the_log_proves_who_signed_what(site: Site, crew: dict[str, Person]) -> None:
    shown = propose(crew["alice"])
    crew["alice"].sign(shown)
    crew["bob"].sign(shown)
    leaf = site.last("proposal.apply")
    proposal = Proposal.from_json(leaf["details"]["proposal"])
    assert proposal.is_about(SECRET_TEXT)
    assert set(leaf["details"]["signatures"]) == {"alice", "bob"}
    keys = {row["subject"]: row["details"]["key"] for row in site.audit()
            if row["action"] == "admin.set"}  # fmt: skip
    from kbs.admin.people import parse_key

    for person, signature in leaf["details"]["signatures"].items():
        assert proposal.signed_by(parse_key(keys[person]), signature)


def test_one_person_is_not_two(site: Site, crew: dict[str, Person]) -> None:
    alice = crew["alice"]
    shown = propose(alice)
    for subject in ("alice", "bob", "admin"):
        answer = alice.sign(shown)
        assert answer.json()["signed_by"] == ["alice"], subject
    assert changes(site) == 0


def test_a_proposer_who_does_not_count_needs_two_others(
    site: Site, crew: dict[str, Person]
) -> None:
    switch(site, AdminSettings(two_person=TwoPerson(proposer_counts=False)))
    shown = propose(crew["alice"])
    assert crew["alice"].sign(shown).status_code == 403
    assert crew["bob"].sign(shown).json()["applied"] is False
    assert crew["admin"].sign(shown).json()["applied"] is True


def test_only_approvers_count_where_they_are_named(site: Site, crew: dict[str, Person]) -> None:
    switch(site, AdminSettings(two_person=TwoPerson(approvers=("bob", "admin"))))
    shown = propose(crew["alice"])
    assert crew["alice"].sign(shown).json()["code"] == "proposal-signature"
    assert crew["bob"].sign(shown).json()["missing"] == 1
    assert crew["admin"].sign(shown).json()["applied"] is True


def test_three_of_them(site: Site, crew: dict[str, Person]) -> None:
    switch(site, AdminSettings(two_person=TwoPerson(required=3)))
    shown = propose(crew["alice"])
    for name, applied in (("bob", False), ("alice", False), ("admin", True)):
        assert crew[name].sign(shown).json()["applied"] is applied


@pytest.mark.parametrize("who", ["eve", "policy-person", "other-tenant", "stranger"])
def test_who_may_not_sign(site: Site, crew: dict[str, Person], who: str) -> None:
    switch(site, AdminSettings())
    people = {
        "eve": crew["eve"],
        "policy-person": hire(site, "carol", "policy"),
        "other-tenant": hire(site, "dave", "resource", tenant="other"),
        "stranger": Person(site, "stranger"),
    }
    switch(site, AdminSettings(two_person=RULE))
    shown = propose(crew["alice"])
    crew["alice"].sign(shown)
    answer = people[who].sign(shown)
    assert answer.status_code in (401, 403, 404)
    assert changes(site) == 0


@pytest.mark.parametrize(
    "bent",
    [
        {"object": "other/a/b"}, {"action": "policy.set"}, {"state": "00" * 32}, {"expires": 1},
        {"kbs": "00" * 16}, {"realm": "production"}, {"proposer": "bob"},
        {"contents": {"size": 1, "salt": "00" * 32, "sha256": "00" * 32}},
    ],
)  # fmt: skip
def test_a_signature_under_other_bytes_is_refused(
    site: Site, crew: dict[str, Person], bent: dict[str, Any]
) -> None:
    shown = propose(crew["alice"])
    answer = crew["bob"].sign(shown, **bent)
    assert answer.status_code == 403
    assert answer.json()["code"] == "proposal-signature"
    assert crew["admin"].call("GET", f"proposal/{shown['id']}").json()["signed_by"] == []


@pytest.mark.parametrize(
    "body", [b"", b"x", [], {}, {"signature": 1}, {"signature": "00"}, {"signature": "Z" * 128},
             {"signature": "AB" * 64}],
)  # fmt: skip
def test_what_is_no_signature_is_refused(crew: dict[str, Person], body: Any) -> None:
    shown = propose(crew["alice"])
    answer = crew["bob"].call("POST", f"proposal/{shown['id']}/approve", body)
    assert answer.status_code == 400


def test_a_signature_of_another_person_is_refused(crew: dict[str, Person]) -> None:
    shown = propose(crew["alice"])
    signature = Proposal.from_json(shown["proposal"]).sign(crew["alice"].key)
    answer = crew["bob"].call("POST", f"proposal/{shown['id']}/approve", {"signature": signature})
    assert answer.status_code == 403


def test_a_proposal_is_void_once_the_object_changed(site: Site, crew: dict[str, Person]) -> None:
    old, new = propose(crew["alice"], b"old"), propose(crew["alice"], b"new")
    for name in ("alice", "bob"):
        crew[name].sign(new)
    assert changes(site) == 1
    shown = crew["admin"].call("GET", f"proposal/{old['id']}").json()
    assert "changed since" in shown["void"]
    answer = crew["alice"].sign(old)
    assert (answer.status_code, answer.json()["code"]) == (409, "proposal-void")
    assert changes(site) == 1
    assert waiting(crew["admin"]) == []
    assert site.last("proposal.void")["decision"] == "deny"


def test_a_proposal_about_another_object_stays(site: Site, crew: dict[str, Person]) -> None:
    one, two = propose(crew["alice"]), propose(crew["alice"], path="models/other/key")
    for shown in (one, two):
        crew["alice"].sign(shown)
        assert crew["bob"].sign(shown).json()["applied"] is True


def test_an_expired_proposal_is_void(site: Site, crew: dict[str, Person]) -> None:
    shown = propose(crew["alice"])
    crew["alice"].sign(shown)
    site.clock.ahead += timedelta(hours=RULE.hours, seconds=1)
    assert crew["bob"].sign(shown).json()["code"] == "proposal-void"
    assert changes(site) == 0


def test_expired_proposals_are_swept(site: Site, crew: dict[str, Person]) -> None:
    shown = propose(crew["alice"])
    site.clock.ahead += timedelta(hours=RULE.hours, seconds=1)
    fresh = propose(crew["alice"])
    assert waiting(crew["admin"]) == [fresh["id"]]
    assert site.last("proposal.void")["details"]["proposal"]["id"] == shown["id"]


def test_one_who_was_removed_meanwhile_does_not_count(
    site: Site, crew: dict[str, Person]
) -> None:
    shown = propose(crew["alice"])
    crew["alice"].sign(shown)
    switch(site, AdminSettings())
    assert crew["admin"].call("DELETE", "admin/alice").status_code == 200
    switch(site, AdminSettings(two_person=RULE))
    answer = crew["bob"].sign(shown).json()
    assert (answer["applied"], answer["signed_by"]) == (False, ["bob"])
    assert crew["admin"].sign(shown).json()["applied"] is True


def test_a_new_key_under_the_same_name_does_not_inherit_signatures(
    site: Site, crew: dict[str, Person]
) -> None:
    shown = propose(crew["alice"])
    crew["alice"].sign(shown)
    switch(site, AdminSettings())
    hire(site, "alice", "resource")
    switch(site, AdminSettings(two_person=RULE))
    assert crew["bob"].sign(shown).json()["applied"] is False


def test_a_proposal_can_be_rejected(site: Site, crew: dict[str, Person]) -> None:
    one, two, three = (propose(crew["alice"], path=f"a/b/{n}") for n in "123")
    assert crew["alice"].call("POST", f"proposal/{one['id']}/reject").status_code == 200
    assert crew["bob"].call("POST", f"proposal/{two['id']}/reject").status_code == 200
    assert crew["eve"].call("POST", f"proposal/{three['id']}/reject").status_code == 403
    assert waiting(crew["admin"]) == [three["id"]]
    assert crew["bob"].sign(one).status_code == 404
    assert site.last("proposal.reject")["actor"]["name"] == "bob"


def test_contents_of_a_resource_are_never_shown(site: Site, crew: dict[str, Person]) -> None:
    shown = propose(crew["alice"])
    crew["alice"].sign(shown)
    told = [
        crew[name].call("GET", route).text
        for name in ("admin", "alice", "bob", "eve")
        for route in ("proposal", f"proposal/{shown['id']}")
    ]
    crew["bob"].sign(shown)
    told += [str(site.audit()), str(shown)]
    for text in told:
        assert SECRET_TEXT.decode() not in text
        assert b64u_encode(SECRET_TEXT) not in text
        assert '"contents":"' not in text
    database = site.settings.data / "kbs.sqlite"
    for path in database.parent.glob("kbs.sqlite*"):
        assert SECRET_TEXT not in path.read_bytes()


def test_contents_of_a_policy_are_shown_to_those_who_may_sign(
    site: Site, crew: dict[str, Person]
) -> None:
    answer = crew["alice"].call("POST", "resource-policy", {"policy": b64u_encode(ALLOW)})
    assert answer.status_code == 202, answer.text
    route = f"proposal/{answer.json()['id']}"
    shown = crew["bob"].call("GET", route).json()
    contents = b64u_decode(shown["contents"], what="contents")
    assert ALLOW in contents
    assert Proposal.from_json(shown["proposal"]).is_about(contents)
    assert "contents" not in crew["eve"].call("GET", route).json()


def test_a_proposal_is_seen_by_those_it_concerns(site: Site, crew: dict[str, Person]) -> None:
    switch(site, AdminSettings())
    carol = hire(site, "carol", "policy")
    dave = hire(site, "dave", "resource", tenant="other")
    switch(site, AdminSettings(two_person=RULE))
    shown = propose(crew["alice"])
    for person in (carol, dave):
        assert waiting(person) == []
        assert person.call("GET", f"proposal/{shown['id']}").status_code == 404
    for name in ("admin", "alice", "bob", "eve"):
        assert waiting(crew[name]) == [shown["id"]]


def test_changes_of_administrators_need_two_as_well(site: Site, crew: dict[str, Person]) -> None:
    boss = crew["admin"]
    fresh = Person(site, "carol")
    record = {"key": fresh.public, "roles": ["admin"]}
    # There is but one with the role admin: nobody could ever sign it.
    answer = boss.call("POST", "admin/carol", record)
    assert (answer.status_code, answer.json()["code"]) == (409, "proposal-persons")
    switch(site, AdminSettings())
    second = hire(site, "boss", "admin")
    switch(site, AdminSettings(two_person=RULE))
    shown = boss.call("POST", "admin/carol", record).json()
    removal = boss.call("DELETE", "admin/bob").json()
    for person in (boss, second):
        person.sign(shown)
        person.sign(removal)
    assert fresh.call("GET", "whoami").json()["roles"] == ["admin"]
    assert crew["bob"].call("GET", "whoami").status_code == 401


def test_whoever_cannot_sign_can_still_propose(site: Site, crew: dict[str, Person], tmp_path: Any
) -> None:  # fmt: skip
    old = Person(site, "keyprovider")
    legacy = LegacyKey("keyprovider", pem(old.key, tmp_path / "old.pem"))
    switch(site, AdminSettings(two_person=RULE, legacy_keys=(legacy,)))
    headers = {"Authorization": f"Bearer {jwt(old.key, claims(site.clock(), role=None))}"}
    answer = site.call(
        "POST", f"/kbs/v0/resource/{URI}", SECRET_TEXT, app="admin", headers=headers
    )
    assert answer.status_code == 202, answer.text
    shown = answer.json()
    signature = Proposal.from_json(shown["proposal"]).sign(old.key)
    route = f"/kbs/v0/proposal/{shown['id']}/approve"
    answer = site.call("POST", route, {"signature": signature}, app="admin", headers=headers)
    assert answer.json()["code"] == "proposal-signature"
    assert crew["bob"].sign(shown).json()["missing"] == 1
    assert crew["alice"].sign(shown).json()["applied"] is True
    assert site.last("resource.set")["actor"]["name"] == "legacy:keyprovider"


@pytest.mark.parametrize("how", ["delete", "swap"])
def test_an_edited_proposal_is_found(site: Site, crew: dict[str, Person], how: str) -> None:
    one, two = propose(crew["alice"], b"one"), propose(crew["alice"], b"two")
    database = site.broker.core.database
    with database.read() as connection:
        sealed = connection.execute(
            select(PROPOSAL.c.sealed).where(PROPOSAL.c.path == two["id"])
        ).scalar()
    of_one = PROPOSAL.c.path == one["id"]
    with database.write() as connection:
        if how == "delete":
            connection.execute(delete(PROPOSAL).where(of_one))
        else:
            connection.execute(update(PROPOSAL).where(of_one).values(sealed=sealed))
    answer = crew["bob"].sign(one)
    assert answer.status_code == 500
    assert f"proposal/{one['id']}" in answer.json()["detail"]


def test_there_are_no_proposals_without_the_rule(site: Site) -> None:
    assert first(site).call("GET", "proposal").status_code == 404
    assert first(site).call("POST", f"resource/{URI}", b"x").status_code == 200


@pytest.mark.parametrize("name", ["x", "a" * 33, "..", "%2e", "é"])
def test_what_names_no_proposal_is_not_found(crew: dict[str, Person], name: str) -> None:
    assert crew["bob"].call("GET", f"proposal/{name}").status_code == 404


# Kinds with a slow part, and with a fixed number of rounds


class Kind:
    """A kind of change whose preparation can be outdated."""

    def __init__(self, outdated: int, *, reducing: bool = False) -> None:
        self.outdated = outdated
        self.prepared = 0
        self.done: list[bytes] = []
        self.kind = ChangeKind(
            "thing.set", Role.RESOURCE, lambda *_: None, self.apply, reducing=reducing,
            prepare=self.prepare, state=lambda *_: "",
        )  # fmt: skip

    def prepare(self, _core: Any, _object_id: str, contents: bytes) -> bytes:
        self.prepared += 1
        return b"sealed " + contents

    def apply(self, _core: Any, _connection: Any, _object: str, contents: bytes) -> Applied:
        if self.prepared <= self.outdated:
            raise Outdated("the thing changed meanwhile")
        self.done.append(contents)
        return Applied(None, {"done": True})


def administrator(site: Site, person: Person) -> Administrator:
    return Administrator(
        person.name, frozenset({Role.ADMIN}), "", person.key.public_key(), None
    )


@pytest.mark.parametrize("outdated", [0, 1, 2])
def test_what_is_outdated_is_prepared_again(site: Site, outdated: int) -> None:
    thing = Kind(outdated)
    office = Office(site.broker.core)
    admin = administrator(site, first(site))
    answer = office.submit(thing.kind, "x", b"contents", admin=admin, request="1")
    assert answer == {"done": True}
    assert (thing.prepared, thing.done) == (outdated + 1, [b"sealed contents"])


def test_after_three_rounds_it_is_refused(site: Site) -> None:
    thing = Kind(9)
    before = len(site.audit())
    with pytest.raises(Outdated) as refused:
        Office(site.broker.core).submit(
            thing.kind, "x", b"", admin=administrator(site, first(site)), request="1"
        )
    assert refused.value.http_status == 503
    assert (thing.prepared, thing.done, len(site.audit())) == (3, [], before)


@pytest.mark.parametrize("outdated", [0, 2, 3])
def test_a_proposal_is_prepared_when_it_is_complete(site: Site, outdated: int) -> None:
    alice = hire(site, "alice", "admin")
    thing = Kind(outdated)
    settings = AdminSettings(two_person=RULE)
    office = Office(site.broker.core, settings, ChangeKinds(thing.kind))
    boss, second = administrator(site, first(site)), administrator(site, alice)
    with pytest.raises(Proposed) as proposed:
        office.submit(thing.kind, "x", b"contents", admin=boss, request="1")
    assert thing.prepared == 0
    assert office.proposals is not None
    proposal = Proposal.from_json(proposed.value.summary["proposal"])
    one, two = proposal.sign(first(site).key), proposal.sign(alice.key)
    assert office.proposals.approve(proposal.id, one, boss, "2")["applied"] is False
    if outdated == 3:
        with pytest.raises(Outdated):
            office.proposals.approve(proposal.id, two, second, "3")
        # Nothing happened, not even the second signature; it can be tried again.
        assert office.proposals.one(proposal.id, second)["signed_by"] == [FIRST]
    done = office.proposals.approve(proposal.id, two, second, "4")
    assert done == {"id": proposal.id, "applied": True, "answer": {"done": True}}
    assert thing.done == [b"sealed contents"]


def test_what_only_takes_away_needs_one(site: Site) -> None:
    thing = Kind(0, reducing=True)
    office = Office(site.broker.core, AdminSettings(two_person=RULE), ChangeKinds(thing.kind))
    admin = administrator(site, first(site))
    assert office.submit(thing.kind, "x", b"", admin=admin, request="1") == {"done": True}


def test_a_change_that_fails_leaves_the_proposal(site: Site) -> None:
    alice = hire(site, "alice", "admin")
    refusals = ["no longer sound"]

    def apply(*_: Any) -> Applied:
        if refusals:
            raise Refused(refusals.pop())
        return Applied(None)

    kind = ChangeKind("thing.set", Role.ADMIN, lambda *_: None, apply, state=lambda *_: "")
    office = Office(site.broker.core, AdminSettings(two_person=RULE), ChangeKinds(kind))
    boss, second = administrator(site, first(site)), administrator(site, alice)
    with pytest.raises(Proposed) as proposed:
        office.submit(kind, "x", b"", admin=boss, request="1")
    proposal = Proposal.from_json(proposed.value.summary["proposal"])
    assert office.proposals is not None
    office.proposals.approve(proposal.id, proposal.sign(first(site).key), boss, "2")
    two = proposal.sign(alice.key)
    with pytest.raises(Refused, match="no longer sound"):
        office.proposals.approve(proposal.id, two, second, "3")
    assert office.proposals.approve(proposal.id, two, second, "4")["applied"] is True


# The bytes


def sample() -> Proposal:
    return Proposal.about(
        b"contents", kbs="ab", realm="simulated", action="a.b", object="o", state="",
        proposer="alice", created=1, expires=2,
    )  # fmt: skip


def test_a_proposal_reads_back() -> None:
    proposal = sample()
    value = jcs.parse_canonical(proposal.encode(), what="proposal", limit=4096)
    assert Proposal.from_json(value) == proposal
    assert proposal.is_about(b"contents")
    assert not proposal.is_about(b"Contents")
    assert sample().digest != proposal.digest


@pytest.mark.parametrize("member", list(sample().to_json()))
@pytest.mark.parametrize("value", [None, 1.5, [], True])
def test_bent_proposals_are_refused(member: str, value: Any) -> None:
    good = sample().to_json()
    for bent in ({**good, member: value}, {k: v for k, v in good.items() if k != member}):
        with pytest.raises(FormatError):
            Proposal.from_json(bent)
    with pytest.raises(FormatError):
        Proposal.from_json({**good, "more": 1})


def test_the_admin_app_can_be_opened_twice(site: Site) -> None:
    # One for each listener: they share the database and nothing else.
    assert admin_app(site.broker) is not admin_app(site.broker, AdminSettings(two_person=RULE))
