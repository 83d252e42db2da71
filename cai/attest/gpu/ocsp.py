"""Revocation by OCSP (RFC 6960), without a network (docs/spec-evidence.md §4.8).

Requests are built here and answers are checked here; who carries them is somebody else's job.
Answers fetched without a nonce on a schedule are as good as their age, so the age is reported.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from hashlib import new as new_hash
from itertools import pairwise

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509 import ocsp
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID

from cai.attest.certificates import LIBRARY_ERRORS, whole_bit_string
from cai.errors import EvidenceRefused, FormatError, LimitExceeded

RESPONDER = "https://ocsp.ndis.nvidia.com"
"""NVIDIA's responder, for whoever fetches."""

MAX_RESPONSE = 64 * 1024
"""Largest answer that is parsed, bytes."""

ASSUMED_VALIDITY = timedelta(hours=1)
"""How long an answer without ``nextUpdate`` is taken as current."""

CLOCK_SKEW = timedelta(minutes=5)
"""How far ahead of our clock an answer may have been produced."""

NONCE_SIZES = range(1, 129)
"""Lengths of a nonce that RFC 9654 allows, bytes."""

_HASHES: dict[str, hashes.HashAlgorithm] = {
    "sha1": hashes.SHA1(),  # noqa: S303 - names a certificate in a request, secures nothing
    "sha256": hashes.SHA256(),
    "sha384": hashes.SHA384(),
}

_STRONG = (hashes.SHA256, hashes.SHA384, hashes.SHA512)
"""Hashes under which an answer may be signed."""

_UNDERSTOOD = {ExtensionOID.BASIC_CONSTRAINTS, ExtensionOID.KEY_USAGE,
               ExtensionOID.EXTENDED_KEY_USAGE}  # fmt: skip

Link = tuple[x509.Certificate, x509.Certificate]
"""A certificate and the one that issued it."""


@dataclass(frozen=True, slots=True)
class OcspAnswer:
    """An authentic answer about one certificate; ``good`` and the times are yet to be judged.

    Attributes:
        good: the issuer knows the certificate and has not revoked it.
        status: as the answer has it, with the reason of a revocation.
        produced: since when the answer is known to be right (``thisUpdate``).
        expires: until when it may be used.
    """

    good: bool
    status: str
    produced: datetime
    expires: datetime

    def current(self, now: datetime) -> bool:
        """Whether the answer may be used at ``now``."""
        return self.produced <= now + CLOCK_SKEW and now <= self.expires


def device_links(chain: Sequence[x509.Certificate]) -> tuple[Link, ...]:
    """What to ask about a device: all but its leaf, which it issues itself, and the root."""
    return tuple(pairwise(chain[1:]))


def rim_links(chain: Sequence[x509.Certificate]) -> tuple[Link, ...]:
    """What to ask about the chain of a reference file: everything but the root."""
    return tuple(pairwise(chain))


def build_request(
    certificate: x509.Certificate, issuer: x509.Certificate, *, nonce: bytes | None = None,
    algorithm: str = "sha384",
) -> bytes:  # fmt: skip
    """DER of a request about one certificate, to POST as ``application/ocsp-request``.

    Args:
        certificate: the one asked about.
        issuer: the one that issued it.
        nonce: ties the answer to this request; left out for answers that are to be kept.
        algorithm: ``sha384`` as NVIDIA's Python asks, ``sha1`` or ``sha256``.

    Raises:
        FormatError: unknown algorithm, bad nonce or unusable certificates.
    """
    if algorithm not in _HASHES:
        raise FormatError(f"OCSP request: unknown algorithm {algorithm!r}")
    if nonce is not None and len(nonce) not in NONCE_SIZES:
        raise FormatError(f"OCSP request: nonce of {len(nonce)} bytes")
    try:
        builder = ocsp.OCSPRequestBuilder().add_certificate(
            certificate, issuer, _HASHES[algorithm]
        )
        if nonce is not None:
            builder = builder.add_extension(x509.OCSPNonce(nonce), critical=False)
        return builder.build().public_bytes(Encoding.DER)
    except LIBRARY_ERRORS as error:
        raise FormatError(f"OCSP request: {error}") from error


def authenticate_answer(
    data: bytes, *, certificate: x509.Certificate, issuer: x509.Certificate, now: datetime,
    nonce: bytes | None = None,
) -> OcspAnswer:  # fmt: skip
    """Establish that an answer is the issuer's, and about this certificate.

    Steps (spec-evidence §4.8): (a) a successful response; (b) it speaks once about this serial
    number, name and key of the issuer; (c) the signer is the issuer, or a certificate that the
    issuer issued for OCSP, valid now, and is the responder named; (d) its signature holds; (e) the
    nonce is ours, if we sent one; (f) no critical extension is left that nobody here understands.

    Raises:
        LimitExceeded, FormatError: no such answer.
        EvidenceRefused: not the issuer's, not about this certificate, or of another request.
    """
    try:
        response = _load(data)
        single = _single(response)
        _about(single, certificate, issuer)
        if whole_bit_string(response.signature) not in data:
            raise FormatError("OCSP answer: a signature with unused bits")
        _signature(response, issuer, now)
        _extensions(response, nonce)
        return _answer(single)
    except LIBRARY_ERRORS as error:
        raise FormatError(f"OCSP answer: {error}") from error


def check_answer(
    data: bytes, *, certificate: x509.Certificate, issuer: x509.Certificate, now: datetime,
    nonce: bytes | None = None, max_age: timedelta | None = None,
) -> OcspAnswer:  # fmt: skip
    """Authenticate an answer and demand that it is good and current.

    Args:
        data: DER of the response.
        certificate: the one asked about.
        issuer: the one that issued it.
        now: time of the verification, timezone-aware.
        nonce: of the request, if it had one.
        max_age: greatest time since ``thisUpdate``.

    Raises:
        LimitExceeded, FormatError, EvidenceRefused: as ``authenticate_answer``; or the certificate
            is revoked, on hold or unknown, or the answer is not current.
    """
    answer = authenticate_answer(
        data, certificate=certificate, issuer=issuer, now=now, nonce=nonce
    )
    if not answer.good:
        raise EvidenceRefused(f"the certificate is {answer.status}")
    if not answer.current(now):
        raise EvidenceRefused(
            f"the answer is of {answer.produced.isoformat()}, usable until"
            f" {answer.expires.isoformat()}"
        )
    if max_age is not None and now - answer.produced > max_age:
        raise EvidenceRefused(f"the answer is older than {max_age}")
    return answer


def serial_number(data: bytes) -> int:
    """The serial number that an answer claims to speak about; only to choose answers by.

    Raises:
        LimitExceeded, FormatError: no answer, or one without content.
        EvidenceRefused: the responder reports an error.
    """
    try:
        return _single(_load(data)).serial_number
    except LIBRARY_ERRORS as error:
        raise FormatError(f"OCSP answer: {error}") from error


def _load(data: bytes) -> ocsp.OCSPResponse:
    if len(data) > MAX_RESPONSE:
        raise LimitExceeded(f"OCSP answer: {len(data)} bytes, at most {MAX_RESPONSE} are accepted")
    response = ocsp.load_der_ocsp_response(data)
    if response.response_status is not ocsp.OCSPResponseStatus.SUCCESSFUL:
        raise EvidenceRefused(f"the responder says {response.response_status.name}")
    return response


def _single(response: ocsp.OCSPResponse) -> ocsp.OCSPSingleResponse:
    found = list(response.responses)
    if len(found) != 1:
        raise FormatError(f"OCSP answer: about {len(found)} certificates, one was asked about")
    return found[0]


def _about(
    single: ocsp.OCSPSingleResponse, certificate: x509.Certificate, issuer: x509.Certificate
) -> None:
    hashed = single.hash_algorithm.name
    if hashed not in _HASHES:
        raise EvidenceRefused("the answer names its certificate under an unknown hash")
    name, key = (
        new_hash(hashed, part, usedforsecurity=False).digest()
        for part in (issuer.subject.public_bytes(), _key_bits(issuer))
    )
    if (single.serial_number, single.issuer_name_hash, single.issuer_key_hash) != (
        certificate.serial_number, name, key
    ):  # fmt: skip
        raise EvidenceRefused("the answer does not speak about this certificate")


def _key_bits(certificate: x509.Certificate) -> bytes:
    """Content of the BIT STRING of the public key, which an issuer's key hash is over."""
    key = certificate.public_key()
    if isinstance(key, ec.EllipticCurvePublicKey):
        return key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    if isinstance(key, rsa.RSAPublicKey):
        return key.public_bytes(Encoding.DER, PublicFormat.PKCS1)
    raise FormatError("OCSP answer: the issuer's key is of another kind")


def _signature(response: ocsp.OCSPResponse, issuer: x509.Certificate, now: datetime) -> None:
    signer = _signer(response, issuer, now)
    algorithm = response.signature_hash_algorithm
    if not isinstance(algorithm, _STRONG):
        raise EvidenceRefused("the answer is signed under a weak or unknown hash")
    key, data = signer.public_key(), response.tbs_response_bytes
    try:
        if isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(response.signature, data, ec.ECDSA(algorithm))
        elif isinstance(key, rsa.RSAPublicKey) and key.key_size >= 2048:
            key.verify(response.signature, data, padding.PKCS1v15(), algorithm)
        else:
            raise EvidenceRefused("the responder's key is of another kind or too short")
    except LIBRARY_ERRORS as error:
        raise EvidenceRefused("the answer's signature does not hold") from error


def _signer(
    response: ocsp.OCSPResponse, issuer: x509.Certificate, now: datetime
) -> x509.Certificate:
    if _is_responder(response, issuer):
        return issuer
    for candidate in response.certificates:
        if not _is_responder(response, candidate):
            continue
        try:
            candidate.verify_directly_issued_by(issuer)
        except LIBRARY_ERRORS as error:
            raise EvidenceRefused("the responder is not the issuer's") from error
        if not candidate.not_valid_before_utc <= now <= candidate.not_valid_after_utc:
            raise EvidenceRefused("the responder's certificate is not valid now")
        _may_answer(candidate)
        return candidate
    raise EvidenceRefused("the answer names a responder that is neither the issuer nor enclosed")


def _may_answer(responder: x509.Certificate) -> None:
    purposes: list[x509.ObjectIdentifier] = []
    for extension in responder.extensions:
        value = extension.value
        if isinstance(value, x509.ExtendedKeyUsage):
            purposes = list(value)
        elif isinstance(value, x509.KeyUsage) and not value.digital_signature:
            raise EvidenceRefused("the responder may not sign")
        if extension.critical and extension.oid not in _UNDERSTOOD:
            raise EvidenceRefused("the responder's certificate has an unknown critical extension")
    if ExtendedKeyUsageOID.OCSP_SIGNING not in purposes:
        raise EvidenceRefused("the responder may not answer for the issuer (OCSPSigning)")


def _is_responder(response: ocsp.OCSPResponse, certificate: x509.Certificate) -> bool:
    if response.responder_name is not None:
        return response.responder_name == certificate.subject
    if response.responder_key_hash is None:
        return False
    # RFC 6960 §4.2.1 fixes SHA-1 here; it only names the key that then has to verify.
    digest = new_hash("sha1", _key_bits(certificate), usedforsecurity=False).digest()
    return hmac.compare_digest(response.responder_key_hash, digest)


def _extensions(response: ocsp.OCSPResponse, nonce: bytes | None) -> None:
    answered: bytes | None = None
    for extension in response.extensions:
        if isinstance(extension.value, x509.OCSPNonce):
            answered = extension.value.nonce
        elif extension.critical:
            raise EvidenceRefused("the answer has an unknown critical extension")
    if any(extension.critical for extension in response.single_extensions):
        raise EvidenceRefused("the answer has an unknown critical extension")
    if nonce is not None and (answered is None or not hmac.compare_digest(answered, nonce)):
        raise EvidenceRefused("the answer is to another request (nonce)")


def _answer(single: ocsp.OCSPSingleResponse) -> OcspAnswer:
    status = single.certificate_status
    produced = single.this_update_utc
    text = status.name.lower()
    if status is ocsp.OCSPCertStatus.REVOKED:
        reason = single.revocation_reason
        text = f"revoked ({'no reason given' if reason is None else reason.value})"
    return OcspAnswer(
        good=status is ocsp.OCSPCertStatus.GOOD,
        status=text,
        produced=produced,
        expires=single.next_update_utc or produced + ASSUMED_VALIDITY,
    )
