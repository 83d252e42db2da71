"""Attestation tokens: EAR-shaped JWTs, and the claims that the release policy reads.

ES256 only, signed and verified by this broker's own key, ``aud`` is this broker and ``use`` is
``release`` (decisions §6): a token is a ticket to a session's facts, not a verdict, and neither its
header nor its claims can bring a key along. Evidence is named by digest, so that a guest with many
GPUs still fits into an HTTP header.
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
from cai.attest.facts import CPU, Facts
from cai.attest.jwk import b64u_decode, b64u_encode
from cai.attest.verdict import Check, Outcome
from cai.errors import CaiError, Unauthenticated
from kbs.names import Realm
from kbs.policy.appraisal import Appraisal

PROFILE: Final = "tag:github.com,2024:confidential-containers/Trustee"
"""``eat_profile`` that consumers of Trustee's tokens look for."""

USE: Final = "release"
"""``use`` of these tokens."""

MAX_TOKEN = 256 * 1024
"""Longest token that is parsed, characters."""

NO_POLICY: Final = "none"
"""``ear.appraisal-policy-id`` while no verification policy is set."""

_SIGNATURE_HALF = 32

# AR4SI tiers: 2 and 3 affirm, 97 contradicts, 0 claims nothing.
_VECTOR: Final = {
    "affirming": {"configuration": 2, "executables": 3, "hardware": 2},
    "contraindicated": {"configuration": 97, "executables": 97, "hardware": 97},
    "none": {"configuration": 0, "executables": 0, "hardware": 0},
}
_OTHER_CLAIMS: Final = (
    "file-system", "instance-identity", "runtime-opaque", "sourced-data", "storage-opaque",
)  # fmt: skip


def token_claims(
    facts: Facts,
    appraisal: Iterable[Check] | None,
    *,
    policy_digest: str | None,
    realm: Realm,
    instance: str,
    runtime: Mapping[str, Any],
    evidence: Mapping[str, str],
    issued: datetime,
    expires: int,
    ref: str,
) -> dict[str, Any]:
    """The claims of a token, which are also the input of the release policy.

    Args:
        facts: verified facts.
        appraisal: layer 2 checks; ``None`` when no verification policy is set.
        policy_digest: SHA-256 of that policy, hex.
        realm: of this broker.
        instance: its id.
        runtime: nonce and public key of the session.
        evidence: digests of the evidence, hex.
        issued: now.
        expires: Unix seconds.
        ref: reference of the session.
    """
    status = _statuses(facts, appraisal)
    submods = {}
    for name, claims in facts.claims():
        annotated = dict(claims)
        if name == CPU:
            annotated |= {"runtime_data_claims": dict(runtime), "evidence": dict(evidence)}
        submods[name] = {
            "ear.status": status[name],
            "ear.trustworthiness-vector": {
                **_VECTOR[status[name]], **dict.fromkeys(_OTHER_CLAIMS, 0),
            },
            "ear.appraisal-policy-id": NO_POLICY if policy_digest is None else policy_digest,
            "ear.veraison.annotated-evidence": annotated,
            "simulated": facts.simulated,
        }
    return {
        "eat_profile": PROFILE,
        "iss": realm.issuer,
        "aud": instance,
        "use": USE,
        "jti": ref,
        "iat": int(issued.timestamp()),
        "exp": expires,
        "ear.verifier-id": {"developer": "CAI", "build": f"cai-kbs {__version__}"},
        "submods": submods,
    }


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


def sign_token(claims: Mapping[str, Any], key: ec.EllipticCurvePrivateKey) -> str:
    """The claims as a JWT signed by ES256."""
    header = b64u_encode(jcs.canonical({"alg": "ES256", "typ": "JWT"}))
    signed = f"{header}.{b64u_encode(jcs.canonical(dict(claims)))}"
    der = key.sign(signed.encode("ascii"), ec.ECDSA(hashes.SHA256()))
    signature = b"".join(part.to_bytes(_SIGNATURE_HALF) for part in decode_dss_signature(der))
    return f"{signed}.{b64u_encode(signature)}"


def session_of_token(
    token: str, key: ec.EllipticCurvePublicKey, *, realm: Realm, instance: str, now: datetime
) -> str:
    """Verify a token and return the session that it is a ticket to.

    Raises:
        Unauthenticated: it is not a living release token of this broker.
    """
    try:
        claims = _verified_claims(token, key)
    except CaiError as error:
        raise Unauthenticated("the attestation token is not of this broker") from error
    expires, ref = claims.get("exp"), claims.get("jti")
    if (
        claims.get("iss") != realm.issuer
        or claims.get("aud") != instance
        or claims.get("use") != USE
        or not isinstance(ref, str)
    ):
        raise Unauthenticated("the attestation token is for another use")
    if type(expires) is not int or expires <= now.timestamp():
        raise Unauthenticated("the attestation token has expired", hint="attest again")
    return ref


def _verified_claims(token: str, key: ec.EllipticCurvePublicKey) -> dict[str, Any]:
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
    try:
        key.verify(der, f"{parts[0]}.{parts[1]}".encode("ascii"), ec.ECDSA(hashes.SHA256()))
    except InvalidSignature as error:
        raise Unauthenticated("not a token") from error
    claims = jcs.parse(body, what="token", limit=MAX_TOKEN)
    if not isinstance(claims, dict):
        raise Unauthenticated("not a token")
    return claims


def _statuses(facts: Facts, appraisal: Iterable[Check] | None) -> dict[str, str]:
    """Status of each submodule: checks named ``gpu.…`` speak of the devices, others of the CPU."""
    names = [name for name, _ in facts.claims()]
    if appraisal is None:
        return dict.fromkeys(names, "none")
    failed = [item.name for item in appraisal if item.outcome is Outcome.FAIL]
    device_failed = any(name.startswith("gpu.") for name in failed)
    cpu_failed = any(not name.startswith("gpu.") for name in failed)
    return {
        name: "contraindicated" if (cpu_failed if name == CPU else device_failed) else "affirming"
        for name in names
    }
