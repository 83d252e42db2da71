"""The key a guest makes for one release: JSON Web Keys as Trustee writes them.

A verifier never trusts the shape a peer chose: it reads the members it knows into a typed value,
drops all others, and hashes that value (RCAR binding, RFC 8785). Points are checked on their curve,
RSA keys have at least 2048 bits, PKCS#1 v1.5 is refused (decisions §6).
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric import ec, rsa

from cai.errors import FormatError

ECDH_ES_A256KW: Final = "ECDH-ES+A256KW"
"""JWE key agreement with key wrapping (RFC 7518 §4.6)."""

RSA_OAEP_256: Final = "RSA-OAEP-256"
"""JWE key encryption by RSA-OAEP with SHA-256 (RFC 7518 §4.3)."""

MIN_RSA_BITS = 2048
"""Smallest RSA modulus that a key is wrapped to, bits."""

MAX_RSA_BITS = 8192
"""Largest RSA modulus that is computed with, bits."""

MAX_JWK_MEMBER = 2048
"""Longest base64url member of a key, characters."""

_CURVES: Final[dict[str, tuple[type[ec.EllipticCurve], int]]] = {
    "P-256": (ec.SECP256R1, 32),
    "P-521": (ec.SECP521R1, 66),
}


def b64u_encode(data: bytes) -> str:
    """URL-safe base64 without padding (RFC 7515 §2)."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def b64u_decode(text: str, *, what: str) -> bytes:
    """Decode URL-safe base64 without padding; only the canonical spelling is accepted.

    Raises:
        FormatError: padding, foreign characters, or set bits behind the last byte.
    """
    try:
        data = base64.urlsafe_b64decode(text.encode("ascii") + b"=" * (-len(text) % 4))
    except (binascii.Error, ValueError) as error:
        raise FormatError(f"{what}: not base64url") from error
    if b64u_encode(data) != text:
        raise FormatError(f"{what}: not base64url without padding")
    return data


@dataclass(frozen=True, slots=True)
class PublicJwk:
    """A guest's public key, exactly the members that are hashed.

    Attributes:
        members: ``kty, crv, alg, x, y`` of an EC key or ``kty, alg, n, e`` of an RSA key, each the
            string the guest sent.
        public_key: the key, checked.
    """

    members: tuple[tuple[str, str], ...]
    public_key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey

    @classmethod
    def parse(cls, value: Any) -> PublicJwk:
        """Read a JWK; unknown members are dropped (Trustee hashes its own typed form).

        Raises:
            FormatError: a member is missing or malformed, the algorithm is not one of
                ``ECDH-ES+A256KW`` and ``RSA-OAEP-256``, the point is not on its curve, or the
                modulus is out of its limits.
        """
        if not isinstance(value, dict):
            raise FormatError("tee-pubkey: expected an object")
        kind = _member(value, "kty")
        if kind == "EC":
            return cls._parse_ec(value)
        if kind == "RSA":
            return cls._parse_rsa(value)
        raise FormatError(f"tee-pubkey: key type {kind[:16]!r} is not served, use EC P-256")

    @property
    def algorithm(self) -> str:
        """The JWE algorithm that the key is for."""
        return self.to_json()["alg"]

    def to_json(self) -> dict[str, str]:
        """The key as a JSON value of known members only."""
        return dict(self.members)

    @classmethod
    def _parse_ec(cls, value: dict[str, Any]) -> PublicJwk:
        members = tuple((name, _member(value, name)) for name in ("kty", "crv", "alg", "x", "y"))
        known = dict(members)
        if known["alg"] != ECDH_ES_A256KW:
            raise FormatError(f"tee-pubkey: algorithm must be {ECDH_ES_A256KW} for an EC key")
        return cls(members, ec_public_key(known, what="tee-pubkey"))

    @classmethod
    def _parse_rsa(cls, value: dict[str, Any]) -> PublicJwk:
        members = tuple((name, _member(value, name)) for name in ("kty", "alg", "n", "e"))
        known = dict(members)
        if known["alg"] == "RSA1_5":
            raise FormatError("tee-pubkey: RSA1_5 is refused", hint="use ECDH-ES+A256KW with P-256")
        if known["alg"] != RSA_OAEP_256:
            raise FormatError(f"tee-pubkey: algorithm must be {RSA_OAEP_256} for an RSA key")
        modulus = int.from_bytes(b64u_decode(known["n"], what="tee-pubkey.n"))
        exponent = int.from_bytes(b64u_decode(known["e"], what="tee-pubkey.e"))
        if not MIN_RSA_BITS <= modulus.bit_length() <= MAX_RSA_BITS:
            raise FormatError(
                f"tee-pubkey: modulus of {modulus.bit_length()} bits, expected {MIN_RSA_BITS} to "
                f"{MAX_RSA_BITS}"
            )
        if exponent.bit_length() > 32 or exponent < 65537:
            raise FormatError("tee-pubkey: exponent must be at least 65537 and at most 32 bits")
        try:
            return cls(members, rsa.RSAPublicNumbers(exponent, modulus).public_key())
        except ValueError as error:
            raise FormatError("tee-pubkey: not an RSA key") from error


class TeeKey:
    """A fresh P-256 key pair of one handshake; the private half never leaves this object.

    Args:
        private_key: for known-answer tests; callers use ``TeeKey.generate``.
    """

    __slots__ = ("jwk", "private_key")

    def __init__(self, private_key: ec.EllipticCurvePrivateKey) -> None:
        self.private_key = private_key
        self.jwk = PublicJwk.parse(
            {**ec_members(private_key.public_key()), "alg": ECDH_ES_A256KW}
        )
        """The public half as it goes on the wire."""

    @classmethod
    def generate(cls) -> TeeKey:
        """A new key pair."""
        return cls(ec.generate_private_key(ec.SECP256R1()))

    def __repr__(self) -> str:
        return "<TEE key pair>"

    def __reduce__(self) -> str:
        raise TypeError("a TEE key is not pickled")


def ec_members(key: ec.EllipticCurvePublicKey) -> dict[str, str]:
    """``crv, kty, x, y`` of an EC key, in this (alphabetical) order."""
    curve = {"secp256r1": "P-256", "secp521r1": "P-521"}[key.curve.name]
    size = _CURVES[curve][1]
    numbers = key.public_numbers()
    return {
        "crv": curve,
        "kty": "EC",
        "x": b64u_encode(numbers.x.to_bytes(size)),
        "y": b64u_encode(numbers.y.to_bytes(size)),
    }


def ec_public_key(members: dict[str, str], *, what: str) -> ec.EllipticCurvePublicKey:
    """The point that ``crv, x, y`` name.

    Raises:
        FormatError: another curve, a coordinate of another length, or a point off the curve.
    """
    if members.get("crv") not in _CURVES:
        raise FormatError(f"{what}: curve must be P-256 or P-521")
    curve, size = _CURVES[members["crv"]]
    point = []
    for name in ("x", "y"):
        data = b64u_decode(members[name], what=f"{what}.{name}")
        if len(data) != size:
            raise FormatError(f"{what}.{name}: {len(data)} bytes, expected {size}")
        point.append(int.from_bytes(data))
    try:
        # cryptography refuses points that are not on the curve.
        return ec.EllipticCurvePublicNumbers(point[0], point[1], curve()).public_key()
    except ValueError as error:
        raise FormatError(f"{what}: the point is not on {members['crv']}") from error


def _member(value: dict[str, Any], name: str) -> str:
    member = value.get(name)
    if not isinstance(member, str):
        raise FormatError(f"tee-pubkey: {name} is missing or not a string")
    if len(member) > MAX_JWK_MEMBER:
        raise FormatError(f"tee-pubkey: {name} is longer than {MAX_JWK_MEMBER} characters")
    return member
