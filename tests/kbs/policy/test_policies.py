"""Policies at the broker: which one applies, versions, Trustee's routes, who may read them."""

from __future__ import annotations

import base64
import json
import sqlite3
from typing import Any

import pytest

from cai.attest.jwk import b64u_encode
from cai.attest.policy import policy_for
from cai.errors import FormatError
from kbs.names import ResourceName
from kbs.policy.names import PolicyName, TeeClass, prefixes
from kbs.policy.store import parse_binding
from tests.kbs.world import SECRET_TEXT, URI, Site, Visitor

ALLOW = b"package policy\ndefault allow := true\n"
DENY = b"package policy\ndefault allow := false\n"
OTHER_URI = "others/minilm/key"


def put(site: Site, name: str, text: bytes) -> Any:
    answer = site.admin("POST", f"policy/{name}", {"policy": b64u_encode(text)})
    assert answer.status_code == 200, answer.text
    return answer.json()


def checks(site: Site) -> dict[str, str]:
    return {item["name"]: item["outcome"] for item in site.last("release")["checks"]}


# Names.


@pytest.mark.parametrize(
    ("text", "tenant"),
    [
        ("resource/", ""), ("resource/models", "models"), ("resource/models/a/b", "models"),
        ("binding/", ""), ("binding/models", "models"), ("verification/default", ""),
        ("verification/models/strict", "models"), ("attestation/default_cpu", ""),
        ("attestation/models/my_id_gpu", "models"), ("attestation/a_switch", ""),
    ],
)  # fmt: skip
def test_names(text: str, tenant: str) -> None:
    name = PolicyName.parse(text)
    assert name.path == text
    assert name.tenant == tenant


@pytest.mark.parametrize(
    "text",
    [
        "", "resource", "other/x", "resource//", "resource/a//b", "resource/a/b/c/d",
        "resource/a b", "resource/..", "resource/.a", "verification/", "verification/a/b/c",
        "attestation/default", "attestation/_cpu", "attestation/default_ppcie", "binding/a/",
        "verification/" + "x" * 200, "Resource/", "resource/ä",
    ],
)  # fmt: skip
def test_other_names_are_refused(text: str) -> None:
    with pytest.raises(FormatError):
        PolicyName.parse(text)


def test_prefixes_of_a_resource() -> None:
    name = ResourceName.parse("a/b/c")
    assert prefixes(name) == ("a/b/c", "a/b", "a", "")


@pytest.mark.parametrize("text", [b"", b"a b", b"\xff", b"a/b", b"a\n\n", b"x" * 300])
def test_bindings_name_one_id(text: bytes) -> None:
    assert parse_binding(b"strict\n") == "strict"
    with pytest.raises(Exception, match=r"policy id|binding"):
        parse_binding(text)


# Which one applies.


def test_the_most_specific_resource_policy_wins(allowed: Site, visitor: Visitor) -> None:
    _, cookie = visitor.attested(allowed)
    assert visitor.open(allowed.get(cookie)) == SECRET_TEXT
    for deny, allow in (("models", "models/minilm"), ("models/minilm", URI)):
        put(allowed, f"resource/{deny}", DENY)
        assert allowed.get(cookie).status_code == 403
        put(allowed, f"resource/{allow}", ALLOW)
        assert allowed.get(cookie).status_code == 200
    digests = allowed.last("release")["policies"]
    assert f"resource/{URI}" in digests
    assert "resource/" not in digests


def test_a_policy_of_another_prefix_says_nothing(allowed: Site, visitor: Visitor) -> None:
    for prefix in ("others", "models/other", "models/minilm/other", "model"):
        put(allowed, f"resource/{prefix}", DENY)
    _, cookie = visitor.attested(allowed)
    assert allowed.get(cookie).status_code == 200


def test_a_removed_policy_no_longer_applies(allowed: Site, visitor: Visitor) -> None:
    _, cookie = visitor.attested(allowed)
    put(allowed, "resource/models", DENY)
    assert allowed.get(cookie).status_code == 403
    assert allowed.admin("DELETE", "policy/resource/models").json() == {"version": 2}
    assert allowed.get(cookie).status_code == 200
    assert allowed.admin("DELETE", "policy/resource/").status_code == 200
    assert allowed.get(cookie).status_code == 403
    assert checks(allowed)["policy.release"] == "fail"
    assert allowed.admin("DELETE", "policy/resource/").status_code == 404


def test_a_change_takes_effect_for_old_sessions(allowed: Site, visitor: Visitor) -> None:
    _, cookie = visitor.attested(allowed)
    assert allowed.get(cookie).status_code == 200
    strict = policy_for(visitor.facts(), launch_digest="cd" * 48)
    put(allowed, "verification/default", strict)
    assert allowed.get(cookie).status_code == 403
    assert checks(allowed)["guest.launch_digest"] == "fail"
    assert checks(allowed)["release.allow"] == "not asked"


def test_a_binding_picks_the_policies(allowed: Site, visitor: Visitor) -> None:
    _, cookie = visitor.attested(allowed)
    put(allowed, "binding/models", b"strict")
    assert allowed.get(cookie).status_code == 403
    assert checks(allowed)["policy.verification"] == "fail"
    put(allowed, "verification/strict", policy_for(visitor.facts()))
    assert allowed.get(cookie).status_code == 200
    assert "binding/models" in allowed.last("release")["policies"]
    put(allowed, f"binding/{URI}", b"stricter")
    assert allowed.get(cookie).status_code == 403


def test_a_tenants_policy_wins_over_everybodys(allowed: Site, visitor: Visitor) -> None:
    strict = policy_for(visitor.facts(), launch_digest="cd" * 48)
    put(allowed, "verification/models/default", strict)
    allowed.admin("POST", f"resource/{OTHER_URI}", SECRET_TEXT)
    _, cookie = visitor.attested(allowed)
    assert allowed.get(cookie).status_code == 403
    assert allowed.get(cookie, OTHER_URI).status_code == 200
    assert "verification/default" in allowed.last("release")["policies"]


# A client that names a policy.


def select(site: Site, visitor: Visitor, selector: str) -> str:
    answer = site.call(
        "POST", "/kbs/v0/auth",
        {"version": "0.4.0", "tee": "tdx",
         "extra-params": {"attestation-policy-selector": selector}},
    )  # fmt: skip
    assert answer.status_code == 200, answer.text
    cookie = answer.cookies["kbs-session-id"]
    assert site.attest(cookie, visitor.body(answer.json()["nonce"])).status_code == 200
    return cookie


def test_a_client_may_name_the_bound_policy_and_no_other(allowed: Site, visitor: Visitor) -> None:
    assert allowed.get(select(allowed, visitor, "default")).status_code == 200
    put(allowed, "verification/lax", policy_for(visitor.facts()))
    cookie = select(allowed, visitor, "lax")
    assert allowed.get(cookie).status_code == 403
    assert checks(allowed)["policy.selector"] == "fail"
    put(allowed, "binding/models", b"lax")
    assert allowed.get(cookie).status_code == 200


# Attestation policies at a release.

CLAIMS = b"""package policy
import rego.v1
trust_claims := {"hardware": hardware, "executables": 3, "configuration": 2}
default hardware := 97
hardware := 2 if input.tdx.quote.body.mr_td in query_reference_value("mr_td")
"""


def test_an_attestation_policy_decides_the_status(allowed: Site, visitor: Visitor) -> None:
    _, cookie = visitor.attested(allowed)
    put(allowed, "attestation/default_cpu", CLAIMS)
    assert allowed.get(cookie).status_code == 403
    assert checks(allowed)["attestation.cpu0"] == "pass"
    assert checks(allowed)["release.allow"] == "fail"
    values = {"mr_td": [visitor.facts().tdx.body["mr_td"]]}
    payload = base64.b64encode(json.dumps(values).encode()).decode()
    message = {"version": "0.1.0", "type": "sample", "payload": payload}
    assert allowed.admin("POST", "reference-value", message).status_code == 200
    assert allowed.get(cookie).status_code == 200
    assert len(allowed.last("release")["policies"]["reference"]) == 64


@pytest.mark.parametrize(
    "rule",
    [
        b"trust_claims := {\"hardware\": 1 / 0} if input.tdx",
        b"trust_claims := {\"nothing\": 2} if input.tdx",
        b"trust_claims := {\"hardware\": 2}\ntrust_claims := {\"hardware\": 3} if input.tdx",
    ],
)  # fmt: skip
def test_an_attestation_policy_that_errors_denies(
    allowed: Site, visitor: Visitor, rule: bytes
) -> None:
    put(allowed, "attestation/default_cpu", b"package policy\nimport rego.v1\n" + rule)
    put(allowed, "resource/", ALLOW)
    _, cookie = visitor.attested(allowed)
    assert allowed.get(cookie).status_code == 403
    assert checks(allowed)["attestation.cpu0"] == "fail"


def test_an_attestation_policy_lifts_no_check(allowed: Site, visitor: Visitor) -> None:
    """Its praise is worth nothing where policy.toml refuses."""
    praise = b'package policy\ntrust_claims := {"hardware": 2, "executables": 2}\n'
    for tee in TeeClass:
        put(allowed, f"attestation/default_{tee}", praise)
    put(allowed, "resource/", ALLOW)
    put(allowed, "verification/default", policy_for(visitor.facts(), launch_digest="cd" * 48))
    _, cookie = visitor.attested(allowed)
    assert allowed.get(cookie).status_code == 403


def test_without_policy_toml_an_attestation_policy_is_not_enough(
    site: Site, visitor: Visitor
) -> None:
    put(site, "attestation/default_cpu", b'package policy\ntrust_claims := {"hardware": 2}\n')
    put(site, "resource/", ALLOW)
    site.admin("POST", f"resource/{URI}", SECRET_TEXT)
    _, cookie = visitor.attested(site)
    assert site.get(cookie).status_code == 403
    assert checks(site)["policy.verification"] == "fail"


# Versions.


def test_versions_say_when_by_whom_and_what(site: Site) -> None:
    first, second = put(site, "resource/", ALLOW), put(site, "resource/", DENY)
    assert (first["version"], second["version"]) == (1, 2)
    site.admin("DELETE", "policy/resource/")
    third = put(site, "resource/", ALLOW)
    assert third["version"] == 4
    notes = site.admin("GET", "policy-versions/resource/").json()["versions"]
    assert [note["version"] for note in notes] == [1, 2, 3, 4]
    assert [note["removed"] for note in notes] == [False, False, True, False]
    assert [note["sha256"] for note in notes] == [
        first["sha256"], second["sha256"], "", first["sha256"],
    ]  # fmt: skip
    assert {note["author"] for note in notes} == {"admin"}
    assert all(note["time"].endswith("Z") for note in notes)
    old = site.admin("GET", "policy/resource/?version=2").json()
    assert old["policy"] == b64u_encode(DENY)
    assert site.admin("GET", "policy/resource/").json()["policy"] == b64u_encode(ALLOW)
    for version in ("3", "5", "0"):
        assert site.admin("GET", f"policy/resource/?version={version}").status_code == 404
    assert site.admin("GET", "policy-versions/resource/x").status_code == 404


def test_the_list_names_what_is_in_force(site: Site) -> None:
    for name in ("resource/", "resource/models", "resource/gone"):
        put(site, name, DENY)
    put(site, "binding/models", b"strict")
    site.admin("DELETE", "policy/resource/gone")
    listed = site.admin("GET", "policies").json()["policies"]
    assert [item["policy"] for item in listed] == ["binding/models", "resource/", "resource/models"]
    assert all(len(item["sha256"]) == 64 for item in listed)


# Trustee's routes, and its fork's.


def test_trustees_routes(site: Site) -> None:
    assert site.admin("GET", "resource-policy").json() == []
    assert site.set_policy("resource-policy", DENY).status_code == 200
    assert site.admin("GET", "resource-policy").json() == ["resource-policy"]
    put(site, "resource/models", DENY)
    assert site.admin("GET", "resource-policy").json() == [
        "resource-policy", "resource-policy/models",
    ]  # fmt: skip
    text = b64u_encode(CLAIMS)
    for policy_id in ("default_cpu", "default_gpu", "strict_cpu"):
        body = {"type": "rego", "policy_id": policy_id, "policy": text}
        assert site.admin("POST", "attestation-policy", body).status_code == 200
    assert site.admin("GET", "attestation-policies").json() == [
        "default_cpu", "default_gpu", "strict_cpu",
    ]  # fmt: skip
    assert site.admin("GET", "attestation-policy/strict_cpu").json()["policy"] == text
    assert site.admin("GET", "attestation-policy/strict").json()["policy"] == text
    assert site.admin("DELETE", "attestation-policy/strict_cpu").status_code == 200
    assert site.admin("GET", "attestation-policy/strict_cpu").status_code == 404


@pytest.mark.parametrize(
    "body",
    [
        b"", b"x", {}, [], {"policy_id": "default_cpu"}, {"policy_id": 1, "policy": ""},
        {"policy_id": "a b_cpu", "policy": b64u_encode(CLAIMS)},
        {"policy_id": "default_cpu", "policy": b64u_encode(b"package other\n")},
        {"policy_id": "default_cpu", "policy": b64u_encode(ALLOW)},
        {"policy_id": "../default_cpu", "policy": b64u_encode(CLAIMS)},
    ],
)  # fmt: skip
def test_unsound_attestation_policies_are_not_stored(site: Site, body: Any) -> None:
    assert site.admin("POST", "attestation-policy", body).status_code in (400, 413)
    assert site.admin("GET", "attestation-policies").json() == []


def test_padding_and_both_alphabets_are_read(site: Site) -> None:
    text = DENY + "# ???>>>~~~ÿÿÿ\n".encode()
    for encode in (base64.standard_b64encode, base64.urlsafe_b64encode):
        body = {"policy": encode(text).decode()}
        assert site.admin("POST", "policy/resource/a", body).status_code == 200
        assert site.admin("GET", "policy/resource/a").json()["policy"] == b64u_encode(text)


# A database that somebody edits.


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM policy WHERE path = 'resource/'",
        "DELETE FROM policy WHERE path = 'resource/' AND version = 2",
        "UPDATE policy SET sealed = zeroblob(100) WHERE path = 'resource/'",
        "UPDATE policy SET path = 'resource/moved' WHERE path = 'resource/' AND version = 2",
        "UPDATE policy SET version = 3 WHERE path = 'resource/' AND version = 2",
        "INSERT INTO policy SELECT 'resource/models', 1, sealed FROM policy"
        " WHERE path = 'resource/' AND version = 1",
        "INSERT INTO policy SELECT path, 3, sealed FROM policy"
        " WHERE path = 'resource/' AND version = 1",
    ],
)
def test_an_edited_policy_is_detected(allowed: Site, visitor: Visitor, statement: str) -> None:
    put(allowed, "resource/", ALLOW)
    _, cookie = visitor.attested(allowed)
    assert allowed.get(cookie).status_code == 200
    with sqlite3.connect(allowed.settings.data / "kbs.sqlite") as connection:
        connection.execute(statement)
    connection.close()
    answer = allowed.get(cookie)
    assert answer.status_code == 500
    assert "policy/resource/" in answer.json()["detail"]


def test_an_edited_old_version_is_detected(site: Site) -> None:
    put(site, "resource/", ALLOW)
    put(site, "resource/", DENY)
    with sqlite3.connect(site.settings.data / "kbs.sqlite") as connection:
        connection.execute("UPDATE policy SET sealed = (SELECT sealed FROM policy WHERE version=2)"
                           " WHERE version = 1")  # fmt: skip
    connection.close()
    assert site.admin("GET", "policy/resource/").status_code == 200
    assert site.admin("GET", "policy/resource/?version=1").status_code == 500
