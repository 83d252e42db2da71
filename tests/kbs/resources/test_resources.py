"""Resources as administrators meet them, and what an edited table cannot do."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import pytest

from cai import jcs
from cai.errors import Refused, Tampered
from kbs.audit.log import read_leaves
from kbs.resources.retention import sweep
from kbs.resources.rows import LeaseRule, record_marks
from kbs.resources.settings import ResourceSettings
from kbs.resources.store import Stale
from tests.kbs.resources.conftest import Edit
from tests.kbs.world import SECRET_TEXT, URI, Site, Visitor

RECORD = jcs.canonical(
    {"cai-key": 1, "kek": "11" * 32, "model_id": "22" * 32, "owner_key": "33" * 32}
)


def put(site: Site, path: str, contents: bytes) -> int:
    answer = site.admin("POST", f"resource/{path}", contents)
    assert answer.status_code == 200, answer.text
    version: int = answer.json()["version"]
    return version


def info(site: Site, path: str) -> dict[str, Any]:
    answer = site.admin("GET", f"resource-info/{path}")
    assert answer.status_code == 200, answer.text
    value: dict[str, Any] = answer.json()
    return value


def contents(site: Site, path: str) -> bytes | None:
    core = site.broker.core
    with core.database.read() as connection:
        sealed = core.resources.sealed(connection, path)
    return None if sealed is None else core.resources.open(sealed).contents


# Setting and listing.


def test_versions_count_up_and_stay(site: Site) -> None:
    for number, text in enumerate((b"one", b"two", b"three"), 1):
        assert put(site, "a/b/c", text) == number
    assert contents(site, "a/b/c") == b"three"
    shown = info(site, "a/b/c")
    assert shown["living"] == 3
    assert [item["version"] for item in shown["versions"]] == [3, 2, 1]
    assert all(item["intact"] and item["by"] == "admin" for item in shown["versions"])
    assert [item["size"] for item in shown["versions"]] == [5, 3, 3]


def test_each_version_has_a_key_of_its_own(site: Site) -> None:
    for _ in range(3):
        put(site, "a/b/c", b"same")
    core = site.broker.core
    with core.database.read() as connection:
        found = [core.resources.sealed(connection, "a/b/c", version) for version in (1, 2, 3)]
    keys = {
        core.instance.keyring.unwrap(item.stored.wrapped, item.stored.identity.encode()).reveal()
        for item in found if item is not None and item.stored is not None
    }
    assert len(keys) == 3


def test_listing_has_the_forks_shape_and_no_contents(site: Site) -> None:
    put(site, "models/minilm/key", b"planted-1")
    put(site, "models/other/key", b"planted-2")
    put(site, "team/x/y", b"planted-3")
    answer = site.admin("GET", "resources")
    assert [
        (item["repository_name"], item["resource_type"], item["resource_tag"])
        for item in answer.json()
    ] == [("models", "minilm", "key"), ("models", "other", "key"), ("team", "x", "y")]
    below = site.admin("GET", "resources?prefix=models").json()
    assert len(below) == 2
    assert len(site.admin("GET", "resources?prefix=models/other").json()) == 1
    assert site.admin("GET", "resources?prefix=model").json() == []
    assert len(site.admin("GET", "resources?after=models/minilm/key").json()) == 2
    told = answer.text + site.admin("GET", "resource-info/models/minilm/key").text
    assert "planted" not in told
    assert "planted" not in json.dumps(site.audit())


def test_contents_never_leave_through_the_admin_side(site: Site) -> None:
    put(site, "a/b/c", SECRET_TEXT)
    for method, route in (
        ("GET", "resource/a/b/c"), ("GET", "resource-info/a/b/c"), ("GET", "resources"),
        ("GET", "resource-info"), ("POST", "resource-restore/a/b/c"),
        ("POST", "resource-lease/a/b/c"), ("GET", "key"), ("GET", "audit"),
    ):
        answer = site.admin(method, route, b"required" if "lease" in route else None)
        assert SECRET_TEXT not in answer.content, route
    assert site.admin("GET", "resource/a/b/c").status_code in (404, 405)


@pytest.mark.parametrize("path", ["a/b", "a/b/c/d", "a/b/..", "a/b/c d", "a//c", ".a/b/c"])
@pytest.mark.parametrize("route", ["resource", "resource-new", "resource-restore",
                                   "resource-purge", "resource-lease", "resource-info"])
def test_names_are_checked_everywhere(site: Site, route: str, path: str) -> None:
    method = "GET" if route == "resource-info" else "POST"
    assert site.admin(method, f"{route}/{path}", b"").status_code in (400, 404)


def test_what_is_not_there_is_404(site: Site) -> None:
    assert site.admin("GET", "resource-info/a/b/c").status_code == 404
    assert site.admin("DELETE", "resource/a/b/c").status_code == 404
    assert site.admin("POST", "resource-restore/a/b/c").status_code == 404
    assert site.admin("POST", "resource-purge/a/b/c").status_code == 404
    assert site.admin("POST", "resource-lease/a/b/c", b"required").status_code == 404


@pytest.mark.parametrize(
    "query", ["prefix=%00", "after=a%00b", "prefix=a%20b", "prefix=%ff", "after=" + "a" * 5000,
              "prefix=a'--", "prefix=%25"],
)  # fmt: skip
def test_listing_takes_names_only(site: Site, query: str) -> None:
    for route in ("resources", "resource-info"):
        assert site.admin("GET", f"{route}?{query}").status_code in (400, 413)


# Limits.


def test_size_and_number_are_limited(site: Site) -> None:
    core = site.broker.core
    core.resources.settings = ResourceSettings(max_bytes=10, max_resources=2)
    assert site.admin("POST", "resource/a/b/c", b"x" * 11).status_code == 413
    assert site.admin("POST", "resource/a/b/c", b"").status_code == 400
    put(site, "a/b/c", b"x" * 10)
    put(site, "a/b/d", b"x")
    refused = site.admin("POST", "resource/a/b/e", b"x")
    assert refused.status_code == 413
    put(site, "a/b/d", b"y")
    assert contents(site, "a/b/e") is None


# Deleting, restoring, purging.


def test_a_deleted_resource_is_not_released_and_can_be_restored(
    allowed: Site, visitor: Visitor
) -> None:
    _, cookie = visitor.attested(allowed)
    assert visitor.open(allowed.get(cookie)) == SECRET_TEXT
    answer = allowed.admin("DELETE", f"resource/{URI}")
    assert answer.status_code == 200
    assert answer.json()["version"] == 2
    assert allowed.get(cookie).status_code == 404
    assert allowed.admin("GET", "resources").json() == []
    (listed,) = allowed.admin("GET", "resource-info").json()["resources"]
    assert listed["deleted"]
    assert allowed.admin("DELETE", f"resource/{URI}").status_code == 404
    restored = allowed.admin("POST", f"resource-restore/{URI}")
    assert restored.json()["version"] == 3
    assert visitor.open(allowed.get(cookie)) == SECRET_TEXT
    assert allowed.last("resource.restore")["change"]["version"] == 3


def test_an_older_version_can_be_brought_back(site: Site) -> None:
    put(site, "a/b/c", b"one")
    put(site, "a/b/c", b"two")
    refused = site.admin("POST", "resource-restore/a/b/c")
    assert refused.status_code == 403
    order = jcs.canonical({"version": 1})
    assert site.admin("POST", "resource-restore/a/b/c", order).json() == {"version": 3}
    assert contents(site, "a/b/c") == b"one"
    order = jcs.canonical({"version": 9})
    assert site.admin("POST", "resource-restore/a/b/c", order).status_code == 404


def test_setting_a_deleted_resource_goes_on_counting(site: Site) -> None:
    put(site, "a/b/c", b"one")
    site.admin("DELETE", "resource/a/b/c")
    assert put(site, "a/b/c", b"two") == 3


def test_purging_destroys_for_good(site: Site, edit: Edit) -> None:
    for text in (b"one", b"two", b"three"):
        put(site, "a/b/c", text)
    assert site.admin("POST", "resource-purge/a/b/c", jcs.canonical({"upto": 3})).status_code == 403
    assert site.admin("POST", "resource-purge/a/b/c", jcs.canonical({"upto": 1})).status_code == 200
    assert [item["version"] for item in info(site, "a/b/c")["versions"]] == [3, 2]
    assert site.admin("POST", "resource-purge/a/b/c").json() == {"upto": 2}
    assert site.admin("POST", "resource-purge/a/b/c").status_code == 404
    assert contents(site, "a/b/c") == b"three"
    site.admin("DELETE", "resource/a/b/c")
    assert site.admin("POST", "resource-purge/a/b/c").json() == {"upto": 3}
    assert site.admin("GET", "resource-info/a/b/c").status_code == 404
    assert site.admin("POST", "resource-restore/a/b/c").status_code == 404
    assert put(site, "a/b/c", b"four") == 5
    assert site.last("resource.purge")["change"]["object"] == "purged/a/b/c"


def test_retention_destroys_what_is_overdue_and_nothing_else(site: Site) -> None:
    core = site.broker.core
    core.resources.settings = ResourceSettings(keep_versions=2, keep_days=30)
    for text in (b"1", b"2", b"3", b"4"):
        put(site, "a/b/c", text)
    put(site, "a/b/old", b"x")
    site.admin("DELETE", "resource/a/b/old")
    put(site, "a/b/lives", b"x")
    assert sweep(core) == 0
    site.clock.ahead = timedelta(days=29)
    assert sweep(core) == 0
    site.clock.ahead = timedelta(days=31)
    assert sweep(core) == 2
    assert [item["version"] for item in info(site, "a/b/c")["versions"]] == [4, 3]
    assert site.admin("GET", "resource-info/a/b/old").status_code == 404
    assert contents(site, "a/b/lives") == b"x"
    assert sweep(core) == 0
    row = site.last("resource.purge")
    assert row["actor"] == {"kind": "system"}
    assert row["details"] == {"reason": "retention"}


def test_retention_can_be_asked_for(site: Site) -> None:
    put(site, "a/b/c", b"x")
    site.admin("DELETE", "resource/a/b/c")
    assert site.admin("POST", "resource-purge").json() == {"purged": 0}
    site.clock.ahead = timedelta(days=31)
    assert site.admin("POST", "resource-purge").json() == {"purged": 1}
    assert site.last("resource.purge")["actor"]["name"] == "admin"


# Generated keys.


@pytest.mark.parametrize(
    ("order", "length", "hexadecimal"),
    [({}, 32, False), ({"form": "hex"}, 64, True), ({"bytes": 48}, 48, False),
     ({"bytes": 16, "form": "hex"}, 32, True)],
)
def test_a_key_is_generated_and_nobody_sees_it(
    site: Site, order: dict[str, Any], length: int, hexadecimal: bool
) -> None:
    body = jcs.canonical(order) if order else b""
    answer = site.admin("POST", "resource-new/a/b/c", body)
    assert answer.json() == {"version": 1}
    made = contents(site, "a/b/c")
    assert made is not None
    assert len(made) == length
    if hexadecimal:
        assert set(made) <= set(b"0123456789abcdef")
    told = answer.content + json.dumps(site.audit()).encode()
    assert made not in told
    assert made.hex().encode() not in told


def test_generated_keys_differ_and_do_not_replace_unasked(site: Site) -> None:
    site.admin("POST", "resource-new/a/b/c")
    first = contents(site, "a/b/c")
    assert site.admin("POST", "resource-new/a/b/c").status_code == 403
    assert contents(site, "a/b/c") == first
    order = jcs.canonical({"replace": True})
    assert site.admin("POST", "resource-new/a/b/c", order).json() == {"version": 2}
    assert contents(site, "a/b/c") != first


@pytest.mark.parametrize(
    "order", [{"bytes": 15}, {"bytes": 1025}, {"bytes": "32"}, {"bytes": True}, {"form": "pem"},
              {"form": 1}, {"lease": "never"}, {"size": 32}, {"replace": 1}],
)
def test_other_orders_are_refused(site: Site, order: dict[str, Any]) -> None:
    assert site.admin("POST", "resource-new/a/b/c", jcs.canonical(order)).status_code == 400
    assert contents(site, "a/b/c") is None


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"bytes": 32}', b"null", b"x" * 5000])
def test_orders_are_canonical(site: Site, body: bytes) -> None:
    assert site.admin("POST", "resource-new/a/b/c", body).status_code in (400, 413)


# Leases.


def test_a_record_requires_a_lease_and_names_owner_and_model(site: Site) -> None:
    put(site, "a/b/c", RECORD)
    (version,) = info(site, "a/b/c")["versions"]
    assert version["lease"] == "required"
    assert version["owner"] == "33" * 32
    assert version["model"] == "22" * 32
    put(site, "a/b/plain", b"password")
    (version,) = info(site, "a/b/plain")["versions"]
    assert (version["lease"], version["owner"], version["model"]) == ("optional", "", "")


@pytest.mark.parametrize(
    "text", [b"", b"{}", b"{", b'{"cai-key": 1}', b"[1]", b'{"cai":1}', b"\xff\xfe", b"{" * 1000,
             RECORD + b"\n", b" " + RECORD, b'{"cai-key":1,"cai-key":2}'],
)
def test_what_is_no_canonical_record_has_no_marks(text: bytes) -> None:
    assert record_marks(text) is None


def test_marks_of_another_form_are_left_out() -> None:
    odd = jcs.canonical({"cai-key": 1, "owner_key": "AB" * 32, "model_id": 7})
    marks = record_marks(odd)
    assert marks is not None
    assert (marks.owner, marks.model) == ("", "")


def test_the_rule_can_be_changed_and_is_never_loosened_silently(site: Site) -> None:
    put(site, "a/b/c", b"one")
    assert site.admin("POST", "resource-lease/a/b/c", b"required").json() == {"version": 2}
    assert put(site, "a/b/c", b"two") == 3
    assert info(site, "a/b/c")["versions"][0]["lease"] == "required"
    assert contents(site, "a/b/c") == b"two"
    site.admin("POST", "resource-lease/a/b/c", b"optional")
    assert contents(site, "a/b/c") == b"two"
    assert info(site, "a/b/c")["versions"][0]["lease"] == "optional"
    assert site.last("resource.lease")["details"] == {"lease": "optional"}
    for bad in (b"", b"never", b"required\n", b"\xff"):
        assert site.admin("POST", "resource-lease/a/b/c", bad).status_code == 400


def test_a_loosened_rule_in_the_database_is_found(site: Site, edit: Edit) -> None:
    put(site, "a/b/c", RECORD)
    edit("UPDATE resource SET lease = 'optional'")
    core = site.broker.core
    with core.database.read() as connection, pytest.raises(Tampered, match="audit log"):
        core.resources.sealed(connection, "a/b/c")


# Two at once.


def test_a_preparation_that_came_too_late_is_stale(site: Site) -> None:
    core = site.broker.core
    late = core.resources.prepare("a/b/c", b"late")
    put(site, "a/b/c", b"first")
    with core.database.decide() as connection, pytest.raises(Stale, match="another version"):
        core.resources.put(connection, late)
    assert contents(site, "a/b/c") == b"first"


def test_a_preparation_from_before_a_rotation_is_stale(site: Site) -> None:
    core = site.broker.core
    late = core.resources.prepare("a/b/c", b"late", lease=LeaseRule.OPTIONAL)
    assert site.admin("POST", "key/rotate").status_code == 200
    with core.database.decide() as connection, pytest.raises(Stale, match="rotated"):
        core.resources.put(connection, late)


def test_the_living_version_is_never_purged(site: Site) -> None:
    put(site, "a/b/c", b"one")
    core = site.broker.core
    with core.database.decide() as connection, pytest.raises(Refused, match="in use"):
        core.resources.purge(connection, "a/b/c", 7)


# Rows that were edited.


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE resource SET path = 'a/b/d' WHERE path = 'a/b/c' AND version = 2",
        "UPDATE resource SET version = 7 WHERE path = 'a/b/c' AND version = 2",
        "UPDATE resource SET owner = '" + "44" * 32 + "'",
        "UPDATE resource SET model = '" + "44" * 32 + "'",
        "UPDATE resource SET lease = 'required' WHERE path = 'a/b/c'",
        "UPDATE resource SET lease = 'sometimes'",
        "UPDATE resource SET size = size + 1",
        "UPDATE resource SET created = created + 1",
        "UPDATE resource SET sealed = substr(sealed, 1, length(sealed) - 1)",
        "UPDATE resource SET sealed = x''",
        "UPDATE resource SET sealed = zeroblob(100)",
        "UPDATE resource SET wrapped = zeroblob(112)",
        "UPDATE resource SET wrapped = substr(wrapped, 1, 40)",
        "UPDATE resource SET wrapped = x''",
        "UPDATE resource SET wrapped = (SELECT wrapped FROM resource WHERE path = 'x/y/z')",
        "UPDATE resource SET wrapped = (SELECT wrapped FROM resource r WHERE r.path = 'a/b/c'"
        " AND r.version = 1)",
        "UPDATE resource SET sealed = (SELECT sealed FROM resource WHERE path = 'x/y/z')",
        "DELETE FROM resource WHERE path = 'a/b/c' AND version = 2",
        "DELETE FROM resource",
        "UPDATE resource SET version = 3 WHERE path = 'a/b/c' AND version = 1",
    ],
)
def test_an_edited_row_is_never_opened(site: Site, edit: Edit, statement: str) -> None:
    put(site, "a/b/c", b"one")
    put(site, "a/b/c", b"two")
    put(site, "x/y/z", b"another")
    edit(statement)
    with pytest.raises(Tampered):
        contents(site, "a/b/c")


def test_a_key_from_another_provider_is_503_and_nothing_is_lost(site: Site, edit: Edit) -> None:
    put(site, "a/b/c", b"one")
    edit("UPDATE resource SET provider = provider || '0'")
    from cai.errors import Unavailable

    with pytest.raises(Unavailable, match="not configured"):
        contents(site, "a/b/c")
    edit("UPDATE resource SET provider = substr(provider, 1, length(provider) - 1)")
    assert contents(site, "a/b/c") == b"one"


def test_an_edited_older_version_is_not_restored(site: Site, edit: Edit) -> None:
    put(site, "a/b/c", b"one")
    put(site, "a/b/c", b"two")
    edit("UPDATE resource SET created = created - 1 WHERE version = 1")
    assert [item["intact"] for item in info(site, "a/b/c")["versions"]] == [True, False]
    order = jcs.canonical({"version": 1})
    answer = site.admin("POST", "resource-restore/a/b/c", order)
    assert answer.status_code == 500
    assert contents(site, "a/b/c") == b"two"


def test_a_row_put_over_a_deleted_resource_is_found(site: Site, edit: Edit) -> None:
    put(site, "a/b/c", b"one")
    site.admin("DELETE", "resource/a/b/c")
    edit("UPDATE resource SET version = 3")
    with pytest.raises(Tampered):
        contents(site, "a/b/c")
    assert site.admin("POST", "resource/a/b/c", b"new").status_code == 500


def test_what_is_logged_names_each_change(site: Site) -> None:
    put(site, "a/b/c", b"one")
    site.admin("DELETE", "resource/a/b/c")
    _, leaves = read_leaves(site.broker.core.database, start=0, limit=100)
    changes = [
        value["change"] for value in map(json.loads, leaves)
        if value.get("change", {}).get("object") == "resource/a/b/c"
    ]
    assert [(item["version"], bool(item["row_hash"])) for item in changes] == [
        (1, True), (2, False),
    ]
