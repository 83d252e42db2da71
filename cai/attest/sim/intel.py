"""The simulated Intel: PCK and TCB-signing certificates, collateral, quotes.

Layouts as docs/spec-evidence.md §2; what dcap-qvl demands of TCB information and QE identity was
found by running it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import sha256, sha384

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from cai.attest.sim.certificates import Identity, der, issue, revocation_list
from cai.attest.tdx.quote import (
    CERTIFICATION_PEM_CHAIN,
    CERTIFICATION_QE_REPORT,
    INTEL_QE_VENDOR,
    KEY_ECDSA_P256,
    TEE_TDX,
)

COLLATERAL_LIFETIME = timedelta(days=30)
"""Validity of simulated collateral from its making, as Intel's."""

COLLATERAL_BACKDATED = timedelta(hours=1)
"""How long before its making collateral is valid, so that clocks may differ."""

FMSPC = b"SIMUL\x00"
"""Platform family of simulated platforms; spells what it is."""

EVAL_DATA_NUMBER = 19

CPU_SVN = bytes((3, 3, 2, 2, 4, 1, 0, 5)) + bytes(8)
PCE_SVN = 13
QE_ISV_SVN = 6

TEE_TCB_SVN = bytes((6, 1, 3)) + bytes(13)
"""Module build 6 of the TDX 1.5 line, loader component 3."""

MR_SEAM = sha384(b"SIMULATED TDX module 1.5 build 6").digest()
QE_MR_SIGNER = sha256(b"SIMULATED quoting enclave signer").digest()
QE_MR_ENCLAVE = sha256(b"SIMULATED quoting enclave").digest()
QE_ATTRIBUTES = bytes.fromhex("1500000000000000e700000000000000")

TCB_DATE = "2025-05-14T00:00:00Z"

PADDING = bytes(70)
"""Zeros that Intel's quoting service appends."""

_OID_SGX = "1.2.840.113741.1.13.1"
_OID_DER = bytes.fromhex("2a864886f84d010d01")


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


def create_processor(*, ppid: bytes, instance_id: bytes, now: datetime) -> Processor:
    """Make a machine and the vendor behind it.

    Args:
        ppid: 16 bytes that name the package.
        instance_id: 16 bytes that name the platform.
        now: time of the making.
    """
    curve = ec.SECP256R1()
    root = issue("Intel SGX Root CA", curve=curve, now=now, ca=True, ca_path_length=1)
    platform_ca = issue(
        "Intel SGX PCK Platform CA", curve=curve, now=now, issuer=root, ca=True, ca_path_length=0
    )
    sgx = x509.UnrecognizedExtension(
        x509.ObjectIdentifier(_OID_SGX), _sgx_extension(ppid, instance_id)
    )
    return Processor(
        root=root,
        platform_ca=platform_ca,
        tcb_signing=issue("Intel SGX TCB Signing", curve=curve, now=now, issuer=root),
        pck=issue(
            "Intel SGX PCK Certificate", curve=curve, now=now, issuer=platform_ca, extensions=[sgx]
        ),
        attestation_key=ec.generate_private_key(curve),
    )


def collateral(processor: Processor, *, now: datetime) -> dict[str, str]:
    """Collateral for the machine, valid for ``COLLATERAL_LIFETIME``.

    Returns:
        The members of a collateral file (``cai.attest.tdx.collateral.MEMBERS``).
    """
    made = now.astimezone(UTC).replace(microsecond=0)
    issued, expires = made - COLLATERAL_BACKDATED, made + COLLATERAL_LIFETIME
    window = {
        "issueDate": _stamp(issued),
        "nextUpdate": _stamp(expires),
        "tcbEvaluationDataNumber": EVAL_DATA_NUMBER,
    }
    tcb_info = json.dumps(_tcb_info(window), separators=(",", ":"))
    qe_identity = json.dumps(_qe_identity(window), separators=(",", ":"))
    signer_chain = (processor.tcb_signing.pem + processor.root.pem).decode("ascii")
    root_crl = revocation_list(processor.root, start=issued, end=expires)
    pck_crl = revocation_list(processor.platform_ca, start=issued, end=expires)
    return {
        "pck_crl_issuer_chain": (processor.platform_ca.pem + processor.root.pem).decode("ascii"),
        "root_ca_crl": root_crl.hex(),
        "pck_crl": pck_crl.hex(),
        "tcb_info_issuer_chain": signer_chain,
        "tcb_info": tcb_info,
        "tcb_info_signature": _sign(processor.tcb_signing.key, tcb_info.encode()).hex(),
        "qe_identity_issuer_chain": signer_chain,
        "qe_identity": qe_identity,
        "qe_identity_signature": _sign(processor.tcb_signing.key, qe_identity.encode()).hex(),
    }


def make_quote(processor: Processor, *, body: bytes, qe_id: bytes) -> bytes:
    """A version 4 quote over a TD 1.0 body, padded as Intel's service pads it.

    Args:
        processor: signs it.
        body: 584 bytes.
        qe_id: 16 bytes that name the quoting enclave.
    """
    header = (
        (4).to_bytes(2, "little")
        + KEY_ECDSA_P256.to_bytes(2, "little")
        + TEE_TDX.to_bytes(4, "little")
        + bytes(4)
        + INTEL_QE_VENDOR
        + qe_id.ljust(20, b"\x00")
    )
    numbers = processor.attestation_key.public_key().public_numbers()
    public = numbers.x.to_bytes(32, "big") + numbers.y.to_bytes(32, "big")
    auth_data = bytes(range(32))
    qe_report = _qe_report(sha256(public + auth_data).digest())
    chain = processor.pck.pem + processor.platform_ca.pem + processor.root.pem
    certification = (
        qe_report
        + _sign(processor.pck.key, qe_report)
        + len(auth_data).to_bytes(2, "little")
        + auth_data
        + CERTIFICATION_PEM_CHAIN.to_bytes(2, "little")
        + len(chain).to_bytes(4, "little")
        + chain
    )
    section = (
        _sign(processor.attestation_key, header + body)
        + public
        + CERTIFICATION_QE_REPORT.to_bytes(2, "little")
        + len(certification).to_bytes(4, "little")
        + certification
    )
    return header + body + len(section).to_bytes(4, "little") + section + PADDING


def _tcb_info(window: dict[str, object]) -> dict[str, object]:
    zero = {"mrsigner": "00" * 48, "attributes": "00" * 8, "attributesMask": "FF" * 8}
    level = {
        "tcb": {
            "sgxtcbcomponents": [{"svn": value} for value in CPU_SVN],
            "pcesvn": PCE_SVN,
            "tdxtcbcomponents": [{"svn": value} for value in TEE_TCB_SVN],
        },
        "tcbDate": TCB_DATE,
        "tcbStatus": "UpToDate",
    }
    module = {
        "id": f"TDX_{TEE_TCB_SVN[1]:02X}",
        **zero,
        "tcbLevels": [
            {"tcb": {"isvsvn": TEE_TCB_SVN[0]}, "tcbDate": TCB_DATE, "tcbStatus": "UpToDate"}
        ],
    }
    return {
        "id": "TDX",
        "version": 3,
        **window,
        "fmspc": FMSPC.hex().upper(),
        "pceId": "0000",
        "tcbType": 0,
        "tdxModule": zero,
        "tdxModuleIdentities": [module],
        "tcbLevels": [level],
    }


def _qe_identity(window: dict[str, object]) -> dict[str, object]:
    return {
        "id": "TD_QE",
        "version": 2,
        **window,
        "miscselect": "00000000",
        "miscselectMask": "FFFFFFFF",
        "attributes": "11000000000000000000000000000000",
        "attributesMask": "FBFFFFFFFFFFFFFF0000000000000000",
        "mrsigner": QE_MR_SIGNER.hex().upper(),
        "isvprodid": 2,
        "tcbLevels": [
            {"tcb": {"isvsvn": QE_ISV_SVN}, "tcbDate": TCB_DATE, "tcbStatus": "UpToDate"}
        ],
    }


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


def _sgx_extension(ppid: bytes, instance_id: bytes) -> bytes:
    """The PCK extension with its ten or so mandatory parts (evidence.md §2.4)."""
    components = [
        _pair(bytes((2, place)), der(0x02, bytes((value,))))
        for place, value in enumerate(CPU_SVN, start=1)
    ]
    tcb = b"".join(components) + _pair(b"\x02\x11", der(0x02, bytes((PCE_SVN,))))
    tcb += _pair(b"\x02\x12", der(0x04, CPU_SVN))
    flags = b"".join(_pair(bytes((7, place)), der(0x01, b"\xff")) for place in (1, 2, 3))
    return der(
        0x30,
        _pair(b"\x01", der(0x04, ppid))
        + _pair(b"\x02", der(0x30, tcb))
        + _pair(b"\x03", der(0x04, bytes(2)))
        + _pair(b"\x04", der(0x04, FMSPC))
        + _pair(b"\x05", der(0x0A, b"\x01"))
        + _pair(b"\x06", der(0x04, instance_id))
        + _pair(b"\x07", der(0x30, flags)),
    )


def _pair(arc: bytes, value: bytes) -> bytes:
    return der(0x30, der(0x06, _OID_DER + arc) + value)


def _sign(key: ec.EllipticCurvePrivateKey, data: bytes) -> bytes:
    r, s = decode_dss_signature(key.sign(data, ec.ECDSA(hashes.SHA256())))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def _stamp(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
