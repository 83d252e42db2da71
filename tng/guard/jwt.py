"""Signed tokens of an identity provider (RFC 7519), verified by the keys of its JWKS (RFC 7517).

Issuer, audience, algorithms and the place of the keys come from the configuration and nowhere else:
``jwk``, ``jku``, ``x5c`` and ``x5u`` of a token are never looked at, and a key serves only the
algorithm of its own type, so that no public key can be taken for an HMAC secret.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from cai.attest.jwk import MAX_RSA_BITS, MIN_RSA_BITS, b64u_decode, ec_public_key
from cai.errors import FormatError, LimitExceeded, Unauthenticated

MAX_JWT = 16 * 1024
"""Longest token, characters."""

MAX_JWKS = 256 * 1024
"""Longest key set, bytes."""

MAX_KEYS = 64
"""Most keys of a set."""

MAX_SUBJECT = 255
"""Longest subject, characters."""

CLOCK_SKEW_S = 60
"""How much two clocks may differ, seconds."""

ALGORITHMS: Final = ("ES256", "RS256", "EdDSA")

Key = ec.EllipticCurvePublicKey | rsa.RSAPublicKey | ed25519.Ed25519PublicKey


@dataclass(frozen=True, slots=True)
class KeySet:
    """Usable keys of a JWKS.

    Attributes:
        keys: by (key id, algorithm); a key without an id has an empty one.
    """

    keys: Mapping[tuple[str, str], Key]

    @classmethod
    def parse(cls, data: bytes) -> KeySet:
        """Read a JWKS; keys of other kinds and for other uses are left out.

        Raises:
            FormatError, LimitExceeded: it is none, or a key of ours is malformed or weak.
        """
        if len(data) > MAX_JWKS:
            raise LimitExceeded(f"key set of {len(data)} bytes, at most {MAX_JWKS}")
        value = _object(data, "key set")
        listed = value.get("keys")
        if not isinstance(listed, list) or len(listed) > MAX_KEYS:
            raise FormatError(f"key set: keys must be a list of at most {MAX_KEYS}")
        keys: dict[tuple[str, str], Key] = {}
        for item in listed:
            if not isinstance(item, dict) or item.get("use", "sig") != "sig":
                continue
            found = _key(item)
            if found is None:
                continue
            name = item.get("kid", "")
            algorithm, key = found
            if not isinstance(name, str) or (name, algorithm) in keys:
                raise FormatError("key set: two keys have one id")
            keys[name, algorithm] = key
        return cls(keys)

    def find(self, kid: str, algorithm: str) -> Key | None:
        """The key of a token; one without an id serves a set of a single key of its kind."""
        if kid:
            return self.keys.get((kid, algorithm))
        fitting = [key for (_kid, kind), key in self.keys.items() if kind == algorithm]
        return fitting[0] if len(fitting) == 1 else None


@dataclass(frozen=True, slots=True)
class Jwt:
    """A parsed token, nothing of it verified yet.

    Attributes:
        algorithm: one of ``ALGORITHMS``.
        kid: id of the key that it names; empty when it names none.
        claims: its claims.
        signed: what the signature is over.
        signature: raw.
    """

    algorithm: str
    kid: str
    claims: Mapping[str, Any]
    signed: bytes
    signature: bytes

    @classmethod
    def parse(cls, text: str) -> Jwt:
        """Read a compact token.

        Raises:
            Unauthenticated: it is none, of another algorithm, or has extensions.
        """
        parts = text.split(".")
        if len(text) > MAX_JWT or len(parts) != 3 or not text.isascii():
            raise Unauthenticated("not a token")
        try:
            head = _object(b64u_decode(parts[0], what="token"), "token")
            claims = _object(b64u_decode(parts[1], what="token"), "token")
            signature = b64u_decode(parts[2], what="token")
        except FormatError as error:
            raise Unauthenticated("not a token") from error
        algorithm, kid = head.get("alg"), head.get("kid", "")
        if algorithm not in ALGORITHMS or "crit" in head or "b64" in head:
            raise Unauthenticated("the token's algorithm is not accepted")
        if not isinstance(kid, str):
            raise Unauthenticated("not a token")
        signed = f"{parts[0]}.{parts[1]}".encode("ascii")
        return cls(algorithm, kid, claims, signed, signature)

    def verify(self, key: Key, *, issuer: str, audience: str, now: float) -> str:
        """Check everything; the subject.

        Args:
            key: of the configured set.
            issuer: that must have made it.
            audience: that it must be for.
            now: Unix time, seconds.

        Raises:
            Unauthenticated: any check fails.
        """
        # 1. The signature, by a key of the algorithm's own type.
        try:
            self._check_signature(key)
        except (InvalidSignature, ValueError, TypeError) as error:
            raise Unauthenticated("the token's signature does not verify") from error
        # 2. Who made it, and for whom.
        if self.claims.get("iss") != issuer:
            raise Unauthenticated("the token is of another issuer")
        named = self.claims.get("aud")
        if audience not in (named if isinstance(named, list) else [named]):
            raise Unauthenticated("the token is for another audience")
        # 3. When.
        expires = self._time("exp")
        if expires is None or now >= expires + CLOCK_SKEW_S:
            raise Unauthenticated("the token has expired")
        for name in ("nbf", "iat"):
            begins = self._time(name)
            if begins is not None and now < begins - CLOCK_SKEW_S:
                raise Unauthenticated("the token is of the future")
        # 4. Who has it.
        subject = self.claims.get("sub")
        if not isinstance(subject, str) or not 1 <= len(subject) <= MAX_SUBJECT:
            raise Unauthenticated("the token names no subject")
        return subject

    def _time(self, name: str) -> float | None:
        value = self.claims.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise Unauthenticated(f"the token's {name} is not a time")
        return value

    def _check_signature(self, key: Key) -> None:
        if self.algorithm == "ES256" and isinstance(key, ec.EllipticCurvePublicKey):
            if len(self.signature) != 64:
                raise InvalidSignature
            r, s = self.signature[:32], self.signature[32:]
            der = encode_dss_signature(int.from_bytes(r), int.from_bytes(s))
            key.verify(der, self.signed, ec.ECDSA(hashes.SHA256()))
        elif self.algorithm == "RS256" and isinstance(key, rsa.RSAPublicKey):
            key.verify(self.signature, self.signed, padding.PKCS1v15(), hashes.SHA256())
        elif self.algorithm == "EdDSA" and isinstance(key, ed25519.Ed25519PublicKey):
            key.verify(self.signature, self.signed)
        else:
            raise InvalidSignature


def _key(item: dict[str, Any]) -> tuple[str, Key] | None:
    kind, curve = item.get("kty"), item.get("crv")
    if kind == "EC" and curve == "P-256":
        members = {"crv": curve, "x": _text(item, "x"), "y": _text(item, "y")}
        found: tuple[str, Key] = "ES256", ec_public_key(members, what="key set")
    elif kind == "RSA":
        found = "RS256", _rsa(item)
    elif kind == "OKP" and curve == "Ed25519":
        raw = b64u_decode(_text(item, "x"), what="key set")
        if len(raw) != 32:
            raise FormatError("key set: an Ed25519 key has 32 bytes")
        found = "EdDSA", ed25519.Ed25519PublicKey.from_public_bytes(raw)
    else:
        return None
    # A key that says it is for something else is for nothing here.
    return found if item.get("alg", found[0]) in (found[0], "Ed25519") else None


def _rsa(item: dict[str, Any]) -> rsa.RSAPublicKey:
    modulus = int.from_bytes(b64u_decode(_text(item, "n"), what="key set"))
    exponent = int.from_bytes(b64u_decode(_text(item, "e"), what="key set"))
    if not MIN_RSA_BITS <= modulus.bit_length() <= MAX_RSA_BITS:
        raise FormatError(f"key set: an RSA key of {modulus.bit_length()} bits")
    if not 3 <= exponent < 2**32:
        raise FormatError("key set: the exponent of an RSA key is out of range")
    try:
        return rsa.RSAPublicNumbers(exponent, modulus).public_key()
    except ValueError as error:
        raise FormatError("key set: not an RSA key") from error


def _text(item: dict[str, Any], name: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise FormatError(f"key set: {name} is missing")
    return value


def _object(data: bytes, what: str) -> dict[str, Any]:
    """JSON of others: floats may stand in it, members given twice may not."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{what}: not JSON") from error
    if not isinstance(value, dict):
        raise FormatError(f"{what}: not an object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise FormatError("a member is given twice")
    return result
