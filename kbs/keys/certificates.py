"""Certificates for the broker's ES256 keys, as token consumers want them in ``x5c``.

A key gets a small authority of its own whose private half is thrown away after it has signed the
one leaf. Trust comes from pinning the authority or the key, never from the chain itself.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

VALID_DAYS: Final = 3650
"""How long a certificate is valid; rotation ends a key's use long before."""

_BACKDATED: Final = timedelta(minutes=5)


def issue_chain(
    key: ec.EllipticCurvePublicKey, *, name: str, instance: str, simulated: bool, now: datetime
) -> tuple[bytes, ...]:
    """A leaf for ``key`` and its self-signed authority, DER, leaf first.

    Args:
        key: P-256.
        name: what it signs, e.g. ``token``.
        instance: id of the database.
        simulated: whether the names say SIMULATED.
        now: the time.
    """
    authority_key = ec.generate_private_key(ec.SECP256R1())
    authority = _name(f"CAI KBS {name} authority", instance, simulated=simulated)
    subject = _name(f"CAI KBS {name}", instance, simulated=simulated)
    root = (
        _builder(authority, authority, authority_key.public_key(), now)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(
            x509.SubjectKeyIdentifier.from_public_key(authority_key.public_key()), critical=False
        )
        .sign(authority_key, hashes.SHA256())
    )
    leaf = (
        _builder(authority, subject, key, now)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()),
            critical=False,
        )
        .sign(authority_key, hashes.SHA256())
    )
    return leaf.public_bytes(Encoding.DER), root.public_bytes(Encoding.DER)


def _builder(
    issuer: x509.Name, subject: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .issuer_name(issuer)
        .subject_name(subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + timedelta(days=VALID_DAYS))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False,
        key_cert_sign=signs_certificates, crl_sign=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _name(common: str, instance: str, *, simulated: bool) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "SIMULATED" if simulated else "CAI"),
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, instance),
            x509.NameAttribute(NameOID.COMMON_NAME, common),
        ]
    )
