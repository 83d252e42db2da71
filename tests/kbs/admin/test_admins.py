"""Stored administrators: added, confined, expired, removed, and never all of them."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import delete, select, update

from kbs.admin.people import NAME
from kbs.database.tables import ADMIN
from tests.kbs.admin.crew import Person, first, hire
from tests.kbs.world import Site

KEY = "ab" * 32


def roster(site: Site) -> dict[str, dict[str, Any]]:
    answer = first(site).call("GET", "admin")
    assert answer.status_code == 200, answer.text
    return {item["name"]: item for item in answer.json()["admins"]}


def test_the_first_key_is_the_administrator_admin(site: Site) -> None:
    assert set(roster(site)) == {"admin"}
    me = first(site).call("GET", "whoami").json()
    assert me == {
        "name": "admin", "roles": ["admin"], "tenant": "", "signs": True, "two_person": False,
    }  # fmt: skip


def test_an_administrator_is_stored_sealed_and_logged(site: Site) -> None:
    alice = hire(site, "alice", "policy", "auditor")
    listed = roster(site)["alice"]
    assert listed["key"] == alice.public
    assert (listed["roles"], listed["added_by"]) == (["auditor", "policy"], "admin")
    leaf = site.last("admin.set")
    assert leaf["actor"] == {"kind": "admin", "name": "admin", "roles": "admin"}
    assert leaf["change"]["object"] == "admin/alice"
    assert leaf["details"]["key"] == alice.public
    with site.broker.core.database.read() as connection:
        row = connection.execute(select(ADMIN)).one()
    assert alice.key.public_key().public_bytes_raw() not in row.sealed
    assert b"auditor" not in row.sealed


ROUTES = [
    ("GET", "audit", "auditor"), ("GET", "admin", "auditor"), ("POST", "admin/x", "admin"),
    ("DELETE", "admin/x", "admin"), ("POST", "resource/a/b/c", "resource"),
    ("POST", "resource-policy", "policy"), ("POST", "verification-policy", "policy"),
]


@pytest.mark.parametrize(("method", "route", "needed"), ROUTES)
def test_each_route_and_method_has_its_role(
    site: Site, method: str, route: str, needed: str
) -> None:
    for role in ("admin", "policy", "reference", "resource", "auditor"):
        person = hire(site, role + "-person", role)
        answer = person.call(method, route, {"policy": "!"})
        if role in (needed, "admin"):
            assert answer.status_code not in (401, 403), (role, answer.text)
        else:
            # Known, but not allowed: 403; only strangers get 401.
            assert answer.status_code == 403, (role, answer.text)
            assert answer.json()["code"] == "admin-role"
        stranger = Person(site, "stranger").call(method, route, b"x")
        assert stranger.status_code == 401


def test_reading_does_not_allow_writing(site: Site) -> None:
    auditor = hire(site, "eve", "auditor")
    assert auditor.call("GET", "audit").status_code == 200
    assert auditor.call("GET", "admin").status_code == 200
    assert auditor.call("POST", "admin/eve", {"key": KEY, "roles": ["admin"]}).status_code == 403


def test_a_token_cannot_name_its_person(site: Site) -> None:
    alice, bob = hire(site, "alice", "auditor"), hire(site, "bob", "auditor")
    del bob
    assert alice.call("GET", "whoami", subject="bob").json()["name"] == "alice"
    assert alice.call("GET", "whoami", subject="admin").json()["name"] == "alice"


def test_the_key_is_found_by_name_where_the_token_has_no_key_id(site: Site) -> None:
    from tests.kbs.admin.test_tokens import claims, jwt

    alice = hire(site, "alice", "auditor")
    for sub, status in (("alice", 200), ("admin", 401), ("bob", 401)):
        token = jwt(alice.key, claims(site.clock(), sub=sub, role="auditor"))
        headers = {"Authorization": f"Bearer {token}"}
        answer = site.call("GET", "/kbs/v0/whoami", app="admin", headers=headers)
        assert answer.status_code == status


def test_an_administrator_of_one_tenant(site: Site) -> None:
    from kbs.admin.changes import Applied, ChangeKind, Role, first_segment
    from kbs.admin.office import Office
    from tests.kbs.admin.test_tokens import make_admin_token

    alice = hire(site, "alice", "resource", "admin", tenant="models")
    office = Office(site.broker.core)
    token = make_admin_token(alice.key, now=site.clock())
    admin = office.authenticate(f"Bearer {token}")
    done: list[str] = []

    def apply(_core: Any, _connection: Any, object_id: str, _contents: bytes) -> Applied:
        done.append(object_id)
        return Applied(None)

    kind = ChangeKind(
        "thing.set", Role.RESOURCE, lambda *_: None, apply, tenant=first_segment
    )
    office.submit(kind, "models/a/b", b"", admin=admin, request="1")
    from cai.errors import Refused

    for other in ("other/a/b", "modelsx/a/b", "", "/models"):
        with pytest.raises(Refused) as refused:
            office.submit(kind, other, b"", admin=admin, request="1")
        assert refused.value.machine_code == "admin-tenant"
    assert done == ["models/a/b"]
    # What belongs to the whole broker is outside every tenant, also for the role admin.
    assert alice.call("POST", "admin/eve", {"key": KEY, "roles": ["admin"]}).status_code == 403


def test_an_expired_administrator_is_a_stranger(site: Site) -> None:
    from datetime import timedelta

    ends = int(site.clock().timestamp()) + 600
    alice = hire(site, "alice", "auditor", expires=ends)
    assert alice.call("GET", "whoami").status_code == 200
    site.clock.ahead += timedelta(seconds=601)
    assert alice.call("GET", "whoami").status_code == 401
    assert roster(site)["alice"]["living"] is False


def test_a_removed_administrator_is_a_stranger_at_once(site: Site) -> None:
    alice = hire(site, "alice", "admin")
    assert first(site).call("DELETE", "admin/alice").status_code == 200
    assert alice.call("GET", "whoami").status_code == 401
    assert set(roster(site)) == {"admin"}
    assert site.last("admin.remove")["change"]["row_hash"] == ""
    assert first(site).call("DELETE", "admin/alice").status_code == 404
    again = hire(site, "alice", "auditor")
    assert again.call("GET", "whoami").status_code == 200
    assert alice.call("GET", "whoami").status_code == 401


def test_a_change_by_one_who_was_removed_meanwhile_is_refused(site: Site) -> None:
    from cai.errors import Unauthenticated
    from kbs.admin.admins import ADMIN_SET
    from kbs.admin.office import Office
    from kbs.admin.people import AdminRecord
    from kbs.admin.tokens import make_admin_token

    alice = hire(site, "alice", "admin")
    office = Office(site.broker.core)
    admin = office.authenticate(f"Bearer {make_admin_token(alice.key, now=site.clock())}")
    first(site).call("DELETE", "admin/alice")
    record = AdminRecord(alice.key.public_key(), admin.roles).encode()
    with pytest.raises(Unauthenticated):
        office.submit(ADMIN_SET, "eve", record, admin=admin, request="1")
    assert set(roster(site)) == {"admin"}


def test_the_first_key_can_be_replaced_and_removed(site: Site) -> None:
    boss = hire(site, "boss", "admin")
    old = first(site)
    fresh = hire(site, "admin", "admin", by=boss)
    assert old.call("GET", "whoami").status_code == 401
    assert fresh.call("GET", "whoami").json()["name"] == "admin"
    assert boss.call("DELETE", "admin/admin").status_code == 200
    for person in (old, fresh):
        assert person.call("GET", "whoami").status_code == 401
    assert boss.call("GET", "whoami").json()["name"] == "boss"


def test_somebody_always_administers_the_whole_broker(site: Site) -> None:
    one = first(site)
    assert one.call("DELETE", "admin/admin").status_code == 409
    assert one.call("POST", "admin/admin", {"key": KEY, "roles": ["auditor"]}).status_code == 409
    hire(site, "alice", "policy")
    hire(site, "bob", "admin", tenant="models")
    hire(site, "carol", "admin", expires=int(site.clock().timestamp()) + 60)
    assert one.call("DELETE", "admin/admin").status_code == 409
    hire(site, "dave", "admin")
    assert one.call("DELETE", "admin/admin").status_code == 200


def test_a_key_is_one_person(site: Site) -> None:
    alice = hire(site, "alice", "auditor")
    for name, key in (("bob", alice.public), ("bob", first(site).public), ("admin", alice.public)):
        answer = first(site).call("POST", f"admin/{name}", {"key": key, "roles": ["admin"]})
        assert answer.status_code == 409
        assert "has this key already" in answer.json()["detail"]
    # The same person may get other roles under the same key.
    answer = first(site).call("POST", "admin/alice", {"key": alice.public, "roles": ["policy"]})
    assert answer.json() == {"name": "alice", "version": 2}


@pytest.mark.parametrize(
    "body",
    [
        b"", b"x", [], {}, {"key": KEY}, {"roles": ["admin"]}, {"key": KEY, "roles": []},
        {"key": KEY, "roles": "admin"}, {"key": KEY, "roles": ["owner"]},
        {"key": KEY, "roles": [1]}, {"key": KEY.upper(), "roles": ["admin"]},
        {"key": KEY[:-2], "roles": ["admin"]}, {"key": 1, "roles": ["admin"]},
        {"key": KEY, "roles": ["admin"], "expires": -1},
        {"key": KEY, "roles": ["admin"], "expires": True},
        {"key": KEY, "roles": ["admin"], "expires": "tomorrow"},
        {"key": KEY, "roles": ["admin"], "tenant": None},
        {"key": KEY, "roles": ["admin"], "tennant": "x"},
    ],
)
def test_unsound_records_are_refused(site: Site, body: Any) -> None:
    answer = first(site).call("POST", "admin/alice", body)
    assert answer.status_code == 400, answer.text
    assert set(roster(site)) == {"admin"}


@pytest.mark.parametrize("name", ["Alice", ".a", "a b", "corp:alice", "a" * 65, "ä", "a%00"])
def test_unsound_names_are_refused(site: Site, name: str) -> None:
    answer = first(site).call("POST", f"admin/{name}", {"key": KEY, "roles": ["admin"]})
    assert answer.status_code in (400, 404)
    assert not NAME.fullmatch(name)


def test_who_added_is_not_the_callers_word(site: Site) -> None:
    record = {"key": KEY, "roles": ["auditor"], "added_by": "somebody"}
    assert first(site).call("POST", "admin/alice", record).status_code == 200
    assert roster(site)["alice"]["added_by"] == "admin"


@pytest.mark.parametrize("how", ["delete", "swap", "roll back", "relabel"])
def test_an_edited_row_is_found(site: Site, how: str) -> None:
    alice = hire(site, "alice", "auditor")
    hire(site, "bob", "admin")
    database = site.broker.core.database
    with database.read() as connection:
        old = connection.execute(select(ADMIN).where(ADMIN.c.path == "alice")).one()
        bob = connection.execute(select(ADMIN).where(ADMIN.c.path == "bob")).one()
    if how == "roll back":
        record = {"key": alice.public, "roles": ["policy"]}
        assert first(site).call("POST", "admin/alice", record).status_code == 200
    of_alice = update(ADMIN).where(ADMIN.c.path == "alice")
    statement = {
        "delete": delete(ADMIN).where(ADMIN.c.path == "alice"),
        "swap": of_alice.values(sealed=bob.sealed),
        "roll back": of_alice.values(sealed=old.sealed, version=old.version),
        "relabel": of_alice.values(version=9),
    }[how]
    with database.write() as connection:
        connection.execute(statement)
    answer = alice.call("GET", "whoami", subject="alice")
    assert answer.status_code == 500
    assert "admin/alice" in answer.json()["detail"]


def test_a_key_id_of_another_finds_nothing(site: Site) -> None:
    alice = hire(site, "alice", "auditor")
    hire(site, "bob", "admin")
    with site.broker.core.database.write() as connection:
        connection.execute(
            update(ADMIN).where(ADMIN.c.path == "bob").values(key_id="0" * 32)
        )
        own = connection.execute(select(ADMIN.c.key_id).where(ADMIN.c.path == "alice")).scalar()
        connection.execute(
            update(ADMIN).where(ADMIN.c.path == "bob").values(key_id=own)
        )
    # Whichever row the index names, only its own key verifies.
    answer = alice.call("GET", "whoami", subject="alice")
    assert answer.status_code == 200
    assert answer.json()["name"] == "alice"
