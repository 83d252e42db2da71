"""Giving a resource to a KBS through its admin listener."""

from __future__ import annotations

import ipaddress
import json
import time
from hashlib import sha256

import httpx
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cai import jcs
from cai.attest.jwk import b64u_encode
from cai.errors import (
    PeerError,
    PeerUnreachable,
    Refused,
    Unauthenticated,
    Undecided,
    UsageError,
)

TOKEN_LIFETIME_S = 300
"""How long the admin token of an upload is valid, seconds."""

UPLOAD_TIMEOUT_S = 30.0
"""Longest wait for the KBS, seconds."""

MAX_ANSWER = 64 * 1024
"""Most bytes of an answer that are looked at."""

_MAX_REASON = 200


def check_address(url: str) -> None:
    """Refuse an address that would carry the key in clear over a network.

    Raises:
        UsageError: not an http(s) address, or plain http to another machine.
    """
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, ValueError) as error:
        raise UsageError(f"--kbs {url!r} is not an address") from error
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.userinfo:
        raise UsageError(
            f"--kbs {url!r} is not an http(s) address", hint="e.g. http://127.0.0.1:8081"
        )
    if parsed.scheme == "http" and not _is_loopback(parsed.host):
        raise UsageError(
            f"--kbs {url}: the key would cross the network in clear",
            hint="use https, or a tunnel to the KBS's admin listener on loopback",
        )


def upload_resource(url: str, resource: str, data: bytes, key: Ed25519PrivateKey) -> None:
    """POST a resource's bytes.

    Args:
        url: base of the admin listener, to which ``/kbs/v0`` is appended.
        resource: ``REPO/TYPE/TAG``.
        data: the resource.
        key: the admin key.

    Raises:
        PeerUnreachable: nothing answers.
        Unauthenticated, Refused: the KBS says no.
        Undecided: the KBS asks for further persons; nothing is stored yet.
        PeerError: it answers with an error.
    """
    check_address(url)
    target = f"{url.rstrip('/')}/kbs/v0/resource/{resource}"
    headers = {
        "Authorization": f"Bearer {admin_token(key, now=int(time.time()))}",
        "Content-Type": "application/octet-stream",
    }
    try:
        # A proxy from the environment has no business with an admin token.
        with httpx.Client(timeout=UPLOAD_TIMEOUT_S, trust_env=False) as client:
            answer = client.post(target, content=data, headers=headers)
    except httpx.HTTPError as error:
        raise PeerUnreachable(
            f"the KBS at {url} cannot be reached: {error}", hint="is its admin listener running?"
        ) from error
    if answer.status_code == httpx.codes.ACCEPTED:
        raise Undecided(
            f"the KBS at {url} has not stored it yet: the change waits for several persons",
            hint="kbs proposal list; kbs proposal approve ID", code="proposed",
        )  # fmt: skip
    if answer.is_success:
        return
    said = f"the KBS at {url} answered {answer.status_code}{_reason(answer.content)}"
    if answer.status_code == httpx.codes.UNAUTHORIZED:
        raise Unauthenticated(said, hint="check --admin-key")
    if answer.status_code == httpx.codes.FORBIDDEN:
        raise Refused(said)
    raise PeerError(said, hint="is it the address of the admin listener?")


def admin_token(key: Ed25519PrivateKey, *, now: int) -> str:
    """A short-lived administrator's JWT (EdDSA); ``kid`` finds the key among several."""
    key_id = sha256(key.public_key().public_bytes_raw()).hexdigest()[:32]
    claims = {
        "iss": "cai", "sub": "admin", "aud": ["KBS"], "role": "admin",
        "iat": now, "exp": now + TOKEN_LIFETIME_S,
    }
    header = {"alg": "EdDSA", "kid": key_id, "typ": "JWT"}
    signed = ".".join(b64u_encode(jcs.canonical(part)) for part in (header, claims))
    return f"{signed}.{b64u_encode(key.sign(signed.encode('ascii')))}"


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _reason(body: bytes) -> str:
    """What an error answer says, as printable text."""
    try:
        value = json.loads(body[:MAX_ANSWER])
    except ValueError:
        return ""
    if not isinstance(value, dict):
        return ""
    said = next((value[n] for n in ("message", "detail", "error") if value.get(n)), None)
    text = "".join(letter for letter in str(said) if letter.isprintable())[:_MAX_REASON]
    return f": {text}" if said else ""
