"""Every administrative route that there is: none forgets to ask who calls, and for which role."""

from __future__ import annotations

import re

import pytest
from fastapi.routing import APIRoute

from kbs.admin.app import admin_app
from kbs.admin.changes import Role
from tests.kbs.admin.crew import Person, first, hire
from tests.kbs.world import Site

OPEN = {"/healthz", "/readyz"}
"""What everybody may ask."""

ANYBODYS = {"whoami", "proposal", "proposal/{identifier}", "proposal/{identifier}/approve",
            "proposal/{identifier}/reject"}  # fmt: skip
"""What every administrator may ask; proposals then look at the role of the change."""

READS_BY_POST = {"audit/verify"}


def routes(site: Site) -> list[tuple[str, str, str]]:
    """Method, pattern, and a path that fits it, of every route."""
    found = []
    for route in admin_app(site.broker).routes:
        path = getattr(route, "path", "")
        if path in OPEN:
            continue
        assert isinstance(route, APIRoute), path
        filled = re.sub(r"\{identifier\}", "0" * 32, path)
        filled = re.sub(r"\{kind\}", "version", filled)
        filled = re.sub(r"(policy|policy-versions)/\{path:path\}", r"\1/resource/a/b/c", filled)
        filled = re.sub(r"\{policy_id:path\}", "default_cpu", filled)
        filled = re.sub(r"\{[a-z_]+:path\}", "a/b/c", filled)
        filled = re.sub(r"\{[a-z_]+\}", "x", filled)
        short = path.removeprefix("/kbs/v0/")
        found.extend((method, short, filled) for method in sorted(route.methods or ()))
    assert len(found) > 40
    return found


def call(person: Person, method: str, path: str) -> int:
    if path.startswith("/kbs/v0/"):
        return person.call(method, path.removeprefix("/kbs/v0/"), b"{}").status_code
    return person.call(method, "../.." + path, b"{}").status_code


def test_no_route_serves_strangers(site: Site) -> None:
    before = [row["action"] for row in site.audit() if row["action"] != "unauthenticated"]
    stranger = Person(site, "stranger")
    for method, pattern, path in routes(site):
        assert call(stranger, method, path) == 401, (method, pattern)
        answer = site.call(method, path, b"{}", app="admin")
        assert answer.status_code == 401, (method, pattern)
        assert answer.json()["type"].endswith("/AdminAuthAccess")
    after = [row["action"] for row in site.audit() if row["action"] != "unauthenticated"]
    assert after == before


def test_no_route_serves_one_without_a_role_of_ours(site: Site) -> None:
    from tests.kbs.admin.test_tokens import claims, jwt

    token = jwt(site.admin_key, claims(site.clock(), role="visitor"))
    for method, pattern, path in routes(site):
        headers = {"Authorization": f"Bearer {token}"}
        answer = site.call(method, path, b"{}", app="admin", headers=headers)
        assert answer.status_code == 403, (method, pattern)


def test_an_auditor_changes_nothing(site: Site) -> None:
    auditor = hire(site, "eve", "auditor")
    before = len(site.audit())
    refused = 0
    for method, pattern, path in routes(site):
        if method == "GET" or pattern in ANYBODYS | READS_BY_POST:
            continue
        assert call(auditor, method, path) == 403, (method, pattern)
        refused += 1
    new = site.audit()[before:]
    # Nothing happened, and the log says who tried.
    assert {(row["action"], row["decision"]) for row in new} == {("call.refuse", "deny")}
    assert {row["actor"]["name"] for row in new} == {"eve"}
    assert len(new) == refused


@pytest.mark.parametrize("role", [role for role in Role if role is not Role.ADMIN])
def test_no_role_but_admin_may_do_everything(site: Site, role: Role) -> None:
    person = hire(site, "one", role)
    statuses = {
        (method, pattern): call(person, method, path)
        for method, pattern, path in routes(site)
        if method != "GET" and pattern not in ANYBODYS
    }
    refused = {key for key, status in statuses.items() if status == 403}
    assert ("POST", "admin/{name}") in refused
    assert ("DELETE", "admin/{name}") in refused
    assert len(refused) > 8
    assert call(first(site), "GET", "/kbs/v0/whoami") == 200
