"""Admin tokens: whose they are, what they may do, and which are refused."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from cai.attest.jwk import b64u_encode
from cai.errors import FormatError, InputMissing, Refused, Unauthenticated
from kbs.admin.app import open_office
from kbs.admin.changes import Role
from kbs.admin.office import Administrator, Office
from kbs.admin.settings import (
    LEGACY_TOKEN_SECONDS,
    MAX_TOKEN_SECONDS,
    AdminSettings,
    IdentityProvider,
    LegacyKey,
)
from kbs.admin.tokens import make_admin_token
from tests.kbs.world import Site

ISSUER = "https://login.example.org"


def sign(key: Any, data: bytes, algorithm: str) -> bytes:
    if isinstance(key, ec.EllipticCurvePrivateKey):
        r, s = decode_dss_signature(key.sign(data, ec.ECDSA(hashes.SHA256())))
        return r.to_bytes(32) + s.to_bytes(32)
    if isinstance(key, rsa.RSAPrivateKey):
        pss = padding.PSS(padding.MGF1(hashes.SHA256()), 32)
        return key.sign(data, pss if algorithm == "PS256" else padding.PKCS1v15(), hashes.SHA256())
    return key.sign(data)


def jwt(key: Any, claims: dict[str, Any], header: Any = None) -> str:
    head = {"alg": "EdDSA", "typ": "JWT"} if header is None else header
    signed = ".".join(b64u_encode(json.dumps(part).encode()) for part in (head, claims))
    algorithm = head.get("alg", "") if isinstance(head, dict) else ""
    return f"{signed}.{b64u_encode(sign(key, signed.encode(), algorithm))}"


def claims(now: datetime, **changes: Any) -> dict[str, Any]:
    seconds = int(now.timestamp())
    value: dict[str, Any] = {
        "sub": "admin", "aud": ["KBS"], "role": "admin", "iat": seconds, "exp": seconds + 60,
    }
    value.update(changes)
    return {name: item for name, item in value.items() if item is not None}


def pem(key: Any, path: Path) -> Path:
    path.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return path


@pytest.fixture
def office(site: Site) -> Office:
    return open_office(site.broker.core)


def test_a_stock_token_is_accepted(site: Site, office: Office) -> None:
    now = site.clock()
    for changes in (
        {}, {"aud": "KBS"}, {"aud": None}, {"iat": None}, {"iss": "TrusteeInDocker"},
        {"sub": None}, {"role": ["admin"]}, {"role": "admin viewer"},
    ):  # fmt: skip
        admin = office.authenticate(f"Bearer {jwt(site.admin_key, claims(now, **changes))}")
        assert (admin.name, admin.roles) == ("admin", {Role.ADMIN})


@pytest.mark.parametrize(
    "changes",
    [
        {"exp": None}, {"exp": 1}, {"exp": "never"}, {"exp": True}, {"exp": 1 << 40},
        {"role": None}, {"role": ""}, {"role": []}, {"role": [1]}, {"role": {"admin": True}},
        {"role": ["x"] * 65}, {"aud": "AS"}, {"aud": ["AS"]}, {"aud": []}, {"iat": 1 << 40},
        {"nbf": 1 << 40}, {"iat": "now"}, {"sub": 1}, {"sub": "x" * 200},
    ],
)  # fmt: skip
def test_other_claims_are_refused(site: Site, office: Office, changes: dict[str, Any]) -> None:
    value = claims(site.clock(), **changes)
    with pytest.raises(Unauthenticated):
        office.authenticate(f"Bearer {jwt(site.admin_key, value)}")


@pytest.mark.parametrize("role", ["user", "Admin", "ADMIN", ["nothing"]])
def test_foreign_roles_are_known_but_may_do_nothing(site: Site, office: Office, role: Any) -> None:
    token = jwt(site.admin_key, claims(site.clock(), role=role))
    with pytest.raises(Refused) as refused:
        office.authenticate(f"Bearer {token}", Role.AUDITOR)
    assert not isinstance(refused.value, Unauthenticated)


def test_a_token_cannot_live_for_long(site: Site, office: Office) -> None:
    now = site.clock()
    value = claims(now, exp=int(now.timestamp()) + MAX_TOKEN_SECONDS + 5)
    with pytest.raises(Unauthenticated, match="more than"):
        office.authenticate(f"Bearer {jwt(site.admin_key, value)}")
    longer = open_office(site.broker.core, AdminSettings(max_token_seconds=7200))
    assert longer.authenticate(f"Bearer {jwt(site.admin_key, value)}").name == "admin"


@pytest.mark.parametrize(
    "header", [{"alg": "none"}, {"alg": "HS256"}, {"alg": "ES256"}, {}, [], "x", {"a": 1}]
)
def test_other_algorithms_are_refused(site: Site, office: Office, header: Any) -> None:
    token = jwt(site.admin_key, claims(site.clock()), header)
    with pytest.raises(Unauthenticated):
        office.authenticate(f"Bearer {token}")


@pytest.mark.parametrize(
    "text", [None, "", "Bearer", "Bearer ", "Bearer a.b", "Bearer a.b.c", "Basic YTpi", "é é",
             "Bearer " + "a" * 20000, "Bearer é.é.é", "Bearer ..."],
)  # fmt: skip
def test_what_is_no_token_is_refused(office: Office, text: str | None) -> None:
    with pytest.raises(Unauthenticated):
        office.authenticate(text)


@pytest.mark.parametrize("member", ["kid", "jku", "jwk", "x5c"])
def test_a_header_cannot_choose_the_key(site: Site, office: Office, member: str) -> None:
    stranger = Ed25519PrivateKey.generate()
    raw = b64u_encode(stranger.public_key().public_bytes_raw())
    values = {"kid": raw, "jku": "https://x", "jwk": {"kty": "OKP", "x": raw}, "x5c": [raw]}
    head = {"alg": "EdDSA", member: values[member]}
    with pytest.raises(Unauthenticated):
        office.authenticate(f"Bearer {jwt(stranger, claims(site.clock()), head)}")


@pytest.mark.parametrize("sub", ["a\x00b", "../admin", "%", "admin' --", "x" * 100, "ünï"])
def test_strange_subjects_do_no_harm(site: Site, office: Office, sub: str) -> None:
    token = jwt(Ed25519PrivateKey.generate(), claims(site.clock(), sub=sub))
    with pytest.raises(Unauthenticated):
        office.authenticate(f"Bearer {token}")


def test_a_token_may_ask_for_less(site: Site, office: Office) -> None:
    token = make_admin_token(site.admin_key, now=site.clock(), roles=[Role.AUDITOR])
    assert office.authenticate(f"Bearer {token}", Role.AUDITOR).roles == {Role.AUDITOR}
    with pytest.raises(Refused, match="has not the role"):
        office.authenticate(f"Bearer {token}", Role.POLICY)


# Identity providers


def provided(site: Site, tmp_path: Path, key: Any, **changes: Any) -> Office:
    provider = IdentityProvider("corp", ISSUER, "KBS", pem(key, tmp_path / "idp.pem"), **changes)
    return open_office(site.broker.core, AdminSettings(identity_providers=(provider,)))


def corporate(now: datetime, **changes: Any) -> dict[str, Any]:
    return claims(now, **{"iss": ISSUER, "sub": "alice", "role": "policy", **changes})


@pytest.mark.parametrize(
    ("make", "algorithm"),
    [
        (Ed25519PrivateKey.generate, "EdDSA"),
        (lambda: ec.generate_private_key(ec.SECP256R1()), "ES256"),
        (lambda: rsa.generate_private_key(65537, 2048), "RS256"),
        (lambda: rsa.generate_private_key(65537, 2048), "PS256"),
    ],
)
def test_tokens_of_an_identity_provider(
    site: Site, tmp_path: Path, make: Any, algorithm: str
) -> None:
    key = make()
    office = provided(site, tmp_path, key)
    token = jwt(key, corporate(site.clock()), {"alg": algorithm})
    admin = office.authenticate(f"Bearer {token}", Role.POLICY)
    assert (admin.name, admin.roles, admin.key) == ("corp:alice", {Role.POLICY}, None)
    other = "ES256" if algorithm != "ES256" else "EdDSA"
    for head in ({"alg": other}, {"alg": "none"}, {}):
        with pytest.raises(Unauthenticated):
            office.authenticate(f"Bearer {jwt(key, corporate(site.clock()), head)}")


@pytest.mark.parametrize(
    "changes",
    [
        {"iss": "https://other"}, {"iss": None}, {"aud": None}, {"aud": "AS"}, {"sub": None},
        {"sub": ""}, {"exp": None}, {"exp": 1}, {"exp": 1 << 40}, {"role": None}, {"nbf": 1 << 40},
    ],
)
def test_other_claims_of_a_provider_are_refused(
    site: Site, tmp_path: Path, changes: dict[str, Any]
) -> None:
    key = Ed25519PrivateKey.generate()
    office = provided(site, tmp_path, key)
    with pytest.raises(Unauthenticated):
        office.authenticate(f"Bearer {jwt(key, corporate(site.clock(), **changes))}")


def test_a_provider_speaks_for_nobody_else(site: Site, tmp_path: Path) -> None:
    key = Ed25519PrivateKey.generate()
    office = provided(site, tmp_path, key)
    # The first administrator's key under the provider's name, and the other way round.
    with pytest.raises(Unauthenticated):
        office.authenticate(f"Bearer {jwt(site.admin_key, corporate(site.clock()))}")
    with pytest.raises(Unauthenticated):
        office.authenticate(f"Bearer {jwt(key, claims(site.clock()))}")
    # A person who calls himself admin there is still a person of that provider.
    token = jwt(key, corporate(site.clock(), sub="admin"))
    assert office.authenticate(f"Bearer {token}", Role.POLICY).name == "corp:admin"


def test_groups_are_mapped_to_roles(site: Site, tmp_path: Path) -> None:
    key = Ed25519PrivateKey.generate()
    office = provided(
        site, tmp_path, key, claim="groups", tenant="models",
        roles={"owners": frozenset({Role.RESOURCE, Role.POLICY}), "a": frozenset({Role.AUDITOR})},
    )  # fmt: skip
    token = jwt(key, corporate(site.clock(), groups=["staff", "owners", "admin"]))
    admin = office.authenticate(f"Bearer {token}", Role.RESOURCE)
    assert (admin.roles, admin.tenant) == ({Role.RESOURCE, Role.POLICY}, "models")
    token = jwt(key, corporate(site.clock(), groups=["admin", "staff"]))
    with pytest.raises(Refused, match="has not the role"):
        office.authenticate(f"Bearer {token}", Role.AUDITOR)


def test_a_jwk_set_of_a_provider(site: Site, tmp_path: Path) -> None:
    first = Ed25519PrivateKey.generate()
    second = ec.generate_private_key(ec.SECP256R1())
    third = rsa.generate_private_key(65537, 2048)
    point, modulus = second.public_key().public_numbers(), third.public_key().public_numbers()
    jwks = {
        "keys": [
            {"kty": "OKP", "crv": "Ed25519", "kid": "1",
             "x": b64u_encode(first.public_key().public_bytes_raw())},
            {"kty": "EC", "crv": "P-256", "x": b64u_encode(point.x.to_bytes(32)),
             "y": b64u_encode(point.y.to_bytes(32))},
            {"kty": "RSA", "e": "AQAB", "n": b64u_encode(modulus.n.to_bytes(256))},
        ]
    }  # fmt: skip
    path = tmp_path / "jwks.json"
    path.write_text(json.dumps(jwks))
    provider = IdentityProvider("corp", ISSUER, "KBS", path)
    office = open_office(site.broker.core, AdminSettings(identity_providers=(provider,)))
    for key, algorithm in ((first, "EdDSA"), (second, "ES256"), (third, "RS256")):
        token = jwt(key, corporate(site.clock()), {"alg": algorithm, "kid": "1"})
        assert office.authenticate(f"Bearer {token}", Role.POLICY).name == "corp:alice"


@pytest.mark.parametrize(
    "text",
    [
        b"", b"x", b"{}", b'{"keys": []}', b'{"keys": [1]}', b'{"keys": [{"kty": "oct"}]}',
        b'{"keys": [{"kty": "EC", "crv": "P-521", "x": "", "y": ""}]}', b"{" * 5000,
        b'{"keys": [{"kty": "OKP", "crv": "Ed25519", "x": "AA"}]}',
        b'{"keys": [{"kty": "RSA", "n": "AAAA", "e": "AQAB"}]}',
        b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n",
        b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
    ],
)
def test_unusable_keys_stop_the_start(site: Site, tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "key"
    path.write_bytes(text)
    settings = AdminSettings(identity_providers=(IdentityProvider("c", ISSUER, "KBS", path),))
    with pytest.raises(FormatError):
        open_office(site.broker.core, settings)
    with pytest.raises(InputMissing):
        open_office(
            site.broker.core,
            AdminSettings(legacy_keys=(LegacyKey("old", tmp_path / "missing"),)),
        )


@pytest.mark.parametrize(
    "make",
    [
        lambda: rsa.generate_private_key(65537, 1024),
        lambda: ec.generate_private_key(ec.SECP384R1()),
    ],
)
def test_weak_or_foreign_keys_are_refused(site: Site, tmp_path: Path, make: Any) -> None:
    with pytest.raises(FormatError):
        provided(site, tmp_path, make())


# Legacy keys


def legacy(site: Site, tmp_path: Path, key: Any, **changes: Any) -> Office:
    old = LegacyKey("keyprovider", pem(key, tmp_path / "old.pem"), **changes)
    return open_office(site.broker.core, AdminSettings(legacy_keys=(old,)))


def test_a_token_without_role_only_from_a_legacy_key(site: Site, tmp_path: Path) -> None:
    key = Ed25519PrivateKey.generate()
    office = legacy(site, tmp_path, key)
    now = site.clock()
    # What an old kbs-client signs: three times, two hours, nothing else.
    seconds = int(now.timestamp())
    stock = {"iat": seconds, "exp": seconds + 7200, "nbf": seconds}
    admin = office.authenticate(f"Bearer {jwt(key, stock)}", Role.RESOURCE)
    assert admin == Administrator("legacy:keyprovider", frozenset({Role.ADMIN}))
    with pytest.raises(Unauthenticated):
        office.authenticate(f"Bearer {jwt(site.admin_key, {**stock, 'exp': seconds + 60})}")
    with pytest.raises(Unauthenticated):
        office.authenticate(f"Bearer {jwt(Ed25519PrivateKey.generate(), stock)}")
    endless = {**stock, "exp": seconds + LEGACY_TOKEN_SECONDS + 60}
    with pytest.raises(Unauthenticated, match="more than"):
        office.authenticate(f"Bearer {jwt(key, endless)}")
    with pytest.raises(Unauthenticated):
        office.authenticate(f"Bearer {jwt(key, {**stock, 'exp': None})}")


def test_a_legacy_key_may_be_confined(site: Site, tmp_path: Path) -> None:
    key = Ed25519PrivateKey.generate()
    roles = frozenset({Role.RESOURCE})
    office = legacy(site, tmp_path, key, roles=roles, tenant="default")
    for role in (None, "admin", "resource"):
        token = jwt(key, claims(site.clock(), role=role))
        admin = office.authenticate(f"Bearer {token}", Role.RESOURCE)
        assert (admin.roles, admin.tenant) == (roles, "default")
        with pytest.raises(Refused):
            office.authenticate(f"Bearer {token}", Role.POLICY)


def test_a_legacy_key_must_be_ed25519(site: Site, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="one Ed25519"):
        legacy(site, tmp_path, ec.generate_private_key(ec.SECP256R1()))
