"""The simulated NVIDIA: device certificates and attestation reports of GPUs and NVSwitches.

Layouts as docs/spec-evidence.md §4.1 and §4.2, opaque fields as real reports have them: a GH100 of
driver 580, a GB100, and the LS10 switch of a protected-PCIe system.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from hashlib import sha384

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from cai.attest.gpu.certificates import OID_FWID, OID_TCB_INFO
from cai.attest.gpu.report import (
    BLOCK_SPECIFICATION_DMTF,
    NONCE_SIZE,
    REQUEST_HEAD,
    RESPONSE_HEAD,
)
from cai.attest.sim.certificates import (
    LIFETIME,
    Identity,
    der,
    issue,
    key_info,
    raw_signature,
)
from cai.attest.sim.seed import Seed

ARCH = "HOPPER"
DRIVER_VERSION = "580.95.05"
VBIOS_VERSION = "96.00.74.00.1A"
BLOCKS = 64
SWITCH_BLOCKS = 31

FWID = sha384(b"SIMULATED GSP firmware").digest()

_SHA384_OID = bytes.fromhex("0609608648016503040202")


@dataclass(frozen=True, slots=True)
class Chip:
    """One kind of device.

    Attributes:
        arch: label in evidence.
        product: name in reference files.
        stem: what the common names of boot ROM and leaf begin with.
        identity: common name of the certificate below the root.
        provisioner: common name of the one below that.
        blocks: measurement blocks in a report.
        vbios_version: of its firmware.
        dice: the leaf has a DICE TcbInfo (Blackwell), not a composite device identity.
        project, project_sku, chip_sku: parts of the VBIOS reference file's id.
        identity_kind: hex byte in front of the device identity in the boot ROM's subject.
    """

    arch: str
    product: str
    stem: str
    identity: str
    provisioner: str
    blocks: int
    vbios_version: str
    dice: bool = False
    project: str = "1010"
    project_sku: str = "0200"
    chip_sku: str = "882"
    identity_kind: str = "41"


CHIPS = {
    chip.arch: chip
    for chip in (
        Chip(ARCH, "GH100", "GH100 A01 GSP", "NVIDIA GH100 Identity",
             "NVIDIA GH100 Provisioner ICA 1", BLOCKS, VBIOS_VERSION),
        Chip("BLACKWELL", "GB100", "GB100 A01 GSP", "NVIDIA GB100 Identity",
             "NVIDIA GB100 Provisioner ICA 00000", BLOCKS, "97.00.88.00.0F", dice=True,
             project="G525", project_sku="0220", chip_sku="886"),
        Chip("LS10", "LS10", "LS_10 A01 FSP", "NVIDIA GH100 Identity",
             "NVIDIA LS_10 Provisioner ICA 1", SWITCH_BLOCKS, "96.10.73.00.01",
             project="5612", project_sku="0002", chip_sku="890", identity_kind="50"),
    )
}  # fmt: skip
"""Kinds of devices by architecture label."""


@dataclass(frozen=True, slots=True)
class Foundry:
    """The vendor's certificate authorities.

    Attributes:
        root: simulated "NVIDIA Device Identity CA".
        identities: "NVIDIA GH100 Identity" and so on, by common name.
        provisioners: "NVIDIA GH100 Provisioner ICA 1" and so on, by common name.
        rim_root: simulated "NVIDIA CoRIM signing Root CA".
        rim_chain: product CA, L3 and "HCC RIM L4 Signer", in the order of issuing.
    """

    root: Identity
    identities: Mapping[str, Identity]
    provisioners: Mapping[str, Identity]
    rim_root: Identity
    rim_chain: tuple[Identity, Identity, Identity]


@dataclass(frozen=True, slots=True)
class Gpu:
    """One device: its boot ROM, and the firmware key that signs reports."""

    boot_rom: Identity
    leaf: Identity
    chip: Chip = CHIPS[ARCH]


def create_foundry(*, now: datetime, seed: Seed | None = None) -> Foundry:
    """Make the vendor."""
    curve, seed = ec.SECP384R1(), seed or Seed.fresh()

    def authority(name: str, issuer: Identity | None) -> Identity:
        return issue(name, curve=curve, now=now, issuer=issuer, ca=True, seed=seed)

    root = authority("NVIDIA Device Identity CA", None)
    identities = {
        name: authority(name, root) for name in sorted({chip.identity for chip in CHIPS.values()})
    }
    rim_root = authority("NVIDIA CoRIM signing Root CA", None)
    product = authority("NVIDIA Reference Value L2 GH100 001", rim_root)
    signers = authority("NVIDIA Reference Value L3 GH100 001", product)
    signer = issue("HCC RIM L4 Signer", curve=curve, now=now, issuer=signers, seed=seed)
    return Foundry(
        root=root,
        identities=identities,
        provisioners={
            chip.provisioner: authority(chip.provisioner, identities[chip.identity])
            for chip in CHIPS.values()
        },
        rim_root=rim_root,
        rim_chain=(product, signers, signer),
    )


def create_gpu(
    foundry: Foundry,
    *,
    now: datetime,
    chip: Chip = CHIPS[ARCH],
    seed: Seed | None = None,
    lifetime: timedelta = LIFETIME,
) -> Gpu:
    """Make a device.

    Args:
        foundry: certifies it.
        now: time of the making.
        chip: its kind.
        seed: where its keys and its identity come from.
        lifetime: of the leaf; negative makes an expired one.
    """
    curve, seed = ec.SECP384R1(), seed or Seed.fresh()
    boot_rom = issue(
        f"{chip.stem} BROM", curve=curve, now=now, issuer=foundry.provisioners[chip.provisioner],
        ca=True, seed=seed, subject_serial=f"{chip.identity_kind}{pdi(seed).hex()}".upper(),
    )  # fmt: skip
    key = seed.key("leaf", curve)
    oid, value = (OID_TCB_INFO, _tcb_info()) if chip.dice else (OID_FWID, _firmware_identity(key))
    leaf = issue(
        f"{chip.stem} FMC LF", curve=curve, now=now, issuer=boot_rom, key=key, seed=seed,
        extensions=[x509.UnrecognizedExtension(oid, value)], lifetime=lifetime,
    )  # fmt: skip
    return Gpu(boot_rom, leaf, chip)


def pdi(seed: Seed) -> bytes:
    """The physical device identity of the device made from this seed, 8 bytes."""
    return seed.bytes("pdi", 8)


def chain(foundry: Foundry, gpu: Gpu) -> bytes:
    """PEM of a device's chain, leaf first."""
    return b"".join(part.pem for part in (gpu.leaf, gpu.boot_rom, *issuers(foundry, gpu.chip)))


def issuers(foundry: Foundry, chip: Chip) -> tuple[Identity, Identity, Identity]:
    """Provisioner, identity and root above a boot ROM of this kind."""
    identity = foundry.identities[chip.identity]
    return foundry.provisioners[chip.provisioner], identity, foundry.root


def make_report(
    gpu: Gpu,
    nonce: bytes,
    *,
    measurements: Sequence[bytes] | None = None,
    opaque: Mapping[int, bytes | None] | None = None,
    signed_nonce: bytes | None = None,
    responder: bytes | None = None,
) -> bytes:
    """An attestation report.

    Args:
        gpu: signs it.
        nonce: 32 bytes.
        measurements: SHA-384 digests; by default those of the simulated firmware.
        opaque: opaque fields that replace the usual ones; ``None`` leaves a field out.
        signed_nonce: signed in place of ``nonce``, so that the signature is wrong.
        responder: the device's own 32-byte nonce; drawn when absent.
    """
    values = measurements or default_measurements(gpu.chip)
    record = b"".join(
        bytes((index, BLOCK_SPECIFICATION_DMTF))
        + (3 + len(value)).to_bytes(2, "little")
        + b"\x01"
        + len(value).to_bytes(2, "little")
        + value
        for index, value in enumerate(values, start=1)
    )
    fields = _changed(usual_opaque(gpu.chip), opaque or {})
    response = (
        b"\x00"
        + RESPONSE_HEAD
        + b"\x00\x00"
        + bytes((len(values),))
        + len(record).to_bytes(3, "little")
        + record
        + (responder or secrets.token_bytes(NONCE_SIZE))
        + len(fields).to_bytes(2, "little")
        + fields
    )
    signature = raw_signature(gpu.leaf.key, REQUEST_HEAD + (signed_nonce or nonce) + response)
    return REQUEST_HEAD + nonce + response + signature


def default_measurements(chip: Chip = CHIPS[ARCH]) -> list[bytes]:
    """Digests of the simulated firmware, one per block."""
    label = "GPU" if chip.arch == ARCH else chip.product
    return [
        sha384(f"SIMULATED {label} measurement {index}".encode()).digest()
        for index in range(1, chip.blocks + 1)
    ]


def usual_opaque(chip: Chip) -> bytes:
    """The opaque data of a device that is in order."""
    if chip.arch == "LS10":
        return opaque_data(((6, chip.vbios_version.encode()), (23, bytes(2)), (24, bytes(2))))
    if chip.arch == ARCH:
        return _opaque()
    return _changed(
        _opaque(),
        {
            6: vbios_field(chip.vbios_version),
            15: chip.chip_sku.encode().ljust(9, b"\x00"),
            17: chip.project.encode() + b"\x00",
            18: chip.project_sku.encode() + b"\x00",
        },
    )


def opaque_data(fields: Sequence[tuple[int, bytes]]) -> bytes:
    """Opaque fields as a report carries them."""
    return b"".join(
        kind.to_bytes(2, "little") + len(value).to_bytes(2, "little") + value
        for kind, value in fields
    )


def vbios_field(version: str) -> bytes:
    """A GPU's VBIOS version as its report spells it, e.g. ``96.00.74.00.1A``."""
    parts = bytes(int(part, 16) for part in version.split("."))
    return bytes(reversed(parts[:4])) + parts[4:] + bytes(3)


def _opaque() -> bytes:
    return opaque_data(
        (
            (6, vbios_field(VBIOS_VERSION)), (14, bytes.fromhex("b1030000")),
            (15, b"882".ljust(9, b"\x00")), (16, b"0".ljust(5, b"\x00")), (17, b"1010\x00"),
            (18, b"0200\x00"), (19, bytes(2)), (3, DRIVER_VERSION.encode() + b"\x00"),
            (4, bytes.fromhex("8001000000000000")), (11, b"\x55"), (20, FWID), (21, b"\x55"),
            (34, b"\x01\x00"), (36, b"\x00\x00"),
        )
    )  # fmt: skip


def _changed(data: bytes, changes: Mapping[int, bytes | None]) -> bytes:
    fields: dict[int, bytes | None] = {}
    position = 0
    while position < len(data):
        kind = int.from_bytes(data[position : position + 2], "little")
        size = int.from_bytes(data[position + 2 : position + 4], "little")
        fields[kind] = data[position + 4 : position + 4 + size]
        position += 4 + size
    fields |= changes
    return opaque_data([(kind, value) for kind, value in fields.items() if value is not None])


def _firmware_identity(key: ec.EllipticCurvePrivateKey) -> bytes:
    """TCG composite device identity: version, the device's key, its firmware's digest."""
    digest = der(0x30, _SHA384_OID + der(0x04, FWID))
    return der(0x30, der(0x02, b"\x01") + key_info(key) + digest)


def _tcb_info() -> bytes:
    """DICE TcbInfo with one firmware digest."""
    return der(0x30, der(0xA6, der(0x30, _SHA384_OID + der(0x04, FWID))))
