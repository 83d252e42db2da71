"""Reference values: who may say what, until when, and that an end is an end."""

from __future__ import annotations

import base64
import itertools
import json
import sqlite3
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cai import jcs
from cai.errors import FormatError, InputError
from kbs.policy.reference_keys import ReferenceKey, SignedBundle
from kbs.policy.reference_store import ReferenceName
from kbs.policy.references import Bundle, parse_message
from tests.kbs.world import Clock, Site, Visitor

NOW = datetime.now(UTC).replace(microsecond=0)
ED = Ed25519PrivateKey.generate()
EC = ec.generate_private_key(ec.SECP256R1())


def pem(key: Any) -> bytes:
    data: bytes = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return data


def bundle(name: str = "release", values: Any = None, **times: timedelta) -> Bundle:
    issued = NOW + times.get("issued", timedelta())
    return Bundle(
        name, issued, issued + times.get("life", timedelta(days=30)), values or {"rtmr_1": ["aa"]}
    )


def signed(what: Bundle, key: Any = ED) -> bytes:
    data = what.encode()
    if isinstance(key, Ed25519PrivateKey):
        return SignedBundle(data, key.sign(data)).encode()
    return SignedBundle(data, key.sign(data, ec.ECDSA(hashes.SHA256()))).encode()


def message(values: Any) -> dict[str, Any]:
    payload = base64.b64encode(json.dumps(values).encode()).decode()
    return {"version": "0.1.0", "type": "sample", "payload": payload}


def value(site: Site, name: str, tenant: str = "") -> Any:
    answer = site.admin("GET", f"reference-value/{name}" + (f"?tenant={tenant}" if tenant else ""))
    return answer.json() if answer.status_code == 200 else answer.status_code


@pytest.fixture
def keyed(site: Site) -> Site:
    assert site.admin("POST", "reference-key/owner", pem(ED)).status_code == 200
    assert site.admin("POST", "reference-key/cosign", pem(EC)).status_code == 200
    return site


# Bundles.


@pytest.mark.parametrize("key", [ED, EC])
def test_a_signed_bundle_is_in_force(keyed: Site, key: Any) -> None:
    what = bundle(values={"rtmr_1": ["aa", "bb"], "svn": 3, "kbs:///a/b:1": {"x": None}})
    answer = keyed.admin("POST", "reference-bundle/release", signed(what, key))
    assert answer.status_code == 200, answer.text
    assert answer.json()["values"] == 3
    assert value(keyed, "rtmr_1") == ["aa", "bb"]
    assert value(keyed, "svn") == 3
    assert value(keyed, "kbs:///a/b:1") == {"x": None}
    assert value(keyed, "rtmr_2") == 404
    row = keyed.last("reference.set")
    assert row["change"]["object"] == "reference/bundle//release"
    assert row["details"]["signer"] == ("key//owner" if key is ED else "key//cosign")


def test_nobody_elses_signature_counts(keyed: Site) -> None:
    good = json.loads(signed(bundle()))
    stranger = signed(bundle(), Ed25519PrivateKey.generate())
    other = json.loads(signed(bundle(values={"rtmr_1": ["bb"]})))
    for body in (
        stranger,
        json.dumps({**good, "bundle": other["bundle"]}).encode(),
        json.dumps({**good, "signature": ""}).encode(),
        json.dumps({**good, "signature": base64.b64encode(bytes(64)).decode()}).encode(),
    ):
        answer = keyed.admin("POST", "reference-bundle/release", body)
        assert answer.status_code == 403
        assert answer.json()["code"] == "reference-signature"
    assert value(keyed, "rtmr_1") == 404


def test_without_a_registered_key_nothing_is_taken(site: Site) -> None:
    assert site.admin("POST", "reference-bundle/release", signed(bundle())).status_code == 403


def test_a_bundle_ends(keyed: Site, clock: Clock) -> None:
    life = timedelta(hours=1)
    keyed.admin("POST", "reference-bundle/release", signed(bundle(life=life)))
    assert value(keyed, "rtmr_1") == ["aa"]
    clock.ahead = timedelta(hours=1, seconds=1)
    assert value(keyed, "rtmr_1") == 404
    listed = keyed.admin("GET", "references").json()
    assert [item["expired"] for item in listed["bundles"]] == [True]
    assert [item["expired"] for item in listed["values"]] == [True]


def test_times_of_a_bundle_are_held_against_the_clock(keyed: Site) -> None:
    for what, code in (
        (bundle(issued=timedelta(days=-2), life=timedelta(days=1)), "reference-expired"),
        (bundle(issued=timedelta(hours=1)), "reference-future"),
    ):
        answer = keyed.admin("POST", "reference-bundle/release", signed(what))
        assert answer.status_code == 403
        assert answer.json()["code"] == code


def test_a_bundle_is_not_rolled_back(keyed: Site) -> None:
    newer, older = bundle(values={"a": 2}), bundle(values={"a": 1}, issued=timedelta(hours=-1))
    assert keyed.admin("POST", "reference-bundle/release", signed(newer)).status_code == 200
    answer = keyed.admin("POST", "reference-bundle/release", signed(older))
    assert answer.json()["code"] == "reference-rollback"
    assert value(keyed, "a") == 2
    newest = bundle(values={"b": 1}, issued=timedelta(minutes=1))
    assert keyed.admin("POST", "reference-bundle/release", signed(newest)).status_code == 200
    assert value(keyed, "a") == 404


def test_a_value_comes_from_one_bundle(keyed: Site) -> None:
    keyed.admin("POST", "reference-bundle/one", signed(bundle("one")))
    assert keyed.admin("POST", "reference-bundle/two", signed(bundle("two"))).status_code == 400
    assert keyed.admin("DELETE", "reference-bundle/one").status_code == 200
    assert keyed.admin("POST", "reference-bundle/two", signed(bundle("two"))).status_code == 200


def test_the_name_is_part_of_what_is_signed(keyed: Site) -> None:
    assert keyed.admin("POST", "reference-bundle/other", signed(bundle())).status_code == 400


def test_what_a_removed_key_signed_is_not_in_force(keyed: Site) -> None:
    keyed.admin("POST", "reference-bundle/release", signed(bundle()))
    assert keyed.admin("DELETE", "reference-key/owner").status_code == 200
    assert value(keyed, "rtmr_1") == 404
    keyed.admin("POST", "reference-key/owner", pem(Ed25519PrivateKey.generate()))
    assert value(keyed, "rtmr_1") == 404
    keyed.admin("POST", "reference-key/again", pem(ED))
    assert value(keyed, "rtmr_1") == ["aa"]


BUNDLE = json.loads(bundle().encode())


@pytest.mark.parametrize(
    "changes",
    [
        {"cai-references": 2}, {"cai-references": None}, {"name": "a b"}, {"name": ""},
        {"issued": "yesterday"}, {"issued": "2026-11-20"}, {"expires": BUNDLE["issued"]},
        {"expires": "2099-01-01T00:00:00Z"}, {"values": {}}, {"values": []}, {"values": {"": 1}},
        {"values": {"ä": 1}}, {"values": {"x" * 300: 1}}, {"more": 1},
    ],
)  # fmt: skip
def test_other_bundles_are_refused(changes: dict[str, Any]) -> None:
    body = {name: item for name, item in {**BUNDLE, **changes}.items() if item is not None}
    with pytest.raises(InputError):
        Bundle.parse(jcs.canonical(body))


def test_a_bundle_must_be_canonical() -> None:
    with pytest.raises(FormatError):
        Bundle.parse(json.dumps(BUNDLE, indent=1).encode())
    assert Bundle.parse(jcs.canonical(BUNDLE)).encode() == jcs.canonical(BUNDLE)


@pytest.mark.parametrize(
    "key",
    [
        b"", b"x", b"\xff", bytes(5000), pem(ED).replace(b"PUBLIC", b"PRIVATE"),
        pem(ec.generate_private_key(ec.SECP384R1())),
        pem(rsa.generate_private_key(65537, 2048)),
    ],
    ids=itertools.count(),
)  # fmt: skip
def test_other_keys_are_refused(site: Site, key: bytes) -> None:
    assert site.admin("POST", "reference-key/owner", key).status_code in (400, 413)
    with pytest.raises(InputError):
        ReferenceKey.parse(key)


# Single values.


def test_trustees_message(site: Site) -> None:
    values = {"rtmr_1": ["aabb"], "svn": 1, "a/b:tag": "x"}
    assert site.admin("POST", "reference-value", message(values)).status_code == 200
    assert {name: value(site, name) for name in values} == values
    assert site.admin("POST", "rvps/register", message({"svn": 2})).status_code == 200
    assert value(site, "svn") == 2
    assert site.admin("GET", "rvps/query").json() == {**values, "svn": 2}
    assert site.admin("DELETE", "reference-value/svn").status_code == 200
    assert site.admin("DELETE", "rvps/delete/a/b:tag").status_code == 200
    assert site.admin("GET", "rvps/query").json() == {"rtmr_1": ["aabb"]}
    assert site.admin("DELETE", "reference-value/svn").status_code == 404


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[]", b"{}", {**message({"a": 1}), "version": "0.2.0"},
        {**message({"a": 1}), "type": "swid"}, {**message({"a": 1}), "payload": "!!"},
        {**message({"a": 1}), "payload": None}, message([]), message({}), message({"": 1}),
        {"version": "0.1.0", "type": "sample", "provenance": "e30="},
    ],
)  # fmt: skip
def test_other_messages_are_refused(site: Site, body: Any) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    assert site.admin("POST", "reference-value", data).status_code == 400
    with pytest.raises(InputError):
        parse_message(data)
    assert site.admin("GET", "references").json()["values"] == []


def test_single_values_end_too(site: Site, clock: Clock) -> None:
    site.admin("POST", "reference-value", message({"long": 1}))
    soon = (NOW + timedelta(hours=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
    body = {"values": {"short": 1}, "expires": soon}
    assert site.admin("POST", "reference-values", body).status_code == 200
    assert (value(site, "long"), value(site, "short")) == (1, 1)
    clock.ahead = timedelta(hours=2)
    assert (value(site, "long"), value(site, "short")) == (1, 404)
    clock.ahead = timedelta(days=366)
    assert value(site, "long") == 404
    for expires in ("2020-01-01T00:00:00Z", "2099-01-01T00:00:00Z"):
        body = {"values": {"short": 1}, "expires": expires}
        assert site.admin("POST", "reference-values", body).status_code == 403


def test_a_single_value_that_ended_does_not_bring_another_back(
    keyed: Site, clock: Clock
) -> None:
    keyed.admin("POST", "reference-bundle/release", signed(bundle(values={"a": 1})))
    soon = (NOW + timedelta(hours=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
    keyed.admin("POST", "reference-values", {"values": {"a": 2}, "expires": soon})
    keyed.admin("POST", "reference-values?tenant=models", {"values": {"b": 2}, "expires": soon})
    assert value(keyed, "a") == 2
    clock.ahead = timedelta(hours=2)
    assert value(keyed, "a") == 404
    assert value(keyed, "b", "models") == 404


def test_tenants_have_values_of_their_own(keyed: Site) -> None:
    keyed.admin("POST", "reference-value", message({"a": 1, "b": 1}))
    keyed.admin("POST", "reference-value?tenant=models", message({"a": 2}))
    assert (value(keyed, "a"), value(keyed, "a", "models")) == (1, 2)
    assert value(keyed, "b", "models") == 1
    assert value(keyed, "a", "others") == 1
    own = Ed25519PrivateKey.generate()
    keyed.admin("POST", "reference-key/own?tenant=models", pem(own))
    body = signed(bundle(values={"c": 3}), own)
    assert keyed.admin("POST", "reference-bundle/release", body).status_code == 403
    answer = keyed.admin("POST", "reference-bundle/release?tenant=others", body)
    assert answer.status_code == 403
    answer = keyed.admin("POST", "reference-bundle/release?tenant=models", body)
    assert answer.status_code == 200
    assert (value(keyed, "c"), value(keyed, "c", "models")) == (404, 3)


@pytest.mark.parametrize(
    "path", ["", "key/", "key//", "bundle//a/b", "values/a/b", "other//x", "key/a b/c", "values"]
)
def test_other_row_names_are_refused(path: str) -> None:
    if path == "values":
        assert ReferenceName.parse(path).path == "values/"
        return
    with pytest.raises(FormatError):
        ReferenceName.parse(path)


@pytest.mark.parametrize("tenant", ["a/b", "%00", "a%20b", "..", "x" * 200])
def test_tenants_are_repositories(site: Site, tenant: str) -> None:
    for method, route, body in (
        ("GET", "references", None), ("GET", "rvps/query", None),
        ("GET", "reference-value/x", None), ("POST", "reference-value", message({"a": 1})),
        ("DELETE", "reference-value/a", None), ("POST", "reference-key/x", pem(ED)),
        ("POST", "reference-bundle/x", signed(bundle("x"))),
    ):  # fmt: skip
        answer = site.admin(method, f"{route}?tenant={tenant}", body)
        assert answer.status_code == 400, (method, route)


@pytest.mark.parametrize("name", ["a b", "..", "%2e", "a%2Fb", "x" * 200])
def test_names_of_bundles_and_keys(keyed: Site, name: str) -> None:
    for noun in ("reference-bundle", "reference-key"):
        answer = keyed.admin("POST", f"{noun}/{name}", pem(ED))
        assert answer.status_code in (400, 404)


# At a release.

REGO = b"""package policy
import rego.v1
default allow := false
evidence := input.submods.cpu0["ear.veraison.annotated-evidence"]
allow if evidence.tdx.quote.body.mr_td in query_reference_value("mr_td")
"""


def test_an_expired_value_releases_nothing(
    allowed: Site, visitor: Visitor, clock: Clock
) -> None:
    assert allowed.set_policy("resource-policy", REGO).status_code == 200
    _, cookie = visitor.attested(allowed)
    assert allowed.get(cookie).status_code == 403
    soon = (clock() + timedelta(minutes=2)).strftime("%Y-%m-%dT%H:%M:%SZ")
    values = {"mr_td": [visitor.facts().tdx.body["mr_td"]]}
    allowed.admin("POST", "reference-values", {"values": values, "expires": soon})
    assert allowed.get(cookie).status_code == 200
    clock.ahead = timedelta(minutes=3)
    assert allowed.get(cookie).status_code == 403


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM reference",
        "UPDATE reference SET sealed = zeroblob(100)",
        "UPDATE reference SET path = 'values/models'",
    ],
)
def test_edited_values_are_detected(
    allowed: Site, visitor: Visitor, statement: str
) -> None:
    allowed.admin("POST", "reference-value", message({"a": 1}))
    _, cookie = visitor.attested(allowed)
    assert allowed.get(cookie).status_code == 200
    with sqlite3.connect(allowed.settings.data / "kbs.sqlite") as connection:
        connection.execute(statement)
    connection.close()
    assert allowed.get(cookie).status_code == 500
