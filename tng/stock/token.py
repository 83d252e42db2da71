"""Attestation tokens of a Trustee service: who signed them, what they appraise and bind.

The signing key is never taken from the token on its own word: its ``x5c`` must lead to a
certificate that the settings trust (reference "TNG" §2.3). Everything ends in checks of a verdict.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from cai import jcs
from cai.attest.verdict import Check, check, not_asked
from cai.errors import CaiError, FormatError, LimitExceeded

MAX_TOKEN = 512 * 1024
"""Longest token that is parsed, characters; with the evidence inside one has about 50 000."""

MAX_CHAIN = 8
"""Most certificates of a token's signer."""

CLOCK_SKEW_S = 30
"""How much two clocks may differ, seconds."""

MIN_RSA_BITS = 2048
"""Shortest RSA key of a signer."""

EAR_CLAIMS: Final = ("submods", "cpu0", "ear.veraison.annotated-evidence", "runtime_data_claims")
"""Where an EAR token holds the claims that the evidence is bound to."""

MAX_SUBMODS = 64
"""Most submodules of one token."""

OLD_CLAIMS: Final = ("customized_claims", "runtime_data")
"""Where Trustee's older tokens hold them."""

AFFIRMING: Final = "affirming"


@dataclass(frozen=True, slots=True)
class Token:
    """A parsed token, its signature not verified yet.

    Attributes:
        claims: its claims.
        signed: the bytes that the signature is over.
        signature: raw.
        algorithm: ``ES256`` or ``RS384``.
        chain: certificates of its signer, leaf first.
    """

    claims: Mapping[str, Any]
    signed: bytes
    signature: bytes
    algorithm: str
    chain: tuple[x509.Certificate, ...]

    @classmethod
    def parse(cls, text: str) -> Token:
        """Read a compact JWT.

        Raises:
            FormatError, LimitExceeded: it is none, or of another algorithm.
        """
        if len(text) > MAX_TOKEN:
            raise LimitExceeded(f"token of {len(text)} characters, at most {MAX_TOKEN}")
        parts = text.strip().split(".")
        if len(parts) != 3 or not text.isascii():
            raise FormatError("attestation token: not a JWT")
        head = jcs.parse(_decode(parts[0]), what="attestation token", limit=MAX_TOKEN)
        claims = jcs.parse(_decode(parts[1]), what="attestation token", limit=MAX_TOKEN)
        if not isinstance(head, dict) or not isinstance(claims, dict):
            raise FormatError("attestation token: not a JWT")
        algorithm = head.get("alg")
        if algorithm not in ("ES256", "RS384"):
            raise FormatError("attestation token: only ES256 and RS384 are accepted")
        jwk = head.get("jwk")
        chain = _chain((jwk if isinstance(jwk, dict) else head).get("x5c"))
        signed = f"{parts[0]}.{parts[1]}".encode("ascii")
        return cls(claims, signed, _decode(parts[2]), algorithm, chain)

    @property
    def runtime_claims(self) -> Mapping[str, Any]:
        """The claims that the evidence is bound to; empty where the token has none."""
        for path in (EAR_CLAIMS, OLD_CLAIMS):
            value: Any = self.claims
            for name in path:
                value = value.get(name) if isinstance(value, dict) else None
            if isinstance(value, dict):
                return value
        return {}

    @property
    def expires(self) -> int | None:
        """``exp``, Unix seconds."""
        value = self.claims.get("exp")
        return value if type(value) is int else None


def verify_token(
    token: Token,
    *,
    roots: Sequence[x509.Certificate] | None,
    policy_ids: Sequence[str],
    now: datetime,
) -> tuple[Check, ...]:
    """Every check of a token but the one that needs the peer's key.

    Args:
        token: parsed.
        roots: certificates that its signer must lead to; ``None`` takes any signer.
        policy_ids: policies whose appraisal it must name.
        now: the clock.
    """
    return (
        _signature(token),
        _signer(token, roots, now),
        _time(token, now),
        *_statuses(token),
        *_policies(token, policy_ids),
    )


def about_claims(token: Token, claims: Mapping[str, Any]) -> Check:
    """Whether a token is about these claims."""
    appraised = token.runtime_claims
    return check(
        "stock.claims",
        passed=all(appraised.get(name) == value for name, value in claims.items()),
        reason="the token is about other claims",
    )


def _signature(token: Token) -> Check:
    try:
        leaf = token.chain[0].public_key() if token.chain else None
        _verify_signature(token, leaf)
    except (CaiError, InvalidSignature, ValueError, TypeError) as error:
        reason = error.message if isinstance(error, CaiError) else "it does not verify"
        return check("as.token.signature", passed=False, reason=reason)
    return check("as.token.signature", passed=True)


def _verify_signature(token: Token, key: object) -> None:
    if token.algorithm == "ES256" and isinstance(key, ec.EllipticCurvePublicKey):
        if key.curve.name != "secp256r1" or len(token.signature) != 64:
            raise FormatError("the signer's key is not on P-256")
        r, s = token.signature[:32], token.signature[32:]
        der = encode_dss_signature(int.from_bytes(r), int.from_bytes(s))
        key.verify(der, token.signed, ec.ECDSA(hashes.SHA256()))
    elif token.algorithm == "RS384" and isinstance(key, rsa.RSAPublicKey):
        if key.key_size < MIN_RSA_BITS:
            raise FormatError(f"the signer's RSA key has less than {MIN_RSA_BITS} bits")
        key.verify(token.signature, token.signed, padding.PKCS1v15(), hashes.SHA384())
    else:
        raise FormatError("the token names no certificate of its signer")


def _signer(token: Token, roots: Sequence[x509.Certificate] | None, now: datetime) -> Check:
    name = "as.token.signer"
    if roots is None:
        return not_asked(name)
    return check(
        name,
        passed=bool(token.chain) and leads_to(token.chain, roots, now),
        reason="its certificate does not lead to a trusted one",
    )


def leads_to(
    chain: Sequence[x509.Certificate], roots: Sequence[x509.Certificate], now: datetime
) -> bool:
    """Whether a chain, leaf first, leads to one of the roots; every certificate in date."""
    for position, certificate in enumerate(chain):
        if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
            return False
        if any(certificate == root for root in roots):
            return True
        issuers = [root for root in roots if _issued(certificate, root)]
        if any(root.not_valid_before_utc <= now <= root.not_valid_after_utc for root in issuers):
            return True
        if position + 1 == len(chain) or not _issued(certificate, chain[position + 1]):
            return False
    return False


def _issued(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        constraints = issuer.extensions.get_extension_for_class(x509.BasicConstraints).value
        if not constraints.ca:
            return False
        certificate.verify_directly_issued_by(issuer)
    except Exception:  # the library's exceptions for unusable certificates share no base
        return False
    return True


def _time(token: Token, now: datetime) -> Check:
    expires, begins = token.expires, token.claims.get("nbf")
    seconds = now.timestamp()
    living = expires is not None and expires + CLOCK_SKEW_S > seconds
    begun = begins is None or (type(begins) is int and begins <= seconds + CLOCK_SKEW_S)
    return check(
        "as.token.time",
        passed=living and begun,
        observed=str(expires),
        reason="it has expired, has no end, or is not valid yet",
    )


def _statuses(token: Token) -> Iterator[Check]:
    submods = token.claims.get("submods")
    if not isinstance(submods, dict):
        # Trustee's older tokens carry no statuses; its policies decide before it signs.
        yield check(
            "as.appraisal",
            passed=isinstance(token.claims.get("evaluation-reports"), list),
            reason="the token appraises nothing",
        )
        return
    if not 0 < len(submods) <= MAX_SUBMODS:
        yield check("as.appraisal", passed=False, observed=f"{len(submods)} submodules",
                    reason="the token appraises nothing, or too much")  # fmt: skip
        return
    for name, submod in submods.items():
        status = submod.get("ear.status") if isinstance(submod, dict) else None
        yield check(
            f"as.appraisal.{name}",
            passed=status == AFFIRMING,
            observed=str(status)[:32],
            expected=AFFIRMING,
            reason="the attestation service does not affirm it",
        )


def _policies(token: Token, wanted: Sequence[str]) -> Iterator[Check]:
    if not wanted:
        yield not_asked("as.policy")
        return
    found = set(_policy_ids(token))
    for policy in wanted:
        yield check(
            "as.policy",
            passed=policy in found,
            observed=", ".join(sorted(found))[:128],
            expected=policy,
            reason="the token was appraised by another policy",
        )


def _policy_ids(token: Token) -> Iterator[str]:
    submods = token.claims.get("submods")
    if isinstance(submods, dict):
        for submod in submods.values():
            value = submod.get("ear.appraisal-policy-id") if isinstance(submod, dict) else None
            if isinstance(value, str):
                yield value
    reports = token.claims.get("evaluation-reports")
    for report in reports if isinstance(reports, list) else ():
        value = report.get("policy-id") if isinstance(report, dict) else None
        if isinstance(value, str):
            yield value


def _chain(entries: object) -> tuple[x509.Certificate, ...]:
    if entries is None:
        return ()
    if not isinstance(entries, list) or len(entries) > MAX_CHAIN:
        raise FormatError(f"attestation token: x5c must be a list of at most {MAX_CHAIN}")
    chain = []
    for entry in entries:
        try:
            chain.append(x509.load_der_x509_certificate(_decode(str(entry))))
        except Exception as error:  # the library's exceptions share no base
            raise FormatError("attestation token: a certificate cannot be read") from error
    return tuple(chain)


def _decode(text: str) -> bytes:
    # Services write both alphabets, with and without padding.
    plain = text.rstrip("=").replace("+", "-").replace("/", "_")
    try:
        return base64.b64decode(
            plain + "=" * (-len(plain) % 4), altchars=b"-_", validate=True
        )
    except (binascii.Error, ValueError) as error:
        raise FormatError("attestation token: not base64") from error
