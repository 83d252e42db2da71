"""A guest's evidence about itself, under a challenge of its own, and its own verdict on it.

This convinces nobody else: the challenge is the guest's own. It tells an operator whether a
verifier would accept the guest before one is asked, and it is where reference values come from.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha384

from cai.attest.anchors import TrustAnchors
from cai.attest.evidence import DeviceSource, Evidence, QuoteSource
from cai.attest.evidence_file import EvidenceFile
from cai.attest.facts import Facts
from cai.attest.gpu.collect import NvidiaDevices
from cai.attest.gpu.ocsp_store import OcspStore
from cai.attest.gpu.report import NONCE_SIZE
from cai.attest.gpu.rim_store import RimStore
from cai.attest.gpu.verify import verify_devices
from cai.attest.statement import stock_report_data
from cai.attest.tdx.collateral import CollateralStore
from cai.attest.verdict import Verdict
from cai.attest.verify import verify_evidence

_DOMAIN = b"cai/self-check/v1\x00"


@dataclass(frozen=True, slots=True)
class VerifyingWith:
    """What a guest has to verify its own evidence with.

    Attributes:
        anchors: the roots to trust.
        collateral: Intel's statements; an empty store leaves the verdict undecided.
        rims: NVIDIA's reference files, if there are some.
        ocsp: NVIDIA's revocation answers, if there are some.
    """

    anchors: TrustAnchors
    collateral: CollateralStore
    rims: RimStore | None = None
    ocsp: OcspStore | None = None


def collect_own(
    source: QuoteSource, devices: DeviceSource | None, *, nonce: bytes | None = None
) -> EvidenceFile:
    """Collect a guest's evidence under a fresh challenge.

    The report data are ``SHA-384("cai/self-check/v1" ‖ 00 ‖ nonce ‖ digest of the devices)`` and
    sixteen zero bytes, so they are no statement's (decisions §2.1).

    Args:
        source: the TDX guest.
        devices: its GPUs; ``None`` leaves them out.
        nonce: 32 bytes; drawn when absent.
    """
    challenge = nonce or secrets.token_bytes(NONCE_SIZE)
    collected = () if devices is None else devices.collect(challenge)
    unquoted = Evidence(b"", collected)
    binding = stock_report_data(
        sha384(_DOMAIN + challenge + unquoted.gpu_digest).digest()
    )
    evidence = Evidence(source.quote(binding), collected, source.event_log())
    return EvidenceFile(
        evidence, report_data=binding, gpu_nonce=challenge if collected else None
    )


def judge_own(
    file: EvidenceFile, using: VerifyingWith, *, now: datetime
) -> tuple[Verdict, Facts | None]:
    """Make every hard check of evidence that ``collect_own`` collected."""
    return verify_evidence(
        file.evidence,
        subject="this guest",
        report_data=file.report_data or b"",
        gpu_nonce=file.gpu_nonce,
        anchors=using.anchors,
        collateral=using.collateral,
        now=now,
        require_agreement=True,
        rims=using.rims,
        ocsp=using.ocsp,
    )


def admit_devices(
    devices: NvidiaDevices, *, anchors: TrustAnchors, now: datetime, rims: RimStore | None = None
) -> Verdict:
    """Verify the GPUs of this guest here, and only then let them accept work (decisions §2.5).

    Args:
        devices: the GPUs.
        anchors: the roots to trust.
        now: time of the verification.
        rims: reference files to compare with, if the guest has some.

    Returns:
        The verdict that admitted them.

    Raises:
        EvidenceRefused: they do not verify; they stay closed.
        Refused: CC mode is off or DevTools mode is on.
    """
    devices.require_confidential()
    nonce = secrets.token_bytes(NONCE_SIZE)
    result = verify_devices(
        devices.collect(nonce), nonce=nonce, root=anchors.gpu_root, now=now,
        rim_root=anchors.rim_root, rims=rims,
    )  # fmt: skip
    verdict = Verdict("GPUs of this guest", result.checks, simulated=anchors.simulated)
    verdict.require()
    devices.set_ready()
    return verdict
