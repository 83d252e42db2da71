"""Hard checks of GPU evidence: no policy lifts any of them (docs/spec-evidence.md §4).

What this version cannot check yet is listed as *not asked* in each verdict: reference measurements
(RIM), revocation (OCSP) and the topology of multi-GPU systems.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from cai.attest.certificates import load_chain, verify_chain
from cai.attest.evidence import DeviceEvidence
from cai.attest.facts import DeviceFacts
from cai.attest.gpu.certificates import Device, describe
from cai.attest.gpu.report import Report, parse_report
from cai.attest.verdict import Check, Outcome, check, not_asked
from cai.errors import EvidenceRefused, FormatError, LimitExceeded

MAX_DEVICES = 16
"""Most devices in one evidence list (8 GPUs and 4 switches are the largest known system)."""

GPU_ARCHITECTURES = ("HOPPER", "BLACKWELL")
"""Architectures that are verified; a switch alone proves nothing about a GPU."""

NVDEC0_STATES = (0xAA, 0x55)
"""Enabled and disabled; anything else is refused (evidence.md §5.6)."""

FLAG_PROTECTED_PCIE = 2
"""Feature flag of a device in a protected-PCIe system, which is evidence only as a whole."""


_NEEDS_BOTH = ("signature", "fwid", "arch")


@dataclass(frozen=True, slots=True)
class GpuResult:
    """Checks in order, and the facts of all devices when every check passed."""

    checks: tuple[Check, ...]
    facts: tuple[DeviceFacts, ...] | None


def verify_devices(
    devices: Sequence[DeviceEvidence], *, nonce: bytes | None, root: bytes, now: datetime
) -> GpuResult:
    """Make every hard check of a list of devices.

    Args:
        devices: the evidence; an empty list is no failure here, a policy demands GPUs.
        nonce: the 32 bytes that every report must carry; ``None`` fails if there is any device.
        root: DER of the pinned root of device certificates.
        now: time of the verification, timezone-aware.
    """
    if not devices:
        return GpuResult((not_asked("gpu.devices", 0, "there is no GPU evidence"),), ())
    if len(devices) > MAX_DEVICES:
        reason = f"at most {MAX_DEVICES} devices are accepted"
        found = check("gpu.devices", passed=False, observed=len(devices), reason=reason)
        return GpuResult((found,), None)
    checks: list[Check] = [check("gpu.devices", passed=True, observed=len(devices))]
    verified: list[tuple[Report, Device]] = []
    for place, evidence in enumerate(devices):
        found_checks, pair = _verify_device(f"gpu.{place}", evidence, nonce, root, now)
        checks.extend(found_checks)
        if pair is not None:
            verified.append(pair)
    if len(verified) == len(devices):
        checks.extend(_across(verified))
    checks.append(not_asked("gpu.rim", reason="reference measurements are not compared yet"))
    checks.append(not_asked("gpu.ocsp", reason="certificate revocation is not asked yet"))
    if any(item.outcome is Outcome.FAIL for item in checks):
        return GpuResult(tuple(checks), None)
    return GpuResult(tuple(checks), tuple(_facts(report, device) for report, device in verified))


def _verify_device(
    name: str, evidence: DeviceEvidence, nonce: bytes | None, root: bytes, now: datetime
) -> tuple[list[Check], tuple[Report, Device] | None]:
    checks: list[Check] = []
    report = device = None
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
        verify_chain(chain, root=root, now=now)
    except (FormatError, LimitExceeded, EvidenceRefused) as error:
        checks.append(check(f"{name}.chain", passed=False, reason=error.message))
    else:
        checks.append(check(f"{name}.chain", passed=True, observed=device.hwmodel))
    if report is not None:
        checks.append(_nonce(name, report, nonce))
        checks.append(_nvdec(name, report))
        checks.append(_versions(name, report))
    if report is None or device is None:
        reason = "report or chain cannot be read"
        checks += [not_asked(f"{name}.{part}", reason=reason) for part in _NEEDS_BOTH]
        return checks, None
    checks.append(_signature(name, report, device))
    checks.append(_fwid(name, report, device))
    checks.append(_arch(name, evidence, device))
    return checks, (report, device)


def _nonce(name: str, report: Report, nonce: bytes | None) -> Check:
    # (3) Fresh, and made for this session.
    return check(
        f"{name}.nonce",
        passed=nonce is not None and hmac.compare_digest(report.nonce, nonce),
        observed=report.nonce.hex(),
        expected="a nonce of the verifier" if nonce is None else nonce.hex(),
        reason="the report was made under another nonce (replayed)",
    )


def _nvdec(name: str, report: Report) -> Check:
    # (4) Unknown states would decide later which measurements are compared.
    status = report.nvdec0_status
    if status is None:
        return not_asked(f"{name}.nvdec", reason="the report has no such field")
    return check(
        f"{name}.nvdec", passed=status in NVDEC0_STATES, observed=f"{status:#x}",
        expected="0xaa or 0x55", reason="unknown NVDEC0 status",
    )  # fmt: skip


def _versions(name: str, report: Report) -> Check:
    # (5) A policy that lists versions must find some.
    observed = f"driver {report.driver_version or '?'}, VBIOS {report.vbios_version or '?'}"
    return check(
        f"{name}.versions",
        passed=bool(report.driver_version and report.vbios_version),
        observed=observed,
        reason="the report does not name its driver and VBIOS",
    )


def _signature(name: str, report: Report, device: Device) -> Check:
    # (6) SPDM 1.1: ECDSA P-384 with SHA-384 over request and response.
    half = len(report.signature) // 2
    r, s = (int.from_bytes(part, "big") for part in (report.signature[:half],
                                                     report.signature[half:]))  # fmt: skip
    try:
        device.key.verify(encode_dss_signature(r, s), report.signed, ec.ECDSA(hashes.SHA384()))
        passed = True
    except (InvalidSignature, ValueError):
        passed = False
    return check(f"{name}.signature", passed=passed, reason="not signed by the leaf certificate")


def _fwid(name: str, report: Report, device: Device) -> Check:
    # (7) The firmware that answered is the one whose key the boot ROM certified. Absence is a
    # refusal: NVIDIA's tools take it as a match, which would let old firmware out of the check.
    observed = report.fwid.hex() if report.fwid else "absent"
    expected = device.fwid.hex() if device.fwid else "absent"
    return check(
        f"{name}.fwid",
        passed=report.fwid is not None and report.fwid == device.fwid,
        observed=observed,
        expected=expected,
        reason="firmware digest of report and certificate differ or are absent",
    )


def _arch(name: str, evidence: DeviceEvidence, device: Device) -> Check:
    # (8) The certificate decides; a label that says otherwise is somebody's attempt.
    return check(
        f"{name}.arch",
        passed=device.arch in GPU_ARCHITECTURES and evidence.arch.upper() == device.arch,
        observed=evidence.arch,
        expected=device.arch if device.arch in GPU_ARCHITECTURES else "a known GPU",
        reason=f"the certificate is of {device.hwmodel!r}",
    )


def _across(verified: Sequence[tuple[Report, Device]]) -> list[Check]:
    # (9) One device counts once.
    serials = {device.ueid for _, device in verified}
    keys = {device.key_info for _, device in verified}
    distinct = min(len(serials), len(keys))
    # (10) Uniform mode; protected PCIe only with the topology check that is yet to come.
    flags = {report.feature_flag for report, _ in verified}
    known = flags <= {None, 0, 1}
    if FLAG_PROTECTED_PCIE in flags:
        reason = "protected-PCIe systems are not verified yet"
    elif not known:
        reason = "unknown feature flag"
    else:
        reason = "devices of different modes in one list"
    return [
        check(
            "gpu.distinct", passed=distinct == len(verified), observed=distinct,
            expected=len(verified), reason="one device stands in the list twice",
        ),
        check(
            "gpu.mode", passed=known and len(flags) == 1,
            observed=", ".join(sorted("absent" if flag is None else str(flag) for flag in flags)),
            reason=reason,
        ),
    ]  # fmt: skip


def _facts(report: Report, device: Device) -> DeviceFacts:
    return DeviceFacts(
        arch=device.arch,
        hwmodel=device.hwmodel,
        ueid=device.ueid,
        driver_version=report.driver_version,
        vbios_version=report.vbios_version,
        fwid=report.fwid.hex() if report.fwid else "",
        measurements={str(index): value.hex() for index, value in report.measurements.items()},
    )
