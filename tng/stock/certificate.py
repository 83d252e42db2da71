"""RATS-TLS certificates: evidence about a TLS key, inside the certificate of that key.

X.509 v3, self-signed on P-256, with extension 2.23.133.5.4.9 (TCG DICE tagged evidence) whose
OCTET STRING holds CBOR directly: ``tag[evidence bstr, claims bstr]``. The key is bound by claim
``pubkey-hash`` inside the runtime data whose SHA-384 is the report data (reference "TNG" §2.1).
"""

from __future__ import annotations

import base64
import binascii
import datetime as dt
from dataclasses import dataclass, field
from hashlib import sha256, sha384
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID, ObjectIdentifier

from cai import jcs
from cai.errors import FormatError, LimitExceeded
from tng.stock import cbor

TAG_EVIDENCE: Final = 0xC0C000
"""CBOR tag of CoCo evidence."""

TAG_TOKEN: Final = 0xC0C001
"""CBOR tag of a CoCo attestation token."""

EVIDENCE_OID: Final = ObjectIdentifier("2.23.133.5.4.9")
MANIFEST_OID: Final = ObjectIdentifier("2.23.133.5.4.2")

PUBKEY_HASH: Final = "pubkey-hash"
"""Claim that binds the key."""

DIALECT_CLAIM: Final = "cai-dialect"
"""Claim by which a guest of ours says that it also speaks ``cai/1`` (decisions §4, Downgrade)."""

GPU_CLAIM: Final = "cai-gpu-digest"
"""Claim that binds the GPU evidence beside the quote, hex."""

GPU_NONCE_CLAIM: Final = "cai-gpu-nonce"
"""Claim with the nonce of that GPU evidence, hex."""

MAX_CERTIFICATE = 1024 * 1024
"""Largest certificate that is parsed, bytes; a guest with eight GPUs has about 200 KB."""

LIFETIME_S = 3600
"""How long our certificates live, seconds (decisions §4: at most an hour)."""

_BACKDATE = dt.timedelta(minutes=5)
_SHA256_ID = 1
_SHA384_ID = 7


@dataclass(frozen=True, slots=True)
class CocoEvidence:
    """Evidence as the certificate carries it.

    Attributes:
        tee: e.g. ``tdx``.
        evidence: the attestation agent's evidence bytes (JSON).
        additional: its evidence of devices (JSON), or ``None``.
        runtime_data: canonical JSON text whose SHA-384 is the report data.
    """

    tee: str
    evidence: bytes
    additional: bytes | None
    runtime_data: str

    @property
    def claims(self) -> dict[str, Any]:
        """The runtime data as claims.

        Raises:
            FormatError: not canonical JSON with an object.
        """
        value = jcs.parse_canonical(
            self.runtime_data.encode("utf-8"), what="runtime data", limit=MAX_CERTIFICATE
        )
        if not isinstance(value, dict):
            raise FormatError("runtime data: expected an object")
        return value

    @property
    def report_data(self) -> bytes:
        """The 48 bytes that the report data must begin with."""
        return sha384(self.runtime_data.encode("utf-8")).digest()

    def encode(self) -> bytes:
        """CBOR, members in the order of stock certificates."""
        return cbor.encode(
            {
                "tee_type": self.tee,
                "aa_evidence": self.evidence,
                "aa_additional_evidence": self.additional,
                "aa_runtime_data": self.runtime_data,
                "aa_runtime_data_hash_algo": _SHA384_ID,
            }
        )

    @classmethod
    def decode(cls, data: bytes) -> CocoEvidence:
        """Parse CBOR.

        Raises:
            FormatError, LimitExceeded: of another form, or another hash than SHA-384.
        """
        value = cbor.decode(data)
        if not isinstance(value, dict):
            raise FormatError("certificate evidence: expected a map")
        tee, evidence = value.get("tee_type"), value.get("aa_evidence")
        additional, runtime = value.get("aa_additional_evidence"), value.get("aa_runtime_data")
        if (
            not isinstance(tee, str)
            or not isinstance(evidence, bytes)
            or not isinstance(runtime, str)
            or not (additional is None or isinstance(additional, bytes))
        ):
            raise FormatError("certificate evidence: a member is missing or of another kind")
        if value.get("aa_runtime_data_hash_algo") != _SHA384_ID:
            raise FormatError("certificate evidence: only SHA-384 is accepted")
        return cls(tee, evidence, additional, runtime)


@dataclass(frozen=True, slots=True)
class Presented:
    """What a peer's certificate says.

    Attributes:
        spki: DER SubjectPublicKeyInfo of its key.
        evidence: background check; else ``None``.
        token: passport; else empty.
        not_after: end of the certificate.
        not_before: its beginning.
    """

    spki: bytes
    evidence: CocoEvidence | None
    token: str
    not_before: dt.datetime
    not_after: dt.datetime


@dataclass(frozen=True, slots=True)
class Identity:
    """A key with a certificate that carries evidence about it."""

    key: ec.EllipticCurvePrivateKey = field(repr=False)
    certificate: x509.Certificate
    made: dt.datetime

    @property
    def der(self) -> bytes:
        """The certificate, DER."""
        return self.certificate.public_bytes(Encoding.DER)


def spki_der(key: ec.EllipticCurvePublicKey) -> bytes:
    """DER SubjectPublicKeyInfo."""
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def pubkey_hash(spki: bytes) -> str:
    """The claim's value: base64 of CBOR ``[1, SHA-256(SPKI)]``."""
    digest = cbor.encode([_SHA256_ID, sha256(spki).digest()])
    return base64.b64encode(digest).decode("ascii")


def runtime_data(spki: bytes, **more: str) -> str:
    """Canonical JSON that binds a key; further claims do not disturb stock verifiers."""
    return jcs.canonical({PUBKEY_HASH: pubkey_hash(spki), **more}).decode("utf-8")


def make_certificate(
    key: ec.EllipticCurvePrivateKey,
    payload: CocoEvidence | str | None,
    *,
    now: dt.datetime,
    lifetime_s: int = LIFETIME_S,
) -> Identity:
    """A self-signed certificate of this key.

    Args:
        key: on P-256.
        payload: evidence, a token, or ``None`` for a key that proves nothing.
        now: the clock.
        lifetime_s: how long it lives, seconds.
    """
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Inclavare Containers"),
            x509.NameAttribute(NameOID.COMMON_NAME, "TNG"),
        ]
    )
    public = key.public_key()
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATE)
        .not_valid_after(now + dt.timedelta(seconds=lifetime_s))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(public), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(), critical=True)
    )
    if payload is not None:
        tag, body = (
            (TAG_TOKEN, payload.encode("ascii"))
            if isinstance(payload, str)
            else (TAG_EVIDENCE, payload.encode())
        )
        tagged = cbor.encode(cbor.Tagged(tag, [body, b""]))
        builder = builder.add_extension(
            x509.UnrecognizedExtension(EVIDENCE_OID, tagged), critical=False
        ).add_extension(x509.UnrecognizedExtension(MANIFEST_OID, b""), critical=False)
    return Identity(key, builder.sign(key, hashes.SHA256()), now)


def parse_certificate(der: bytes) -> Presented:
    """What a peer's certificate says; nothing of it is verified yet.

    Raises:
        FormatError: not a P-256 certificate, or its evidence has another form.
        LimitExceeded: longer than ``MAX_CERTIFICATE``.
    """
    if len(der) > MAX_CERTIFICATE:
        raise LimitExceeded(f"certificate of {len(der)} bytes, at most {MAX_CERTIFICATE}")
    try:
        certificate = x509.load_der_x509_certificate(der)
        key = certificate.public_key()
        extensions = {item.oid: item.value for item in certificate.extensions}
        begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    except Exception as error:
        # The library's exceptions of unreadable certificates share no base but this one.
        raise FormatError("the peer's certificate cannot be read") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
        raise FormatError("the peer's certificate holds no P-256 key")
    extension = extensions.get(EVIDENCE_OID)
    evidence, token = None, ""
    if isinstance(extension, x509.UnrecognizedExtension):
        evidence, token = _payload(extension.value)
    return Presented(spki_der(key), evidence, token, begins, ends)


def bound_key(claims: dict[str, Any]) -> bytes | None:
    """SHA-256 of the SPKI that claims bind; ``None`` when they bind none.

    Raises:
        FormatError: the claim has another form or hash.
    """
    text = claims.get(PUBKEY_HASH)
    if text is None:
        return None
    try:
        value = cbor.decode(base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError, TypeError) as error:
        raise FormatError(f"claim {PUBKEY_HASH}: not base64") from error
    if (
        not isinstance(value, list)
        or len(value) != 2
        or value[0] != _SHA256_ID
        or not isinstance(value[1], bytes)
    ):
        raise FormatError(f"claim {PUBKEY_HASH}: only SHA-256 is accepted")
    return value[1]


def _payload(data: bytes) -> tuple[CocoEvidence | None, str]:
    value = cbor.decode(data)
    if not isinstance(value, cbor.Tagged) or not isinstance(value.value, list):
        raise FormatError("certificate evidence: expected a tagged array")
    parts = value.value
    if len(parts) != 2 or not isinstance(parts[0], bytes):
        raise FormatError("certificate evidence: expected evidence and claims")
    if value.tag == TAG_EVIDENCE:
        return CocoEvidence.decode(parts[0]), ""
    if value.tag == TAG_TOKEN:
        try:
            return None, parts[0].decode("ascii")
        except UnicodeDecodeError as error:
            raise FormatError("certificate evidence: the token is not ASCII") from error
    raise FormatError(f"certificate evidence: tag {value.tag:#x} is not served")


def _usage() -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=True,
        key_encipherment=True,
        data_encipherment=False,
        key_agreement=True,
        key_cert_sign=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
