"""Who an admin token belongs to: a stored administrator, a pinned identity provider, a legacy key.

The person comes from the key that verified the token, never from what its holder wrote into it, so
one key is one person wherever several persons are asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from sqlalchemy import Connection

from cai.attest.jwk import MIN_RSA_BITS, b64u_decode, ec_public_key
from cai.errors import FormatError, Unauthenticated
from cai.settings import read_settings_file
from kbs.admin.changes import Role
from kbs.admin.people import FIRST, NAME, Administrator, AdminStore
from kbs.admin.settings import (
    LEGACY_TOKEN_SECONDS,
    AdminSettings,
    IdentityProvider,
    LegacyKey,
)
from kbs.admin.tokens import KEY_ID, AdminToken, PublicKey, effective_roles, foreign, known_roles
from kbs.audit.log import Change, newest_change
from kbs.core import Core
from kbs.names import KBS_AUDIENCE

MAX_KEYS = 16
"""Most keys of one identity provider."""


@dataclass(frozen=True, slots=True)
class _Provider:
    settings: IdentityProvider
    keys: tuple[PublicKey, ...]


class Directory:
    """Every administrator that this broker knows.

    Args:
        core: the broker's state.
        settings: pinned providers and keys; their files are read now.

    Raises:
        InputMissing, StorageError: a key file cannot be read.
        FormatError: it holds no usable key.
    """

    def __init__(self, core: Core, settings: AdminSettings) -> None:
        self._core = core
        self._settings = settings
        self._store = AdminStore(core)
        self._providers = {
            provider.issuer: _Provider(provider, read_public_keys(provider.key))
            for provider in settings.identity_providers
        }
        self._legacy = [(key, _ed25519(key.key)) for key in settings.legacy_keys]

    def authenticate(self, authorization: str | None) -> Administrator:
        """The administrator behind an ``Authorization`` header.

        Raises:
            Unauthenticated: no token, or one that is not a living admin token of this broker.
        """
        token = AdminToken.parse(authorization)
        provider = self._providers.get(token.text("iss"))
        if provider is not None:
            return self._provided(provider, token)
        with self._core.database.read() as connection:
            for name in self._candidates(connection, token):
                found = self._store.find(connection, name)
                if found is not None and found.key is not None and token.signed_by(found.key):
                    return self._stored(found, token)
        for legacy, key in self._legacy:
            if token.signed_by(key):
                return self._roleless(legacy, token)
        raise foreign()

    def person(self, connection: Connection, name: str) -> Administrator | None:
        """A living stored administrator by name, with everything that they may do."""
        return self._store.find(connection, name)

    def persons(self, connection: Connection) -> list[Administrator]:
        """Every living stored administrator."""
        found = (self._store.find(connection, name) for name in self._store.all(connection))
        return [admin for admin in found if admin is not None]

    def require_living(self, connection: Connection, admin: Administrator) -> None:
        """Refuse an administrator who was changed or removed since they were identified.

        Raises:
            Unauthenticated: they were.
        """
        known = admin.credential
        if known is None:
            return
        newest = newest_change(connection, known.object) or Change(known.object, 0, "")
        if newest != known:
            raise Unauthenticated("this administrator was changed meanwhile", hint="try again")

    def _candidates(self, connection: Connection, token: AdminToken) -> Iterator[str]:
        identifier = token.text("kid", header=True)
        by_key = None
        if KEY_ID.fullmatch(identifier):
            by_key = self._store.named_by_key(connection, identifier)
        yield from dict.fromkeys(
            name for name in (by_key, token.text("sub"), FIRST) if name and NAME.fullmatch(name)
        )

    def _stored(self, found: Administrator, token: AdminToken) -> Administrator:
        token.require_time(self._core.clock(), longest=self._settings.max_token_seconds)
        asked = known_roles(token.role_values("role"))
        token.require_audience(KBS_AUDIENCE, optional=True)
        token.subject()
        roles = effective_roles(found.roles, asked)
        return Administrator(found.name, roles, found.tenant, found.key, found.credential)

    def _provided(self, provider: _Provider, token: AdminToken) -> Administrator:
        settings = provider.settings
        if not any(token.signed_by(key) for key in provider.keys):
            raise foreign()
        token.require_time(self._core.clock(), longest=settings.max_token_seconds)
        token.require_audience(settings.audience, optional=False)
        subject = token.subject()
        if not subject:
            raise Unauthenticated("the admin token does not say who it is for (sub)")
        values = token.role_values(settings.claim)
        roles: frozenset[Role] = known_roles(values)
        if settings.roles:
            granted = (settings.roles.get(value, frozenset()) for value in values)
            roles = frozenset().union(*granted)
        return Administrator(f"{settings.name}:{subject}", roles, settings.tenant)

    def _roleless(self, legacy: LegacyKey, token: AdminToken) -> Administrator:
        token.require_time(self._core.clock(), longest=LEGACY_TOKEN_SECONDS)
        token.require_audience(KBS_AUDIENCE, optional=True)
        token.subject()
        roles = legacy.roles
        if "role" in token.claims:
            roles = effective_roles(roles, known_roles(token.role_values("role")))
        return Administrator(f"legacy:{legacy.name}", roles, legacy.tenant)


def read_public_keys(path: Path) -> tuple[PublicKey, ...]:
    """Read PEM public keys or certificates, or a JWK set.

    Raises:
        InputMissing, StorageError: it cannot be read.
        FormatError: it holds no usable key, or one that is not.
    """
    data = read_settings_file(path, what="public key")
    where = f"public key {path}"
    try:
        keys = _from_jwks(data, where) if data.lstrip()[:1] == b"{" else _from_pem(data)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise FormatError(f"{where}: neither PEM public keys nor a JWK set") from error
    if not 0 < len(keys) <= MAX_KEYS:
        raise FormatError(f"{where}: {len(keys)} keys, expected 1 to {MAX_KEYS}")
    return tuple(_usable(key, where) for key in keys)


def _ed25519(path: Path) -> Ed25519PublicKey:
    keys = read_public_keys(path)
    if len(keys) != 1 or not isinstance(keys[0], Ed25519PublicKey):
        raise FormatError(f"legacy key {path}: expected one Ed25519 public key in PEM")
    return keys[0]


def _from_pem(data: bytes) -> list[Any]:
    keys: list[Any] = []
    for block in data.split(b"-----BEGIN ")[1:]:
        pem = b"-----BEGIN " + block
        if block.startswith(b"CERTIFICATE"):
            keys.append(x509.load_pem_x509_certificate(pem).public_key())
        else:
            keys.append(serialization.load_pem_public_key(pem))
    return keys


def _from_jwks(data: bytes, where: str) -> list[Any]:
    value = json.loads(data)
    items = value.get("keys")
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise FormatError(f"{where}: a JWK set has a list of keys")
    return [_from_jwk(item, where) for item in items]


def _from_jwk(item: dict[str, Any], where: str) -> Any:
    def number(name: str) -> int:
        return int.from_bytes(b64u_decode(str(item.get(name, "")), what=where))

    match item.get("kty"):
        case "OKP" if item.get("crv") == "Ed25519":
            raw = b64u_decode(str(item.get("x", "")), what=where)
            return Ed25519PublicKey.from_public_bytes(raw)
        case "EC":
            members = {name: str(item.get(name, "")) for name in ("crv", "x", "y")}
            return ec_public_key(members, what=where)
        case "RSA":
            return rsa.RSAPublicNumbers(number("e"), number("n")).public_key()
    raise FormatError(f"{where}: key type {str(item.get('kty'))[:16]!r} is not served")


def _usable(key: Any, where: str) -> PublicKey:
    if isinstance(key, Ed25519PublicKey):
        return key
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1):
        return key
    if isinstance(key, rsa.RSAPublicKey) and key.key_size >= MIN_RSA_BITS:
        return key
    raise FormatError(
        f"{where}: only Ed25519, P-256 and RSA from {MIN_RSA_BITS} bits sign admin tokens"
    )
