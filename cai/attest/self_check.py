"""A guest's evidence about itself, under a challenge of its own, and its own verdict on it.

This convinces nobody else: the challenge is the guest's own. It tells an operator whether a
verifier would accept the guest before one is asked, and it is where reference values come from.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha384

from cai import merkle
from cai.attest.anchors import TrustAnchors
from cai.attest.evidence import DeviceSource, Evidence, QuoteSource
from cai.attest.evidence_file import EvidenceFile
from cai.attest.facts import Facts
from cai.attest.gpu.collect import NvidiaDevices
from cai.attest.gpu.ocsp_store import OcspStore
from cai.attest.gpu.report import NONCE_SIZE
from cai.attest.gpu.rim_store import RimStore
from cai.attest.gpu.verify import verify_devices
from cai.attest.statement import (
    ChannelStatement,
    GpuFacts,
    Purpose,
    report_data,
    stock_report_data,
)
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
    source: QuoteSource,
    devices: DeviceSource | None,
    *,
    nonce: bytes | None = None,
    launch_digest: str = "",
    profile: str = "operated",
) -> EvidenceFile:
    """Collect a guest's evidence under a fresh challenge.

    With a launch digest the quote binds a statement, so that a policy can be tried on the whole of
    it. Its session tree has one leaf, the challenge, which is no session's: those have 70 bytes.
    Without one the report data are ``SHA-384("cai/self-check/v1" ‖ 00 ‖ nonce ‖ digest of the
    devices)`` and sixteen zero bytes, so they are no statement's (decisions §2.1).

    Args:
        source: the TDX guest.
        devices: its GPUs; ``None`` leaves them out.
        nonce: 32 bytes; drawn when absent.
        launch_digest: SHA-384 of ``launch.json``, hex; empty when nothing was launched.
        profile: guest profile that the statement names.
    """
    challenge = nonce or secrets.token_bytes(NONCE_SIZE)
    collected = () if devices is None else devices.collect(challenge)
    unquoted = Evidence(b"", collected)
    if launch_digest:
        facts = {"profile": profile, "launched_by": "agent"}
        facts |= {} if devices is None else devices.facts()
        statement = ChannelStatement(
            launch_digest=launch_digest, service_id="", owner_key="", models=(),
            gpu=GpuFacts(unquoted.gpu_digest.hex(), challenge.hex(), 0), guest_facts=facts,
            ticket_digest="", dialects=(), boot_id=secrets.token_hex(16), epoch=0,
            session_root=merkle.leaf_hash(challenge).hex(), session_size=1,
        ).encode()  # fmt: skip
        bound = report_data(statement, Purpose.CHANNEL)
        evidence = Evidence(source.quote(bound), collected, source.event_log())
        return EvidenceFile(
            evidence, report_data=bound, gpu_nonce=challenge if collected else None,
            statement=statement,
        )
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
