"""Attestation tokens: EAR-shaped JWTs, and the claims that the release policy reads.

ES256 only, signed and verified by this broker's own keys, ``aud`` is this broker and ``use`` is
``release`` (decisions §6): a token is a ticket to a session's facts, not a verdict, and neither its
header nor its claims can bring a key along. The header's ``kid`` is for people. Evidence is named
by digest, so that a guest with many GPUs still fits into an HTTP header.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import (
    decode_dss_signature,
    encode_dss_signature,
)

from cai import __version__, jcs
from cai.attest.facts import CPU
from cai.attest.jwk import b64u_decode, b64u_encode
from cai.errors import CaiError, Unauthenticated
from kbs.keys.signing import SigningKey
from kbs.names import Realm
from kbs.policy.appraisal import Appraisal

PROFILE: Final = "tag:github.com,2024:confidential-containers/Trustee"
"""``eat_profile`` that consumers of Trustee's tokens look for."""

USE: Final = "release"
"""``use`` of these tokens."""

UNKNOWN: Final = "token-unknown"
"""Code of a token that no key of this broker signed, or that is none at all."""

MAX_TOKEN = 256 * 1024
"""Longest token that is parsed, characters."""

_SIGNATURE_HALF = 32


@dataclass(frozen=True, slots=True)
class TokenContext:
    """What a token says beside its submodules.

    Attributes:
        issuer: ``iss``.
        audience: ``aud``.
        use: ``release`` for this broker's own tokens, ``appraisal`` for those of ``/as/``.
        issued: now.
        expires: Unix seconds.
        id: ``jti``; of a release token the reference of its session.
    """

    issuer: str
    audience: str
    use: str
    issued: datetime
    expires: int
    id: str


def ear_claims(
    appraisal: Appraisal,
    context: TokenContext,
    *,
    evidence: Mapping[str, str],
    simulated: bool,
) -> dict[str, Any]:
    """The claims of a token made of an appraisal; also the input of resource policies.

    Args:
        appraisal: of the guest.
        context: what the token says beside it.
        evidence: digests of the evidence, hex; the evidence itself stays out, so that a guest with
            many GPUs still fits into an HTTP header.
        simulated: the facts are a simulated platform's.
    """
    submods: dict[str, Any] = {}
    for item in appraisal.submodules:
        annotated = dict(item.submodule.claims)
        if item.submodule.name == CPU:
            annotated["evidence"] = dict(evidence)
        submods[item.submodule.name] = {
            "ear.status": item.status,
            "ear.trustworthiness-vector": dict(item.vector),
            "ear.appraisal-policy-id": item.policy_id,
            "cai.policy-sha256": item.policy_digest,
            "ear.veraison.annotated-evidence": annotated,
            "simulated": simulated,
            **{str(extension["name"]): extension["value"] for extension in item.extensions},
        }
    return {
        "eat_profile": PROFILE,
        "iss": context.issuer,
        "aud": context.audience,
        "use": context.use,
        "jti": context.id,
        "iat": int(context.issued.timestamp()),
        "exp": context.expires,
        "ear.verifier-id": {"developer": "CAI", "build": f"cai-kbs {__version__}"},
        "submods": submods,
    }


def sign_token(
    claims: Mapping[str, Any], key: SigningKey | ec.EllipticCurvePrivateKey
) -> str:
    """The claims as a JWT signed by ES256; the header names the key where that has a name."""
    head: dict[str, Any] = {"alg": "ES256", "typ": "JWT"}
    if isinstance(key, SigningKey):
        head["kid"], private = key.id, key.es256
    else:
        private = key
    header = b64u_encode(jcs.canonical(head))
    signed = f"{header}.{b64u_encode(jcs.canonical(dict(claims)))}"
    der = private.sign(signed.encode("ascii"), ec.ECDSA(hashes.SHA256()))
    signature = b"".join(part.to_bytes(_SIGNATURE_HALF) for part in decode_dss_signature(der))
    return f"{signed}.{b64u_encode(signature)}"


def session_of_token(
    token: str,
    keys: ec.EllipticCurvePublicKey | Iterable[SigningKey],
    *,
    realm: Realm,
    instance: str,
    now: datetime,
) -> str:
    """Verify a token and return the session that it is a ticket to.

    Args:
        token: the JWT.
        keys: ``core.signing.living``: those of this broker whose signatures are good now.
        realm: of this broker.
        instance: its id.
        now: its clock.

    Raises:
        Unauthenticated: it is not a living release token of this broker.
    """
    try:
        claims = _verified_claims(token, _public(keys))
    except CaiError as error:
        raise Unauthenticated(
            "the attestation token is not of this broker", hint="attest with this broker",
            code=UNKNOWN,
        ) from error  # fmt: skip
    expires, ref = claims.get("exp"), claims.get("jti")
    if claims.get("aud") != instance:
        raise Unauthenticated(
            "the attestation token is for another audience", code="token-audience"
        )
    if claims.get("iss") != realm.issuer or claims.get("use") != USE or not isinstance(ref, str):
        raise Unauthenticated("the attestation token is for another use", code="token-use")
    if type(expires) is not int or expires <= now.timestamp():
        raise Unauthenticated(
            "the attestation token has expired", hint="attest again", code="token-expired"
        )
    return ref


def _public(
    keys: ec.EllipticCurvePublicKey | Iterable[SigningKey],
) -> tuple[ec.EllipticCurvePublicKey, ...]:
    if isinstance(keys, ec.EllipticCurvePublicKey):
        return (keys,)
    return tuple(key.es256.public_key() for key in keys)


def _verified_claims(
    token: str, keys: tuple[ec.EllipticCurvePublicKey, ...]
) -> dict[str, Any]:
    parts = token.split(".")
    if len(token) > MAX_TOKEN or len(parts) != 3:
        raise Unauthenticated("not a token")
    header, body, signature = (b64u_decode(part, what="token") for part in parts)
    # The algorithm is ours to choose; a header that says otherwise is refused, and its jwk, x5c and
    # kid are never looked at.
    head = jcs.parse(header, what="token", limit=MAX_TOKEN)
    if not isinstance(head, dict) or head.get("alg") != "ES256":
        raise Unauthenticated("not a token")
    if len(signature) != 2 * _SIGNATURE_HALF:
        raise Unauthenticated("not a token")
    halves = (signature[:_SIGNATURE_HALF], signature[_SIGNATURE_HALF:])
    der = encode_dss_signature(*(int.from_bytes(half) for half in halves))
    signed = f"{parts[0]}.{parts[1]}".encode("ascii")
    if not any(_verifies(key, der, signed) for key in keys):
        raise Unauthenticated("not a token")
    claims = jcs.parse(body, what="token", limit=MAX_TOKEN)
    if not isinstance(claims, dict):
        raise Unauthenticated("not a token")
    return claims


def _verifies(key: ec.EllipticCurvePublicKey, signature: bytes, signed: bytes) -> bool:
    try:
        key.verify(signature, signed, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True
