"""The simulated Intel: PCK and TCB-signing certificates, collateral, quotes.

Layouts as docs/spec-evidence.md §2.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from hashlib import sha256

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from cai.attest.sim.certificates import Identity, der, issue, raw_signature, revocation_list
from cai.attest.sim.seed import Seed
from cai.attest.sim.tcb import (
    CPU_SVN,
    EVAL_DATA_NUMBER,
    FMSPC,
    MR_SEAM,
    PCE_SVN,
    QE_ATTRIBUTES,
    QE_ISV_SVN,
    QE_MR_ENCLAVE,
    QE_MR_SIGNER,
    TEE_TCB_SVN,
    CollateralSettings,
    qe_identity,
    tcb_info,
)
from cai.attest.tdx.quote import (
    CERTIFICATION_PEM_CHAIN,
    CERTIFICATION_QE_REPORT,
    INTEL_QE_VENDOR,
    KEY_ECDSA_P256,
    TD15,
    TEE_TDX,
)

__all__ = [
    "EVAL_DATA_NUMBER", "FMSPC", "MR_SEAM", "TEE_TCB_SVN", "Processor", "QuoteFailure",
    "collateral", "create_processor", "make_quote",
]  # fmt: skip

PADDING = bytes(70)
"""Zeros that Intel's quoting service appends."""

PCK_FLAGS = ("dynamic_platform", "cached_keys", "smt_enabled")
"""Flags of a PCK certificate, in the order of their object identifiers."""

_OID_SGX = "1.2.840.113741.1.13.1"
_OID_DER = bytes.fromhex("2a864886f84d010d01")


class QuoteFailure(StrEnum):
    """Ways in which the quoting hardware can be broken or forged."""

    SIGNATURE = "signature"
    """The attestation key signed other bytes."""
    ATTESTATION_KEY = "attestation-key"
    """Signed by a key that the quoting enclave does not name."""
    QE_REPORT = "qe-report"
    """The QE report was changed after the PCK key signed it."""
    TRUNCATED = "truncated"
    """The last bytes are missing."""


@dataclass(frozen=True, slots=True)
class Processor:
    """The private half of a simulated machine.

    Attributes:
        root: simulated "Intel SGX Root CA".
        platform_ca: simulated "Intel SGX PCK Platform CA".
        tcb_signing: simulated "Intel SGX TCB Signing".
        pck: the machine's provisioning certification key.
        attestation_key: the quoting enclave's key, which signs quotes.
    """

    root: Identity
    platform_ca: Identity
    tcb_signing: Identity
    pck: Identity
    attestation_key: ec.EllipticCurvePrivateKey


def create_processor(
    *,
    ppid: bytes,
    instance_id: bytes,
    now: datetime,
    seed: Seed | None = None,
    flags: tuple[str, ...] = PCK_FLAGS,
) -> Processor:
    """Make a machine and the vendor behind it.

    Args:
        ppid: 16 bytes that name the package.
        instance_id: 16 bytes that name the platform.
        now: time of the making.
        seed: where keys come from.
        flags: of ``PCK_FLAGS``, those that the PCK certificate sets.
    """
    curve, seed = ec.SECP256R1(), seed or Seed.fresh()
    root = issue("Intel SGX Root CA", curve=curve, now=now, ca=True, ca_path_length=1, seed=seed)
    platform_ca = issue(
        "Intel SGX PCK Platform CA", curve=curve, now=now, issuer=root, ca=True, ca_path_length=0,
        seed=seed,
    )  # fmt: skip
    sgx = x509.UnrecognizedExtension(
        x509.ObjectIdentifier(_OID_SGX), _sgx_extension(ppid, instance_id, flags)
    )
    return Processor(
        root=root,
        platform_ca=platform_ca,
        tcb_signing=issue("Intel SGX TCB Signing", curve=curve, now=now, issuer=root, seed=seed),
        pck=issue(
            "Intel SGX PCK Certificate", curve=curve, now=now, issuer=platform_ca,
            extensions=[sgx], seed=seed,
        ),
        attestation_key=seed.key("attestation", curve),
    )  # fmt: skip


def collateral(
    processor: Processor, *, now: datetime, settings: CollateralSettings | None = None
) -> dict[str, str]:
    """Collateral for the machine.

    Args:
        processor: the machine and its vendor.
        now: time of the making.
        settings: the dials; by default everything is in order for 30 days.

    Returns:
        The members of a collateral file (``cai.attest.tdx.collateral.MEMBERS``).
    """
    dials = settings or CollateralSettings()
    made = now.astimezone(UTC).replace(microsecond=0)
    expires = made + dials.lifetime
    issued = min(made, expires) - dials.backdated
    window = {
        "issueDate": _stamp(issued),
        "nextUpdate": _stamp(expires),
        "tcbEvaluationDataNumber": dials.eval_data_number,
    }
    platform = json.dumps(tcb_info(window, dials), separators=(",", ":"))
    enclave = json.dumps(qe_identity(window, dials), separators=(",", ":"))
    signer_chain = (processor.tcb_signing.pem + processor.root.pem).decode("ascii")
    # The root's list covers what the root issued, the platform CA's list the PCK certificates.
    by_root = [
        getattr(processor, name).certificate
        for name in ("platform_ca", "tcb_signing") if name in dials.revoked
    ]  # fmt: skip
    by_ca = [processor.pck.certificate] if "pck" in dials.revoked else []
    root_crl = revocation_list(processor.root, start=issued, end=expires, revoked=by_root)
    pck_crl = revocation_list(processor.platform_ca, start=issued, end=expires, revoked=by_ca)
    return {
        "pck_crl_issuer_chain": (processor.platform_ca.pem + processor.root.pem).decode("ascii"),
        "root_ca_crl": root_crl.hex(),
        "pck_crl": pck_crl.hex(),
        "tcb_info_issuer_chain": signer_chain,
        "tcb_info": platform,
        "tcb_info_signature": raw_signature(processor.tcb_signing.key, platform.encode()).hex(),
        "qe_identity_issuer_chain": signer_chain,
        "qe_identity": enclave,
        "qe_identity_signature": raw_signature(processor.tcb_signing.key, enclave.encode()).hex(),
    }


def make_quote(
    processor: Processor,
    *,
    body: bytes,
    qe_id: bytes,
    version: int = 4,
    body_type: int = TD15,
    padding: bytes = PADDING,
    failure: QuoteFailure | None = None,
) -> bytes:
    """A quote over a body, padded as Intel's service pads it.

    Args:
        processor: signs it.
        body: 584 bytes (TD 1.0) or 648 (TD 1.5).
        qe_id: 16 bytes that name the quoting enclave.
        version: 4, or 5 with a descriptor of type and size.
        body_type: type in a version 5 descriptor.
        padding: what follows the signature section.
        failure: how the hardware is broken.
    """
    header = (
        version.to_bytes(2, "little")
        + KEY_ECDSA_P256.to_bytes(2, "little")
        + TEE_TDX.to_bytes(4, "little")
        + bytes(4)
        + INTEL_QE_VENDOR
        + qe_id.ljust(20, b"\x00")
    )
    if version != 4:
        header += body_type.to_bytes(2, "little") + len(body).to_bytes(4, "little")
    section = _signature_section(processor, header + body, failure)
    quote = header + body + len(section).to_bytes(4, "little") + section
    return quote[:-16] if failure is QuoteFailure.TRUNCATED else quote + padding


def _signature_section(
    processor: Processor, signed: bytes, failure: QuoteFailure | None
) -> bytes:
    key = processor.attestation_key
    numbers = key.public_key().public_numbers()
    public = numbers.x.to_bytes(32, "big") + numbers.y.to_bytes(32, "big")
    if failure is QuoteFailure.ATTESTATION_KEY:
        key = Seed.fresh().key("other", ec.SECP256R1())
    auth_data = bytes(range(32))
    qe_report = _qe_report(sha256(public + auth_data).digest())
    qe_signature = raw_signature(processor.pck.key, qe_report)
    if failure is QuoteFailure.QE_REPORT:
        qe_report = bytes((qe_report[0] ^ 1,)) + qe_report[1:]
    chain = processor.pck.pem + processor.platform_ca.pem + processor.root.pem
    certification = (
        qe_report
        + qe_signature
        + len(auth_data).to_bytes(2, "little")
        + auth_data
        + CERTIFICATION_PEM_CHAIN.to_bytes(2, "little")
        + len(chain).to_bytes(4, "little")
        + chain
    )
    if failure is QuoteFailure.SIGNATURE:
        signed += b"\x00"
    return (
        raw_signature(key, signed)
        + public
        + CERTIFICATION_QE_REPORT.to_bytes(2, "little")
        + len(certification).to_bytes(4, "little")
        + certification
    )


def _qe_report(binding: bytes) -> bytes:
    """The SGX report body of the quoting enclave, 384 bytes (spec-evidence §2.3)."""
    report = bytearray(384)
    report[0:16] = CPU_SVN
    report[48:64] = QE_ATTRIBUTES
    report[64:96] = QE_MR_ENCLAVE
    report[128:160] = QE_MR_SIGNER
    report[256:258] = (2).to_bytes(2, "little")
    report[258:260] = QE_ISV_SVN.to_bytes(2, "little")
    report[320:352] = binding
    return bytes(report)


def _sgx_extension(ppid: bytes, instance_id: bytes, flags: tuple[str, ...]) -> bytes:
    """The PCK extension with its ten or so mandatory parts (evidence.md §2.4)."""
    components = [
        _pair(bytes((2, place)), der(0x02, bytes((value,))))
        for place, value in enumerate(CPU_SVN, start=1)
    ]
    tcb = b"".join(components) + _pair(b"\x02\x11", der(0x02, bytes((PCE_SVN,))))
    tcb += _pair(b"\x02\x12", der(0x04, CPU_SVN))
    configuration = b"".join(
        _pair(bytes((7, place)), der(0x01, b"\xff" if name in flags else b"\x00"))
        for place, name in enumerate(PCK_FLAGS, start=1)
    )
    return der(
        0x30,
        _pair(b"\x01", der(0x04, ppid))
        + _pair(b"\x02", der(0x30, tcb))
        + _pair(b"\x03", der(0x04, bytes(2)))
        + _pair(b"\x04", der(0x04, FMSPC))
        + _pair(b"\x05", der(0x0A, b"\x01"))
        + _pair(b"\x06", der(0x04, instance_id))
        + _pair(b"\x07", der(0x30, configuration)),
    )


def _pair(arc: bytes, value: bytes) -> bytes:
    return der(0x30, der(0x06, _OID_DER + arc) + value)


def _stamp(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
