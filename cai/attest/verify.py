"""Layer 1 of every decision: the hard checks of one guest's evidence (docs/spec-evidence.md).

Pure: bytes, anchors, collateral and a time in; a verdict that lists each check, and facts only if
every one passed, out. What a policy demands of the facts is layer 2, ``cai.attest.policy``.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from cai.attest.anchors import TrustAnchors
from cai.attest.evidence import Evidence
from cai.attest.facts import Facts, TdxFacts
from cai.attest.gpu.ocsp_store import OcspStore
from cai.attest.gpu.rim_store import RimStore
from cai.attest.gpu.verify import verify_devices
from cai.attest.policy_values import parse_moment
from cai.attest.tdx.collateral import CollateralStore
from cai.attest.tdx.event_claims import event_claims
from cai.attest.tdx.eventlog import EventLog, parse_event_log
from cai.attest.tdx.quote import parse_quote
from cai.attest.tdx.verify import verify_quote
from cai.attest.verdict import Check, Verdict, check, not_asked
from cai.errors import InputError

RISK_SIMULATED = "SIMULATED: the roots are a simulator's; nothing here speaks of real hardware"
RISK_LOCALITY = (
    "that the GPU sits in the machine of the TDX guest rests on the measured guest, not on the"
    " GPU's own evidence"
)
RISK_PHYSICAL = (
    "an attacker with physical access to an up-to-date platform of his own is not told apart unless"
    " the policy lists platforms by PPID"
)
"""What no check covers, as a verdict's ``residual_risks`` say it."""


def verify_evidence(
    evidence: Evidence,
    *,
    subject: str,
    report_data: bytes | None,
    gpu_nonce: bytes | None,
    anchors: TrustAnchors,
    collateral: CollateralStore,
    now: datetime,
    require_agreement: bool = False,
    rims: RimStore | None = None,
    ocsp: OcspStore | None = None,
) -> tuple[Verdict, Facts | None]:
    """Make every hard check of a guest's evidence.

    Args:
        evidence: quote and devices as the guest gave them.
        subject: what is verified, as the verdict names it.
        report_data: the 64 bytes that the quote must carry; ``None`` does not ask, which is for
            evidence in files alone: no protocol may pass it.
        gpu_nonce: the 32 bytes that every GPU report must carry; ``None`` only without devices.
        anchors: the roots to trust.
        collateral: Intel's statements about platforms.
        now: time of the verification, timezone-aware; services give their own clock.
        require_agreement: the second TDX engine must say the same as the first.
        rims: NVIDIA's reference measurements; without them they are not compared.
        ocsp: NVIDIA's answers about certificates; without them revocation is not asked.

    Returns:
        The verdict, and the facts if and only if it passed.
    """
    # The quote: steps 1 to 11 of spec-evidence §3.
    tdx = verify_quote(
        evidence.quote,
        report_data=report_data,
        root=anchors.tdx_root,
        collateral=collateral,
        now=now,
        require_agreement=require_agreement,
    )
    # Its event log: step 12.
    event_log, log = _event_log(evidence)
    # The devices: steps 1 to 10 of spec-evidence §4.4.
    gpu = verify_devices(
        evidence.devices, nonce=gpu_nonce, root=anchors.gpu_root, now=now,
        rim_root=anchors.rim_root, rims=rims, ocsp=ocsp,
    )  # fmt: skip
    risks = [RISK_SIMULATED] if anchors.simulated else [RISK_PHYSICAL]
    if evidence.devices:
        risks += [*gpu.risks, RISK_LOCALITY]
    verdict = Verdict(
        subject=subject,
        checks=(*tdx.checks, event_log, *gpu.checks),
        simulated=anchors.simulated,
        hardware=platform_identity(tdx.platform, now=now) if tdx.platform else {},
        residual_risks=tuple(risks),
    )
    if not verdict.passed or tdx.facts is None or gpu.facts is None:
        return verdict, None
    facts = Facts(
        tdx=tdx.facts,
        devices=gpu.facts,
        gpu_digest=evidence.gpu_digest.hex(),
        simulated=anchors.simulated,
    )
    if log is not None:
        claims = event_claims(log)
        facts = replace(
            facts,
            runtime_events=log.runtime_events(),
            event_claims=None if claims is None else tuple(claims),
        )
    return verdict.extended((), hardware=hardware_identity(facts, now=now)), facts


def _event_log(evidence: Evidence) -> tuple[Check, EventLog | None]:
    """Step 12: a log that came with a quote must replay to all four of its registers."""
    if evidence.event_log is None:
        return not_asked("tdx.event_log", reason="there is no event log"), None
    try:
        body = parse_quote(evidence.quote).body
    except InputError:
        return not_asked("tdx.event_log", reason="the quote cannot be read"), None
    try:
        log = parse_event_log(evidence.event_log)
    except InputError as error:
        return check("tdx.event_log", passed=False, reason=error.message), None
    wrong = [
        f"rtmr{place}" for place, register in enumerate(log.replay())
        if body[f"rtmr_{place}"] != register
    ]  # fmt: skip
    found = check(
        "tdx.event_log", passed=not wrong, observed=f"{len(log.events)} events",
        expected="replay to rtmr0 to rtmr3", reason=f"does not replay to {', '.join(wrong)}",
    )  # fmt: skip
    return found, log


def hardware_identity(facts: Facts, *, now: datetime) -> dict[str, str]:
    """Identity of platform and devices as the signatures prove it."""
    hardware = platform_identity(facts.tdx, now=now)
    for place, device in enumerate(facts.devices):
        hardware[f"gpu.{place}"] = f"{device.hwmodel} {device.ueid}"
    return hardware


def platform_identity(tdx: TdxFacts, *, now: datetime) -> dict[str, str]:
    """Identity of a TDX platform, and the age of what says so."""
    issued = parse_moment(tdx.collateral_issued)
    age = f"{(now - issued).total_seconds() / 86400:.1f} days" if issued else "unknown"
    return {
        "fmspc": tdx.fmspc,
        "ppid": tdx.ppid,
        "tcb_status": tdx.tcb_status,
        "tcb_date": tdx.tcb_date,
        "tcb_eval_data_number": str(tdx.eval_data_number),
        "advisories": ", ".join(tdx.advisory_ids) or "none",
        "collateral_issued": tdx.collateral_issued,
        "collateral_age": age,
        "collateral_expires": tdx.collateral_expires,
        "platform_instance_id": tdx.platform_instance_id,
        **{name: tdx.pck_flags[name] for name in sorted(tdx.pck_flags)},
        "engines": ", ".join(tdx.engines),
    }
