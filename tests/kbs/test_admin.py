"""The admin listener: who may call it, what it stores, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cai.attest.jwk import b64u_encode
from kbs.admin.tokens import make_admin_token
from kbs.audit.log import read_leaves
from kbs.resources.settings import MAX_RESOURCE
from tests.kbs.world import Site, Visitor

ALLOW = b"package policy\ndefault allow := true\n"


ROUTES = [
    ("POST", "resource/a/b/c"), ("POST", "resource-policy"), ("POST", "verification-policy"),
    ("GET", "resource-policy"), ("GET", "verification-policy"), ("GET", "audit"),
    ("GET", "policies"), ("GET", "policy/resource/"), ("GET", "policy-versions/resource/"),
    ("POST", "policy/resource/a"), ("DELETE", "policy/resource/a"), ("POST", "attestation-policy"),
    ("GET", "attestation-policies"), ("GET", "attestation-policy/default_cpu"),
    ("DELETE", "attestation-policy/default_cpu"), ("GET", "references"),
    ("POST", "reference-value"), ("GET", "reference-value/x"), ("DELETE", "reference-value/x"),
    ("POST", "reference-values"), ("POST", "reference-bundle/x"), ("DELETE", "reference-bundle/x"),
    ("POST", "reference-key/x"), ("DELETE", "reference-key/x"), ("GET", "rvps/query"),
    ("POST", "rvps/register"), ("DELETE", "rvps/delete/x"),
]


@pytest.mark.parametrize(("method", "route"), ROUTES)
def test_every_route_asks_for_the_token(site: Site, method: str, route: str) -> None:
    stranger = make_admin_token(Ed25519PrivateKey.generate(), now=site.clock())
    before = len([row for row in site.audit() if row["action"] != "unauthenticated"])
    for headers in ({}, {"Authorization": f"Bearer {stranger}"}):
        answer = site.call(method, f"/kbs/v0/{route}", b"x", app="admin", headers=headers)
        assert answer.status_code == 401
        assert answer.json()["type"].endswith("/AdminAuthAccess")
    assert len([row for row in site.audit() if row["action"] != "unauthenticated"]) == before
    assert site.last("unauthenticated")["details"] == {"admin": 1}


def test_admin_routes_answer_404_for_what_they_do_not_serve(site: Site) -> None:
    assert site.admin("POST", "nothing", {}).status_code == 404
    assert site.admin("GET", "nothing").status_code == 404
    assert site.admin("GET", "verification-policy").status_code == 404
    assert site.call("POST", "/kbs/v0/auth", b"{}", app="admin").status_code == 404


def test_the_protocol_is_not_on_the_admin_listener(site: Site) -> None:
    assert site.admin("GET", "resource/a/b/c").status_code == 404


@pytest.mark.parametrize("path", ["a/b", "a/b/c/d", "a/b/..", "a/b/c d", "a//c"])
def test_resources_must_be_named_well(site: Site, path: str) -> None:
    assert site.admin("POST", f"resource/{path}", b"x").status_code in (400, 404)


def test_empty_and_oversize_resources_are_refused(site: Site) -> None:
    assert site.admin("POST", "resource/a/b/c", b"").status_code == 400
    assert site.admin("POST", "resource/a/b/c", bytes(MAX_RESOURCE + 1)).status_code == 413
    assert site.admin("POST", "resource/a/b/c", bytes(MAX_RESOURCE)).json() == {"version": 1}


def test_changes_are_audited_with_who_and_what(site: Site) -> None:
    site.admin("POST", "resource/a/b/c", b"one")
    answer = site.set_policy("resource-policy", ALLOW)
    row = site.last("resource.set")
    assert row["actor"] == {"kind": "admin", "name": "admin", "roles": "admin"}
    assert row["change"]["object"] == "resource/a/b/c"
    assert row["change"]["version"] == 1
    row = site.last("policy.set")
    assert row["policies"] == {"resource/": answer.json()["sha256"]}
    assert row["request"] == answer.headers["x-request-id"]


def test_policies_can_be_read_back_exactly(site: Site, visitor: Visitor) -> None:
    from cai.attest.policy import policy_for

    verification = policy_for(visitor.facts())
    assert site.set_policy("resource-policy", ALLOW).status_code == 200
    assert site.set_policy("verification-policy", verification).status_code == 200
    assert site.admin("GET", "policy/resource/").json()["policy"] == b64u_encode(ALLOW)
    answer = site.admin("GET", "verification-policy").json()
    assert answer["policy"] == b64u_encode(verification)


def test_padding_of_the_policy_is_tolerated(site: Site) -> None:
    import base64

    padded = base64.urlsafe_b64encode(ALLOW).decode()
    assert padded.endswith("=")
    assert site.admin("POST", "resource-policy", {"policy": padded}).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"", b"x", {}, [], {"policy": None}, {"policy": 1}, {"policy": "!!"}, {"policy": ""},
        {"policy": b64u_encode(b"\xff")}, {"policy": b64u_encode(b"garbage")},
        {"policy": b64u_encode(b"package policy\nallow := {{{")},
        {"policy": b64u_encode(b"package policy\n")},
        {"policy": b64u_encode(b"package other\ndefault allow := true\n")},
        {"policy": b64u_encode(b"package policy\ndefault allow := 1\n")},
        {"policy": b64u_encode(ALLOW + b"\x00")},
        {"policy": b64u_encode(ALLOW + b"#" * (256 * 1024))},
    ],
)
def test_unsound_release_policies_are_not_stored(site: Site, body: Any) -> None:
    site.set_policy("resource-policy", ALLOW)
    answer = site.admin("POST", "resource-policy", body)
    assert answer.status_code in (400, 413)
    assert site.admin("GET", "policy/resource/").json()["policy"] == b64u_encode(ALLOW)


@pytest.mark.parametrize("text", [b"", b"x =", b"version = 1\n", b"\xff", b"version = 9\n[tdx]\n"])
def test_unsound_verification_policies_are_not_stored(site: Site, text: bytes) -> None:
    assert site.set_policy("verification-policy", text).status_code == 400
    assert site.admin("GET", "verification-policy").status_code == 404


def test_the_audit_route_serves_the_exact_leaves(site: Site) -> None:
    for number in range(5):
        site.admin("POST", f"resource/a/b/c{number}", b"x")
    _, leaves = read_leaves(site.broker.core.database, start=0, limit=100)
    answer = site.admin("GET", "audit?from=2&limit=3")
    assert answer.content == b'{"size":11,"rows":[%s]}' % b",".join(leaves[2:5])
    assert [row["seq"] for row in answer.json()["rows"]] == [2, 3, 4]


@pytest.mark.parametrize("query", ["from=-1", "from=x", "limit=9999", "from=1e3", "limit=٣"])
def test_bad_ranges_are_refused(site: Site, query: str) -> None:
    assert site.admin("GET", f"audit?{query}").status_code == 400
