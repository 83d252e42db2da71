"""Hard checks of GPU and NVSwitch evidence: no policy lifts any of them (docs/spec-evidence.md §4).

Reference files and revocation answers are arguments. Without them their checks are *not asked*,
facts say that nothing was compared, and a policy that does not loosen it refuses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

from cryptography import x509

from cai.attest.certificates import is_plain, load_chain, verify_chain
from cai.attest.evidence import DeviceEvidence
from cai.attest.facts import DeviceFacts
from cai.attest.gpu import device_checks
from cai.attest.gpu.certificates import SWITCH, Device, describe
from cai.attest.gpu.measurements import Comparison, check_measurements
from cai.attest.gpu.ocsp import Link, device_links, rim_links
from cai.attest.gpu.ocsp_store import Found, OcspStore, check_revocation
from cai.attest.gpu.report import Report, parse_report
from cai.attest.gpu.rim_store import RimStore
from cai.attest.gpu.topology import check_list
from cai.attest.verdict import Check, Outcome, check, not_asked
from cai.errors import EvidenceRefused, FormatError, LimitExceeded

MAX_DEVICES = 16
"""Most devices in one evidence list (8 GPUs and 4 switches are the largest known system)."""

RISK_RIM = (
    "GPU firmware measurements are signed by the device but not compared with NVIDIA's reference"
    " values (RIM)"
)
RISK_OCSP = "revocation of GPU certificates is not asked (OCSP)"
RISK_FWID = "a GPU report does not name the firmware that holds its key (unsafe_without_fwid)"
RISK_DELEGATE = (
    "revocation of the responder that answered for GPU certificates is not itself asked (OCSP)"
)
"""What no check covers, as a verdict's ``residual_risks`` say it."""


@dataclass(frozen=True, slots=True)
class GpuResult:
    """What the checks of a list of devices came to.

    Attributes:
        checks: in order.
        facts: of all devices, if and only if every check passed.
        risks: what was not asked, in plain words.
        comparisons: per device, what the comparison with reference files found; ``None`` where
            none was made.
    """

    checks: tuple[Check, ...]
    facts: tuple[DeviceFacts, ...] | None
    risks: tuple[str, ...] = ()
    comparisons: tuple[Comparison | None, ...] = ()

    def alone(self, place: int) -> bool:
        """Whether one device passed its own checks, whatever it is in company with."""
        own = [item for item in self.checks if item.name.startswith(f"gpu.{place}.")]
        return bool(own) and not any(item.outcome is Outcome.FAIL for item in own)


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What every device of a list is checked against."""

    nonce: bytes | None
    root: bytes
    now: datetime
    rim_root: bytes | None
    rims: RimStore | None
    ocsp: OcspStore | None
    without_fwid: bool
    # What devices share is verified once: signatures of issuers, and answers about them.
    issued: set[Link] = field(default_factory=set)
    answers: dict[Link, Found] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What the checks of one device came to; the parts are there where they could be read."""

    checks: list[Check]
    report: Report | None = None
    device: Device | None = None
    comparison: Comparison | None = None
    produced: datetime | None = None


def verify_devices(
    devices: Sequence[DeviceEvidence],
    *,
    nonce: bytes | None,
    root: bytes,
    now: datetime,
    rim_root: bytes | None = None,
    rims: RimStore | None = None,
    ocsp: OcspStore | None = None,
    unsafe_without_fwid: bool = False,
) -> GpuResult:
    """Make every hard check of a list of devices.

    Args:
        devices: the evidence; an empty list is no failure here, a policy demands GPUs.
        nonce: the 32 bytes that every report must carry; ``None`` fails if there is any device.
        root: DER of the pinned root of device certificates.
        now: time of the verification, timezone-aware.
        rim_root: DER of the pinned root of reference measurements; ``None`` does not ask.
        rims: the reference files there are; ``None`` does not ask.
        ocsp: the revocation answers there are; ``None`` does not ask.
        unsafe_without_fwid: accept GPU reports of firmware that does not name itself.
    """
    if not devices:
        return GpuResult((not_asked("gpu.devices", 0, "there is no GPU evidence"),), ())
    if len(devices) > MAX_DEVICES:
        reason = f"at most {MAX_DEVICES} devices are accepted"
        found = check("gpu.devices", passed=False, observed=len(devices), reason=reason)
        return GpuResult((found,), None)
    inputs = _Inputs(nonce, root, now, rim_root, rims, ocsp, unsafe_without_fwid)
    outcomes = [
        _verify_device(f"gpu.{place}", evidence, inputs) for place, evidence in enumerate(devices)
    ]
    checks = [check("gpu.devices", passed=True, observed=len(devices))]
    checks += [item for outcome in outcomes for item in outcome.checks]
    members = [(item.report, item.device) for item in outcomes if item.report and item.device]
    if len(members) == len(devices):
        # (11) to (13) What they are together.
        checks += check_list([(report, device) for report, device in members])
    comparisons = tuple(outcome.comparison for outcome in outcomes)
    risks = _risks(outcomes)
    if len(members) < len(devices) or any(item.outcome is Outcome.FAIL for item in checks):
        return GpuResult(tuple(checks), None, risks, comparisons)
    facts = tuple(fact for fact in map(_facts, outcomes) if fact is not None)
    return GpuResult(tuple(checks), facts, risks, comparisons)


def _verify_device(name: str, evidence: DeviceEvidence, inputs: _Inputs) -> _Outcome:
    checks: list[Check] = []
    report = device = None
    chain: tuple[x509.Certificate, ...] = ()
    # (1) Report layout.
    try:
        report = parse_report(evidence.report)
    except (FormatError, LimitExceeded) as error:
        checks.append(check(f"{name}.report", passed=False, reason=error.message))
    else:
        checks.append(check(f"{name}.report", passed=True, observed="SPDM 1.1"))
    # (2) Certificate chain to the pinned root, every member valid now.
    try:
        chain = load_chain(evidence.chain, what="device chain")
        device = describe(chain)
        if not is_plain(evidence.chain, chain):
            raise EvidenceRefused("the chain is written in another way than PEM is")
        verify_chain(chain, root=inputs.root, now=inputs.now, issued=inputs.issued)
    except (FormatError, LimitExceeded, EvidenceRefused) as error:
        checks.append(check(f"{name}.chain", passed=False, reason=error.message))
    else:
        checks.append(check(f"{name}.chain", passed=True, observed=device.hwmodel))
    if report is not None:
        # (3) and (4)
        checks.append(device_checks.check_nonce(name, report, inputs.nonce))
        checks.append(device_checks.check_nvdec(name, report))
    if report is None or device is None:
        reason = "report or chain cannot be read"
        parts = (*device_checks.NEEDS_BOTH, "rim", "ocsp")
        checks += [not_asked(f"{name}.{part}", reason=reason) for part in parts]
        return _Outcome(checks, report, device)
    # (5) to (8)
    checks += [
        device_checks.check_versions(name, report, device),
        device_checks.check_signature(name, report, device),
        device_checks.check_fwid(name, report, device, required=not inputs.without_fwid),
        device_checks.check_arch(name, evidence.arch, device),
    ]
    comparison = _measurements(checks, name, report, device, inputs)
    produced = _revocation(checks, name, chain, comparison, inputs)
    return _Outcome(checks, report, device, comparison, produced)


def _measurements(
    checks: list[Check], name: str, report: Report, device: Device, inputs: _Inputs
) -> Comparison | None:
    # (9) Measurements against NVIDIA's reference values.
    if inputs.rims is None or inputs.rim_root is None:
        what = "no root of them is trusted" if inputs.rims else "none were given"
        checks.append(not_asked(f"{name}.rim", reason=f"reference files: {what}"))
        return None
    found, comparison = check_measurements(
        name, report, device, store=inputs.rims, root=inputs.rim_root, now=inputs.now
    )
    checks += found
    return comparison


def _revocation(
    checks: list[Check], name: str, chain: Sequence[x509.Certificate],
    comparison: Comparison | None, inputs: _Inputs,
) -> datetime | None:  # fmt: skip
    # (10) Revocation of the device's certificates and of those behind its reference files.
    if inputs.ocsp is None:
        checks.append(not_asked(f"{name}.ocsp", reason="no revocation answers were given"))
        return None
    links = list(device_links(chain))
    for rim in comparison.rims.values() if comparison else ():
        links += rim_links(rim.chain)
    found, produced = check_revocation(
        f"{name}.ocsp", links, store=inputs.ocsp, now=inputs.now, known=inputs.answers
    )
    checks.append(found)
    return produced


def _risks(outcomes: Sequence[_Outcome]) -> tuple[str, ...]:
    risks: list[str] = []
    if any(item.comparison is None for item in outcomes):
        risks.append(RISK_RIM)
    risks.append(
        RISK_OCSP if any(item.produced is None for item in outcomes) else RISK_DELEGATE
    )
    if any(item.report and item.device and item.report.fwid is None
           and item.device.arch != SWITCH for item in outcomes):  # fmt: skip
        risks.append(RISK_FWID)
    return tuple(risks)


def _facts(outcome: _Outcome) -> DeviceFacts | None:
    report, device, comparison = outcome.report, outcome.device, outcome.comparison
    if report is None or device is None:
        return None
    rims = comparison.rims if comparison else {}
    expires = min((rim.valid_until for rim in rims.values()), default=None)
    return DeviceFacts(
        arch=device.arch,
        hwmodel=device.hwmodel,
        ueid=device.ueid,
        driver_version=report.driver_version,
        vbios_version=report.vbios_version,
        fwid=report.fwid.hex() if report.fwid else "",
        measurements={str(index): value.hex() for index, value in report.measurements.items()},
        mode="" if report.feature_flag is None else str(report.feature_flag),
        rims={role: rim.digest for role, rim in rims.items()},
        rim_expires=expires.isoformat() if expires else "",
        ocsp_produced=outcome.produced.isoformat() if outcome.produced else "",
    )
