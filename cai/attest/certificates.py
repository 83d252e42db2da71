"""X.509 chains as evidence carries them: strict PEM in, a chain to one pinned root out.

Vendors' evidence carries its own certificates. Nothing in them is trusted but what a chain to the
caller's root proves, and two spellings of one chain must not both pass: base64 is compared with its
own re-encoding and nothing but white space may stand around the blocks.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from datetime import datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtensionOID, NameOID

from cai.errors import EvidenceRefused, FormatError, LimitExceeded

MAX_PEM = 64 * 1024
"""Largest PEM chain that is parsed, bytes."""

MAX_CERTIFICATES = 8
"""Most certificates in one chain."""

LIBRARY_ERRORS = (
    ValueError, TypeError, OverflowError, UnsupportedAlgorithm, InvalidSignature,
    x509.InvalidVersion, x509.DuplicateExtension, x509.UnsupportedGeneralNameType,
)  # fmt: skip
"""Everything that the X.509 library was seen or is documented to raise over bytes from outside."""

_BLOCK = re.compile(
    rb"\s*-----BEGIN CERTIFICATE-----\s([A-Za-z0-9+/=\s]+)-----END CERTIFICATE-----(?=\s|\Z)"
)

_UNDERSTOOD = {ExtensionOID.BASIC_CONSTRAINTS, ExtensionOID.KEY_USAGE}
"""Critical extensions that ``verify_chain`` honours; any other critical one is refused."""


def load_chain(pem: bytes, *, what: str) -> tuple[x509.Certificate, ...]:
    """Parse PEM certificates strictly, in the order given.

    One trailing NUL is accepted (Intel's quoting service sends one, evidence.md §2.3).

    Args:
        pem: the text.
        what: names the chain in errors.

    Raises:
        LimitExceeded: longer than ``MAX_PEM`` or more than ``MAX_CERTIFICATES``.
        FormatError: anything but PEM certificates, or base64 that is not its own re-encoding.
    """
    if len(pem) > MAX_PEM:
        raise LimitExceeded(f"{what}: {len(pem)} bytes of PEM, at most {MAX_PEM} are accepted")
    rest = pem.removesuffix(b"\x00")
    chain: list[x509.Certificate] = []
    position = 0
    while match := _BLOCK.match(rest, position):
        if len(chain) == MAX_CERTIFICATES:
            raise LimitExceeded(f"{what}: more than {MAX_CERTIFICATES} certificates")
        chain.append(load_base64(b"".join(match[1].split()), what=what))
        position = match.end()
    if rest[position:].strip():
        raise FormatError(f"{what}: something other than PEM certificates at byte {position}")
    if not chain:
        raise FormatError(f"{what}: no certificate")
    return tuple(chain)


def is_plain(pem: bytes, chain: Sequence[x509.Certificate]) -> bool:
    """Whether a chain is written as encoders write it, so that no byte of it can be changed.

    The line end after the last certificate may be missing, and one NUL may follow.
    """
    plain = b"".join(certificate.public_bytes(Encoding.PEM) for certificate in chain)
    return pem.removesuffix(b"\x00") in (plain, plain[:-1])


def common_name(certificate: x509.Certificate) -> str:
    """The subject's common name, or the empty string when there is not exactly one.

    Raises:
        FormatError: the subject cannot be parsed.
    """
    try:
        names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    except LIBRARY_ERRORS as error:
        raise FormatError(f"certificate subject: {error}") from error
    return str(names[0].value) if len(names) == 1 else ""


def organisations(certificate: x509.Certificate) -> tuple[str, ...]:
    """The subject's organisation names.

    Raises:
        FormatError: the subject cannot be parsed.
    """
    try:
        names = certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
    except LIBRARY_ERRORS as error:
        raise FormatError(f"certificate subject: {error}") from error
    return tuple(str(name.value) for name in names)


def verify_chain(
    chain: Sequence[x509.Certificate], *, root: bytes, now: datetime,
    issued: set[tuple[x509.Certificate, x509.Certificate]] | None = None,
) -> None:  # fmt: skip
    """Verify a chain, leaf first, whose last member must be the pinned root.

    Steps (spec-evidence §4.3): (a) the last certificate is the pinned root, byte for byte; (b) each
    certificate is valid at ``now``; (c) each is signed by the next, names matching; (d) every
    issuer is a CA with keyCertSign whose path length allows its place, the leaf is no CA; (e) no
    critical extension is left that nobody here understands.

    Args:
        chain: two or more certificates.
        root: DER of the pinned root.
        now: time of the verification, timezone-aware.
        issued: certificates with their issuers whose signatures are known to hold; what is found
            to hold is added. Devices of one list share most of their chains.

    Raises:
        EvidenceRefused: naming the first certificate that fails.
    """
    if len(chain) < 2:
        raise EvidenceRefused("the chain has no issuer")
    # (a) The sender's copy only says which root is meant; it is never a source of trust.
    if chain[-1].public_bytes(Encoding.DER) != root:
        raise EvidenceRefused(f"ends in {_title(chain[-1])}, which is not the pinned root")
    for place, certificate in enumerate(chain):
        # (b)
        if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
            raise EvidenceRefused(f"{_title(certificate)} is not valid at {now.isoformat()}")
        # (c)
        issuer = chain[min(place + 1, len(chain) - 1)]
        try:
            if issued is None or (certificate, issuer) not in issued:
                certificate.verify_directly_issued_by(issuer)
        except LIBRARY_ERRORS as error:
            raise EvidenceRefused(
                f"{_title(certificate)} is not signed by {_title(issuer)}"
            ) from error
        if issued is not None:
            issued.add((certificate, issuer))
        # (d) and (e)
        try:
            _check_extensions(certificate, place)
        except LIBRARY_ERRORS as error:
            raise EvidenceRefused(f"{_title(certificate)}: extensions: {error}") from error


def _check_extensions(certificate: x509.Certificate, place: int) -> None:
    is_ca, path_length, signs_certificates = False, None, False
    for extension in certificate.extensions:
        value = extension.value
        if isinstance(value, x509.BasicConstraints):
            is_ca, path_length = value.ca, value.path_length
        elif isinstance(value, x509.KeyUsage):
            signs_certificates = value.key_cert_sign
        if extension.critical and extension.oid not in _UNDERSTOOD:
            oid = extension.oid.dotted_string
            raise EvidenceRefused(f"{_title(certificate)}: unknown critical extension {oid}")
    if place == 0:
        if is_ca or signs_certificates:
            raise EvidenceRefused(f"{_title(certificate)} is a CA where the leaf should be")
        return
    if not is_ca or not signs_certificates:
        raise EvidenceRefused(f"{_title(certificate)} is not allowed to issue certificates")
    # Path length counts the CAs below this one, the leaf not included (RFC 5280 §4.2.1.9).
    if path_length is not None and place - 1 > path_length:
        raise EvidenceRefused(f"{_title(certificate)}: path length {path_length} is exceeded")


def load_base64(text: bytes, *, what: str) -> x509.Certificate:
    """One certificate from the base64 of its DER, without white space.

    Raises:
        FormatError: not base64, not its own re-encoding, or not a certificate.
    """
    try:
        der = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise FormatError(f"{what}: not base64") from error
    if base64.b64encode(der) != text:
        raise FormatError(f"{what}: base64 with stray bits")
    try:
        certificate = x509.load_der_x509_certificate(der)
        # Force the lazily parsed parts, so that nothing later can raise on them.
        certificate.subject, certificate.issuer  # noqa: B018
        certificate.not_valid_before_utc, certificate.not_valid_after_utc  # noqa: B018
        serial = certificate.serial_number
        whole = der.endswith(whole_bit_string(certificate.signature))
    except LIBRARY_ERRORS as error:
        raise FormatError(f"{what}: not a certificate ({error})") from error
    if not whole:
        raise FormatError(f"{what}: the certificate does not end in its signature, bit for bit")
    if serial <= 0:
        raise FormatError(f"{what}: a certificate's serial number is not positive")
    return certificate


def whole_bit_string(content: bytes) -> bytes:
    """DER of a BIT STRING that has no unused bits.

    The library does not say how many bits of a signature are declared unused, which the signature
    itself does not cover; so the encoding is compared with this.
    """
    size = len(content) + 1
    if size < 0x80:
        head = bytes((size,))
    else:
        width = (size.bit_length() + 7) // 8
        head = bytes((0x80 | width,)) + size.to_bytes(width, "big")
    return b"\x03" + head + b"\x00" + content


def _title(certificate: x509.Certificate) -> str:
    return repr(common_name(certificate) or "unnamed certificate")
