"""The simulated NVIDIA: device certificates and attestation reports of a GH100.

Layouts as docs/spec-evidence.md §4.1 and §4.2, opaque fields as a real report of driver 580 has
them.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha384

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from cai.attest.gpu.certificates import OID_FWID
from cai.attest.gpu.report import BLOCK_SPECIFICATION_DMTF, REQUEST_HEAD, RESPONSE_HEAD
from cai.attest.sim.certificates import Identity, der, issue, key_info

ARCH = "HOPPER"
DRIVER_VERSION = "580.95.05"
VBIOS_VERSION = "96.00.74.00.1A"
BLOCKS = 64

FWID = sha384(b"SIMULATED GSP firmware").digest()

_SHA384_OID = bytes.fromhex("0609608648016503040202")
_VBIOS = bytes.fromhex("007400961a000000")
"""``VBIOS_VERSION`` as the report spells it."""


@dataclass(frozen=True, slots=True)
class Foundry:
    """The vendor's certificate authorities.

    Attributes:
        root: simulated "NVIDIA Device Identity CA".
        identity: simulated "NVIDIA GH100 Identity".
        provisioner: simulated "NVIDIA GH100 Provisioner ICA 1".
    """

    root: Identity
    identity: Identity
    provisioner: Identity


@dataclass(frozen=True, slots=True)
class Gpu:
    """One device: its boot ROM, and the firmware key that signs reports."""

    boot_rom: Identity
    leaf: Identity


def create_foundry(*, now: datetime) -> Foundry:
    """Make the vendor."""
    curve = ec.SECP384R1()
    root = issue("NVIDIA Device Identity CA", curve=curve, now=now, ca=True)
    identity = issue("NVIDIA GH100 Identity", curve=curve, now=now, issuer=root, ca=True)
    provisioner = issue(
        "NVIDIA GH100 Provisioner ICA 1", curve=curve, now=now, issuer=identity, ca=True
    )
    return Foundry(root, identity, provisioner)


def create_gpu(foundry: Foundry, *, now: datetime) -> Gpu:
    """Make a device."""
    curve = ec.SECP384R1()
    boot_rom = issue(
        "GH100 A01 GSP BROM", curve=curve, now=now, issuer=foundry.provisioner, ca=True
    )
    key = ec.generate_private_key(curve)
    fwid = x509.UnrecognizedExtension(OID_FWID, _firmware_identity(key))
    leaf = issue(
        "GH100 A01 GSP FMC LF", curve=curve, now=now, issuer=boot_rom, extensions=[fwid], key=key
    )
    return Gpu(boot_rom, leaf)


def chain(foundry: Foundry, gpu: Gpu) -> bytes:
    """PEM of a device's chain, leaf first."""
    parts = (gpu.leaf, gpu.boot_rom, foundry.provisioner, foundry.identity, foundry.root)
    return b"".join(part.pem for part in parts)


def make_report(gpu: Gpu, nonce: bytes, *, measurements: list[bytes] | None = None) -> bytes:
    """An attestation report.

    Args:
        gpu: signs it.
        nonce: 32 bytes.
        measurements: 64 SHA-384 digests; by default those of the simulated firmware.
    """
    values = measurements or default_measurements()
    record = b"".join(
        bytes((index, BLOCK_SPECIFICATION_DMTF))
        + (3 + len(value)).to_bytes(2, "little")
        + b"\x01"
        + len(value).to_bytes(2, "little")
        + value
        for index, value in enumerate(values, start=1)
    )
    opaque = _opaque()
    signed = (
        REQUEST_HEAD
        + nonce
        + b"\x00"
        + RESPONSE_HEAD
        + b"\x00\x00"
        + bytes((len(values),))
        + len(record).to_bytes(3, "little")
        + record
        + secrets.token_bytes(32)
        + len(opaque).to_bytes(2, "little")
        + opaque
    )
    r, s = decode_dss_signature(gpu.leaf.key.sign(signed, ec.ECDSA(hashes.SHA384())))
    return signed + r.to_bytes(48, "big") + s.to_bytes(48, "big")


def default_measurements() -> list[bytes]:
    """Digests of the simulated firmware, one per block."""
    return [
        sha384(f"SIMULATED GPU measurement {index}".encode()).digest()
        for index in range(1, BLOCKS + 1)
    ]


def _opaque() -> bytes:
    fields = (
        (6, _VBIOS), (14, bytes.fromhex("b1030000")), (15, b"882".ljust(9, b"\x00")),
        (16, b"0".ljust(5, b"\x00")), (17, b"1010\x00"), (18, b"0200\x00"), (19, bytes(2)),
        (3, DRIVER_VERSION.encode() + b"\x00"), (4, bytes.fromhex("8001000000000000")),
        (11, b"\x55"), (20, FWID), (21, b"\x55"), (34, b"\x01\x00"), (36, b"\x00\x00"),
    )  # fmt: skip
    return b"".join(
        kind.to_bytes(2, "little") + len(value).to_bytes(2, "little") + value
        for kind, value in fields
    )


def _firmware_identity(key: ec.EllipticCurvePrivateKey) -> bytes:
    """TCG composite device identity: version, the device's key, its firmware's digest."""
    digest = der(0x30, _SHA384_OID + der(0x04, FWID))
    return der(0x30, der(0x02, b"\x01") + key_info(key) + digest)
