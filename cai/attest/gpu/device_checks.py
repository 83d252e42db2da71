"""The checks of one device by itself: report against certificates (docs/spec-evidence.md §4.4)."""

from __future__ import annotations

import hmac

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from cai.attest.certificates import LIBRARY_ERRORS
from cai.attest.gpu.certificates import SWITCH, Device
from cai.attest.gpu.report import Report
from cai.attest.verdict import Check, check, not_asked

NVDEC0_STATES = (0xAA, 0x55)
"""Enabled and disabled; anything else is refused (evidence.md §5.6)."""

NEEDS_BOTH = ("versions", "signature", "fwid", "arch")
"""Checks that need report and chain."""


def check_nonce(name: str, report: Report, nonce: bytes | None) -> Check:
    """Step 3: fresh, and made for this session."""
    return check(
        f"{name}.nonce",
        passed=nonce is not None and hmac.compare_digest(report.nonce, nonce),
        observed=report.nonce.hex(),
        expected="a nonce of the verifier" if nonce is None else nonce.hex(),
        reason="the report was made under another nonce (replayed)",
    )


def check_nvdec(name: str, report: Report) -> Check:
    """Step 4: unknown states would decide which measurements are compared."""
    status = report.nvdec0_status
    if status is None:
        return not_asked(f"{name}.nvdec", reason="the report has no such field")
    return check(
        f"{name}.nvdec", passed=status in NVDEC0_STATES, observed=f"{status:#x}",
        expected="0xaa or 0x55", reason="unknown NVDEC0 status",
    )  # fmt: skip


def check_versions(name: str, report: Report, device: Device) -> Check:
    """Step 5: a policy that lists versions, and the choice of reference files, must find some."""
    needs_driver = device.arch != SWITCH
    return check(
        f"{name}.versions",
        passed=bool(report.vbios_version and (report.driver_version or not needs_driver)),
        observed=f"driver {report.driver_version or '?'}, VBIOS {report.vbios_version or '?'}",
        reason="the report does not name its driver and VBIOS",
    )


def check_signature(name: str, report: Report, device: Device) -> Check:
    """Step 6: SPDM 1.1, ECDSA P-384 with SHA-384 over request and response."""
    half = len(report.signature) // 2
    r, s = (
        int.from_bytes(part, "big") for part in (report.signature[:half], report.signature[half:])
    )
    try:
        device.key.verify(encode_dss_signature(r, s), report.signed, ec.ECDSA(hashes.SHA384()))
        passed = True
    except LIBRARY_ERRORS:
        passed = False
    return check(f"{name}.signature", passed=passed, reason="not signed by the leaf certificate")


def check_fwid(name: str, report: Report, device: Device, *, required: bool) -> Check:
    """Step 7: the firmware that answered is the one whose key the boot ROM certified.

    Absence from a GPU's report is a refusal: NVIDIA's tools take it as a match, which would let old
    firmware out of the check. A switch's report has no such field at all.
    """
    observed = report.fwid.hex() if report.fwid else "absent"
    expected = device.fwid.hex() if device.fwid else "absent"
    if report.fwid is None and (device.arch == SWITCH or not required):
        return not_asked(f"{name}.fwid", observed, "the report has no such field")
    return check(
        f"{name}.fwid",
        passed=report.fwid is not None and report.fwid == device.fwid,
        observed=observed,
        expected=expected,
        reason="firmware digest of report and certificate differ or are absent",
    )


def check_arch(name: str, label: str, device: Device) -> Check:
    """Step 8: the certificate decides; a label that says otherwise is somebody's attempt."""
    return check(
        f"{name}.arch",
        passed=bool(device.arch) and label.upper() == device.arch,
        observed=label,
        expected=device.arch or "a known GPU or switch",
        reason=f"the certificate is of {device.hwmodel!r}",
    )
