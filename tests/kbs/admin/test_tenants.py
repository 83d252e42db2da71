"""Administrators of one tenant: what they read and change, and what they never see."""

from __future__ import annotations

from typing import Any

import pytest

from cai.attest.jwk import b64u_encode
from kbs.cli.stock import DENY_ALL
from tests.kbs.admin.crew import Person, hire
from tests.kbs.admin.test_routes import call, routes
from tests.kbs.release.guests import lease, record
from tests.kbs.world import URI, Site, Visitor

WHOLE = {
    "key", "block", "audit", "audit/checkpoint", "audit/checkpoints", "audit/proof",
    "audit/consistency", "audit/frontier",
}  # fmt: skip
"""What names every tenant's objects."""


@pytest.fixture
def tenants(site: Site) -> dict[str, Person]:
    roles = ("auditor", "resource", "policy", "reference")
    return {name: hire(site, name, *roles, tenant=name) for name in ("models", "other")}


def test_nothing_of_the_whole_broker(site: Site, tenants: dict[str, Person]) -> None:
    seen = set()
    for method, pattern, path in routes(site):
        if method == "GET" and pattern in WHOLE:
            seen.add(pattern)
            assert call(tenants["models"], method, path) == 403, pattern
    assert seen == WHOLE


def test_resources_of_others_are_neither_changed_nor_listed(
    site: Site, tenants: dict[str, Person]
) -> None:
    for name, person in tenants.items():
        assert person.call("POST", f"resource/{name}/a/b", b"x").status_code == 200
    outsider = tenants["other"]
    for method, route in (
        ("POST", "resource/models/a/b"), ("DELETE", "resource/models/a/b"),
        ("GET", "resource-info/models/a/b"), ("POST", "resource-new/models/a/c"),
        ("POST", "resource-lease/models/a/b"), ("POST", "resource-restore/models/a/b"),
        ("POST", "resource-purge/models/a/b"),
    ):  # fmt: skip
        answer = outsider.call(method, route, b"{}" if method == "POST" else None)
        assert answer.status_code == 403, (method, route)
        assert answer.json()["code"] == "admin-tenant"
    denied = site.last("resource.purge")
    assert (denied["decision"], denied["actor"]["name"]) == ("deny", "other")
    assert denied["subject"] == "models/a/b"
    assert "change" not in denied
    listed: Any = outsider.call("GET", "resources").json()
    assert "models" not in str(listed)
    assert len(listed) == 1


def test_policies_of_others_and_of_everybody(site: Site, tenants: dict[str, Person]) -> None:
    body = {"policy": b64u_encode(DENY_ALL)}
    own, outsider = tenants["models"], tenants["other"]
    assert own.call("POST", "policy/resource/models", body).status_code == 200
    for route in ("policy/resource/models", "policy/resource/models/a", "resource-policy"):
        assert outsider.call("POST", route, body).status_code == 403, route
    assert outsider.call("DELETE", "policy/resource/models").status_code == 403
    assert outsider.call("GET", "policy/resource/models").status_code == 403
    assert own.call("GET", "policy/resource/models").status_code == 200


def test_administrators_of_others_are_not_listed(tenants: dict[str, Person]) -> None:
    listed = tenants["models"].call("GET", "admin").json()["admins"]
    assert [item["name"] for item in listed] == ["models"]


def test_leases_of_others_are_not_listed(
    site: Site, visitor: Visitor, tenants: dict[str, Person]
) -> None:
    site.broker.core.checkpoints.interval = 0.0
    site.allow(visitor)
    assert site.admin("POST", f"resource/{URI}", record()).status_code == 200
    held = lease(site, visitor)
    assert held.grant.lease in tenants["models"].call("GET", "lease").text
    assert tenants["other"].call("GET", "lease").json()["leases"] == []


def test_nobody_revokes_beyond_a_tenant(site: Site, tenants: dict[str, Person]) -> None:
    answer = tenants["models"].call("POST", "block/owner/" + "ab" * 32, b"why")
    assert answer.status_code == 403
    assert answer.json()["code"] == "admin-tenant"
