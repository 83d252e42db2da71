"""Administrators' tokens: short-lived JWTs, as Trustee's clients send them.

Trustee's rules (``exp`` required, claim ``role``) with a bound on how long a token may live.
Nothing in a token chooses a key: ``kid``, ``sub`` and ``iss`` only say which pinned key to try
first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from typing import Any, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from cai import jcs
from cai.attest.jwk import MIN_RSA_BITS, b64u_decode, b64u_encode
from cai.errors import CaiError, FormatError, Unauthenticated
from kbs.admin.changes import Role
from kbs.names import KBS_AUDIENCE

OWN_LIFETIME = 60
"""Lifetime of the tokens that the command line makes for each call, seconds."""

CLOCK_SKEW = 30
"""How far in the future a token may have been issued, seconds."""

MAX_ADMIN_TOKEN = 8 * 1024
"""Longest token that is parsed, characters."""

MAX_SUBJECT = 128
"""Longest ``sub`` that is kept, characters."""

MAX_ROLE_VALUES = 64
"""Most roles or groups that a claim may name."""

KEY_ID: Final = re.compile(r"[0-9a-f]{32}")
"""Form of a key id."""

PublicKey = Ed25519PublicKey | ec.EllipticCurvePublicKey | rsa.RSAPublicKey
"""Keys that tokens may be signed with: EdDSA (Ed25519), ES256 (P-256), RS256 or PS256."""


def key_id(key: Ed25519PublicKey) -> str:
    """Short name of a key, hex: the start of the SHA-256 of its 32 bytes."""
    return sha256(key.public_bytes_raw()).hexdigest()[:32]


def make_admin_token(
    key: Ed25519PrivateKey,
    *,
    now: datetime,
    subject: str = "admin",
    roles: Iterable[Role] = (Role.ADMIN,),
    lifetime: int = OWN_LIFETIME,
) -> str:
    """A token for one call, or for ``lifetime`` seconds.

    Args:
        key: of the administrator.
        now: when it is issued.
        subject: a label; the key says who it is.
        roles: what the token may do at most; ``admin`` takes nothing from what its key may do.
        lifetime: seconds.
    """
    seconds = int(now.timestamp())
    claims = {
        "sub": subject,
        "aud": [KBS_AUDIENCE],
        "role": " ".join(sorted(roles)),
        "iat": seconds,
        "exp": seconds + lifetime,
    }
    header = b64u_encode(
        jcs.canonical({"alg": "EdDSA", "kid": key_id(key.public_key()), "typ": "JWT"})
    )
    signed = f"{header}.{b64u_encode(jcs.canonical(claims))}"
    return f"{signed}.{b64u_encode(key.sign(signed.encode('ascii')))}"


@dataclass(frozen=True, slots=True)
class AdminToken:
    """A token as it was sent; nothing in it is true before ``signed_by`` says so."""

    header: dict[str, Any]
    claims: dict[str, Any]
    signed: bytes
    signature: bytes

    @classmethod
    def parse(cls, authorization: str | None) -> AdminToken:
        """Read an ``Authorization`` header.

        Raises:
            Unauthenticated: it holds no token.
        """
        scheme, _, token = (authorization or "").partition(" ")
        token = token.strip()
        if scheme.lower() != "bearer" or not token:
            raise Unauthenticated("an admin token is required", hint="give --admin-key")
        parts = token.split(".")
        if len(token) > MAX_ADMIN_TOKEN or len(parts) != 3:
            raise foreign()
        try:
            header, body, signature = (b64u_decode(part, what="admin token") for part in parts)
            head = jcs.parse(header, what="admin token", limit=MAX_ADMIN_TOKEN)
            claims = jcs.parse(body, what="admin token", limit=MAX_ADMIN_TOKEN)
        except CaiError as error:
            raise foreign() from error
        if not isinstance(head, dict) or not isinstance(claims, dict):
            raise foreign()
        return cls(head, claims, f"{parts[0]}.{parts[1]}".encode("ascii"), signature)

    def text(self, name: str, *, header: bool = False) -> str:
        """A text claim or header member; empty when it is absent or of another type."""
        value = (self.header if header else self.claims).get(name)
        return value if isinstance(value, str) else ""

    def signed_by(self, key: PublicKey) -> bool:
        """Whether this key signed it, with the one algorithm that fits the key."""
        try:
            _verify(key, self.text("alg", header=True), self.signature, self.signed)
        except (InvalidSignature, FormatError):
            return False
        return True

    def require_time(self, now: datetime, *, longest: int) -> None:
        """Refuse a token that is expired, endless, not valid yet or valid for too long.

        Raises:
            Unauthenticated: it is.
        """
        seconds = now.timestamp()
        expires, issued, not_before = (self.claims.get(name) for name in ("exp", "iat", "nbf"))
        if type(expires) is not int or expires <= seconds:
            raise Unauthenticated("the admin token has expired or has no end")
        if expires > seconds + longest:
            raise Unauthenticated(
                f"the admin token is valid for more than {longest} seconds",
                hint="kbs admin token makes a shorter one",
            )
        for moment in (issued, not_before):
            if moment is not None and (type(moment) is not int or moment > seconds + CLOCK_SKEW):
                raise Unauthenticated("the admin token is not valid yet", hint="check the clocks")

    def require_audience(self, wanted: str, *, optional: bool) -> None:
        """Refuse a token for another service.

        Raises:
            Unauthenticated: ``aud`` is there and names others, or is missing and not optional.
        """
        audience = self.claims.get("aud", wanted if optional else [])
        if wanted not in (audience if isinstance(audience, list) else [audience]):
            raise Unauthenticated("the admin token is for another service")

    def subject(self) -> str:
        """``sub``, which may be missing.

        Raises:
            Unauthenticated: it is no text or too long.
        """
        subject = self.claims.get("sub", "")
        if not isinstance(subject, str) or len(subject) > MAX_SUBJECT:
            raise Unauthenticated("the admin token has no usable subject")
        return subject

    def role_values(self, claim: str) -> list[str]:
        """The texts of a claim that is a list of texts or one text with spaces between them.

        Raises:
            Unauthenticated: it is missing or of another kind.
        """
        value = self.claims.get(claim)
        values = value.split(" ") if isinstance(value, str) else value
        if (
            not isinstance(values, list)
            or not 0 < len(values) <= MAX_ROLE_VALUES
            or not all(isinstance(item, str) and item for item in values)
        ):
            raise Unauthenticated(
                f"the admin token has no claim {claim!r} with a role",
                hint="tokens without a role are taken from admin.legacy_keys only",
            )
        return values


def foreign() -> Unauthenticated:
    """The refusal of what is no token of this broker; it does not say why."""
    return Unauthenticated("the admin token is not of this broker", hint="check --admin-key")


def known_roles(values: Iterable[str]) -> frozenset[Role]:
    """The roles among these texts; others are somebody else's."""
    names = set(Role)
    return frozenset(Role(value) for value in values if value in names)


def effective_roles(granted: frozenset[Role], asked: frozenset[Role]) -> frozenset[Role]:
    """What a token may do: what its key may do, cut to what the token asks for."""
    everything = frozenset(Role)
    roles = (everything if Role.ADMIN in granted else granted) & (
        everything if Role.ADMIN in asked else asked
    )
    return frozenset({Role.ADMIN}) if Role.ADMIN in roles else roles


def _verify(key: PublicKey, algorithm: str, signature: bytes, signed: bytes) -> None:
    if isinstance(key, Ed25519PublicKey) and algorithm == "EdDSA":
        key.verify(signature, signed)
        return
    if isinstance(key, ec.EllipticCurvePublicKey) and algorithm == "ES256":
        if not isinstance(key.curve, ec.SECP256R1) or len(signature) != 64:
            raise InvalidSignature
        r, s = int.from_bytes(signature[:32]), int.from_bytes(signature[32:])
        key.verify(encode_dss_signature(r, s), signed, ec.ECDSA(hashes.SHA256()))
        return
    if isinstance(key, rsa.RSAPublicKey) and key.key_size >= MIN_RSA_BITS:
        if algorithm == "RS256":
            key.verify(signature, signed, padding.PKCS1v15(), hashes.SHA256())
            return
        if algorithm == "PS256":
            pss = padding.PSS(padding.MGF1(hashes.SHA256()), hashes.SHA256().digest_size)
            key.verify(signature, signed, pss, hashes.SHA256())
            return
    raise InvalidSignature
