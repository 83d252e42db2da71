"""Administrators' tokens: short-lived JWTs signed by the Ed25519 key of the broker's owner.

Trustee's rules (EdDSA, ``exp`` required, claim ``role``) with a bound on how long a token may live.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from cai import jcs
from cai.attest.jwk import b64u_decode, b64u_encode
from cai.errors import CaiError, Unauthenticated
from kbs.names import KBS_AUDIENCE

ROLE = "admin"
"""The one role."""

MAX_LIFETIME = 3600
"""Longest time that a token may still be valid for, seconds."""

OWN_LIFETIME = 60
"""Lifetime of the tokens that the command line makes for each call, seconds."""

CLOCK_SKEW = 30
"""How far in the future a token may have been issued, seconds."""

MAX_ADMIN_TOKEN = 8 * 1024
"""Longest token that is parsed, characters."""

MAX_SUBJECT = 128
"""Longest ``sub`` that is kept, characters."""


def make_admin_token(key: Ed25519PrivateKey, *, now: datetime, subject: str = "admin") -> str:
    """A token for one call."""
    seconds = int(now.timestamp())
    claims = {
        "sub": subject,
        "aud": [KBS_AUDIENCE],
        "role": ROLE,
        "iat": seconds,
        "exp": seconds + OWN_LIFETIME,
    }
    header = b64u_encode(jcs.canonical({"alg": "EdDSA", "typ": "JWT"}))
    signed = f"{header}.{b64u_encode(jcs.canonical(claims))}"
    return f"{signed}.{b64u_encode(key.sign(signed.encode('ascii')))}"


def authenticate(authorization: str | None, key: Ed25519PublicKey, *, now: datetime) -> str:
    """Check an ``Authorization`` header.

    Returns:
        The administrator's name (``sub``).

    Raises:
        Unauthenticated: no token, or one that is not a living admin token of this broker.
    """
    scheme, _, token = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise Unauthenticated("an admin token is required", hint="give --admin-key")
    try:
        claims = _verified_claims(token.strip(), key)
    except CaiError as error:
        raise Unauthenticated(
            "the admin token is not of this broker", hint="check --admin-key"
        ) from error
    seconds = now.timestamp()
    expires, issued, not_before = (claims.get(name) for name in ("exp", "iat", "nbf"))
    if type(expires) is not int or expires <= seconds:
        raise Unauthenticated("the admin token has expired or has no end")
    if expires > seconds + MAX_LIFETIME:
        raise Unauthenticated(f"the admin token is valid for more than {MAX_LIFETIME} seconds")
    for moment in (issued, not_before):
        if moment is not None and (type(moment) is not int or moment > seconds + CLOCK_SKEW):
            raise Unauthenticated("the admin token is not valid yet", hint="check the clocks")
    if claims.get("role") != ROLE:
        raise Unauthenticated(f"the admin token has not the role {ROLE}")
    audience = claims.get("aud", KBS_AUDIENCE)
    if KBS_AUDIENCE not in (audience if isinstance(audience, list) else [audience]):
        raise Unauthenticated("the admin token is for another service")
    subject = claims.get("sub", ROLE)
    if not isinstance(subject, str) or len(subject) > MAX_SUBJECT:
        raise Unauthenticated("the admin token has no usable subject")
    return subject


def _verified_claims(token: str, key: Ed25519PublicKey) -> dict[str, Any]:
    parts = token.split(".")
    if len(token) > MAX_ADMIN_TOKEN or len(parts) != 3:
        raise Unauthenticated("not a token")
    header, body, signature = (b64u_decode(part, what="admin token") for part in parts)
    # The key is configured; nothing in the header can choose another key or algorithm.
    head = jcs.parse(header, what="admin token", limit=MAX_ADMIN_TOKEN)
    if not isinstance(head, dict) or head.get("alg") != "EdDSA":
        raise Unauthenticated("not a token")
    try:
        key.verify(signature, f"{parts[0]}.{parts[1]}".encode("ascii"))
    except InvalidSignature as error:
        raise Unauthenticated("not a token") from error
    claims = jcs.parse(body, what="admin token", limit=MAX_ADMIN_TOKEN)
    if not isinstance(claims, dict):
        raise Unauthenticated("not a token")
    return claims
