"""Certificates and revocation lists of the simulated vendors.

Common names are the vendors'; the organisation is always SIMULATED.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from cai.attest.anchors import SIMULATED_ORGANISATION
from cai.attest.sim.seed import Seed
from cai.errors import FormatError

BACKDATED = timedelta(days=1)
"""How long before their making certificates are valid, so that clocks may differ."""

LIFETIME = timedelta(days=3650)
"""Validity of simulated certificates."""

USAGE_CA = x509.KeyUsage(
    digital_signature=False, content_commitment=False, key_encipherment=False,
    data_encipherment=False, key_agreement=False, key_cert_sign=True, crl_sign=True,
    encipher_only=False, decipher_only=False,
)  # fmt: skip
USAGE_LEAF = x509.KeyUsage(
    digital_signature=True, content_commitment=False, key_encipherment=False,
    data_encipherment=False, key_agreement=False, key_cert_sign=False, crl_sign=False,
    encipher_only=False, decipher_only=False,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Identity:
    """A private key with its certificate."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @property
    def pem(self) -> bytes:
        """The certificate as PEM."""
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        """The private key as PEM; only ever written to the platform's private directory."""
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    @classmethod
    def load(cls, key: bytes, certificate: bytes, *, what: str) -> Identity:
        """Parse both PEM texts.

        Raises:
            FormatError: either is not what it should be.
        """
        try:
            private = load_pem_private_key(key, None)
            parsed = x509.load_pem_x509_certificate(certificate)
        except (ValueError, TypeError) as error:
            raise FormatError(f"{what}: not a key and its certificate") from error
        if not isinstance(private, ec.EllipticCurvePrivateKey):
            raise FormatError(f"{what}: not an elliptic-curve key")
        return cls(private, parsed)


def key_info(key: ec.EllipticCurvePrivateKey) -> bytes:
    """DER SubjectPublicKeyInfo of the public half."""
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def issue(
    common_name: str,
    *,
    curve: ec.EllipticCurve,
    now: datetime,
    issuer: Identity | None = None,
    ca_path_length: int | None = None,
    ca: bool = False,
    extensions: Sequence[x509.ExtensionType] = (),
    key: ec.EllipticCurvePrivateKey | None = None,
    seed: Seed | None = None,
    label: str = "",
    lifetime: timedelta = LIFETIME,
    subject_serial: str = "",
) -> Identity:
    """Make a certificate; self-signed without ``issuer``.

    Args:
        common_name: as the vendor names its own.
        curve: of a new key, and of the signature's digest: SHA-256 on P-256, SHA-384 on P-384.
        now: time of the making.
        issuer: signs the certificate.
        ca_path_length: path length constraint of a CA.
        ca: whether it may issue certificates.
        extensions: further extensions, none critical.
        key: a key to certify in place of a new one.
        seed: where key and serial number come from; drawn when absent.
        label: tells certificates of one name apart under one seed.
        lifetime: validity from a day before ``now``; negative makes an expired certificate.
        subject_serial: serial number attribute of the subject, where the vendor puts a device's
            identity.
    """
    source, label = seed or Seed.fresh(), label or common_name
    private = key or source.key(label, curve)
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, SIMULATED_ORGANISATION),
            *(
                [x509.NameAttribute(NameOID.SERIAL_NUMBER, subject_serial)]
                if subject_serial
                else []
            ),
        ]
    )
    start = (now - BACKDATED).replace(microsecond=0)
    signer = issuer.key if issuer else private
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer.certificate.subject if issuer else name)
        .public_key(private.public_key())
        .serial_number(source.serial(label))
        .not_valid_before(start - max(-lifetime, timedelta()) * 2)
        .not_valid_after(start + lifetime)
        .add_extension(x509.BasicConstraints(ca, ca_path_length if ca else None), critical=True)
        .add_extension(USAGE_CA if ca else USAGE_LEAF, critical=True)
        .add_extension(
            x509.SubjectKeyIdentifier.from_public_key(private.public_key()), critical=False
        )
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()),
            critical=False,
        )
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    return Identity(private, builder.sign(signer, _digest(signer), ecdsa_deterministic=True))


def revocation_list(
    issuer: Identity,
    *,
    start: datetime,
    end: datetime,
    revoked: Sequence[x509.Certificate] = (),
) -> bytes:
    """A revocation list, DER, valid from ``start`` to ``end``."""
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.certificate.subject)
        .last_update(start.astimezone(UTC).replace(microsecond=0))
        .next_update(end.astimezone(UTC).replace(microsecond=0))
        .add_extension(x509.CRLNumber(1), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key()),
            critical=False,
        )
    )
    for certificate in revoked:
        entry = (
            x509.RevokedCertificateBuilder()
            .serial_number(certificate.serial_number)
            .revocation_date(start.astimezone(UTC).replace(microsecond=0))
        )
        builder = builder.add_revoked_certificate(entry.build())
    signed = builder.sign(issuer.key, _digest(issuer.key), ecdsa_deterministic=True)
    return signed.public_bytes(Encoding.DER)


def raw_signature(key: ec.EllipticCurvePrivateKey, data: bytes) -> bytes:
    """ECDSA as r ‖ s, big-endian: SHA-256 on P-256, SHA-384 on P-384, deterministic (RFC 6979)."""
    width = (key.curve.key_size + 7) // 8
    signature = key.sign(data, ec.ECDSA(_digest(key), deterministic_signing=True))
    r, s = decode_dss_signature(signature)
    return r.to_bytes(width, "big") + s.to_bytes(width, "big")


def der(tag: int, content: bytes) -> bytes:
    """One DER element, definite length (X.690 §8.1)."""
    size = len(content)
    if size < 0x80:
        return bytes((tag, size)) + content
    width = (size.bit_length() + 7) // 8
    return bytes((tag, 0x80 | width)) + size.to_bytes(width, "big") + content


def _digest(key: ec.EllipticCurvePrivateKey) -> hashes.SHA256 | hashes.SHA384:
    return hashes.SHA384() if isinstance(key.curve, ec.SECP384R1) else hashes.SHA256()
