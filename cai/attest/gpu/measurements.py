"""Comparison of a device's measurements with its reference files (docs/spec-evidence.md §4.7)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import product

from cai.attest.gpu.certificates import ARCHITECTURES, SWITCH, Device
from cai.attest.gpu.report import (
    OPAQUE_CHIP_INFO,
    OPAQUE_CHIP_SKU,
    OPAQUE_PROJECT,
    OPAQUE_PROJECT_SKU,
    Report,
)
from cai.attest.gpu.rim import Rim
from cai.attest.gpu.rim_store import RimStore
from cai.attest.verdict import Check, check, not_asked

NVDEC0_DISABLED = 0x55
NVDEC0_INDEX = 35
"""The measurement of the NVDEC0 firmware; meaningless while that engine is disabled."""

MAX_TRIED = 8
"""Most files of one role that are compared with a device."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a comparison found.

    Attributes:
        rims: role (``driver``, ``vbios``, ``switch``) to the file used.
        compared: number of measurements that were compared.
        mismatches: (index, role) of each that differs from every accepted value.
        conflicts: indexes that two files claim.
        idle: roles whose file nothing was compared with.
    """

    rims: dict[str, Rim]
    compared: int
    mismatches: tuple[tuple[int, str], ...]
    conflicts: tuple[int, ...]
    idle: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Every active measurement is an accepted one, and each file had one to compare."""
        return not (self.mismatches or self.conflicts or self.idle)


def compare(report: Report, rims: dict[str, Rim]) -> Comparison:
    """Compare a report with the files of each role.

    Every active measurement of every file must be there and equal one of its values; RIM index i is
    block i + 1 of the report. An index that two files claim is a conflict. Index 35 is left out
    when the report says that NVDEC0 is disabled.
    """
    mismatches: list[tuple[int, str]] = []
    owners: dict[int, str] = {}
    conflicts: list[int] = []
    counts = dict.fromkeys(rims, 0)
    for role, rim in rims.items():
        for index, accepted in sorted(rim.measurements.items()):
            if index in owners:
                conflicts.append(index)
            owners[index] = role
            if index == NVDEC0_INDEX and report.nvdec0_status == NVDEC0_DISABLED:
                continue
            counts[role] += 1
            if report.measurements.get(index + 1) not in accepted:
                mismatches.append((index, role))
    idle = tuple(role for role, count in counts.items() if not count)
    return Comparison(rims, sum(counts.values()), tuple(mismatches), tuple(conflicts), idle)


def rim_ids(report: Report, device: Device) -> dict[str, str]:
    """The names under which NVIDIA's service has a device's reference files, by role.

    Only to fetch files by, or to say which one is missing; what a file is about is read from it.
    """
    board = "_".join(
        report.text(kind) or "?" for kind in (OPAQUE_PROJECT, OPAQUE_PROJECT_SKU, OPAQUE_CHIP_SKU)
    )
    vbios = report.vbios_version.replace(".", "")
    if device.arch == SWITCH:
        return {"switch": f"NV_SWITCH_BIOS_{board}_{vbios}".upper()}
    if device.arch == "BLACKWELL":
        chip = report.text(OPAQUE_CHIP_INFO) or "GB100"
        driver = f"NV_GPU_CC_DRIVER_{chip}_{report.driver_version}"
    else:
        driver = f"NV_GPU_DRIVER_{device.chip}_{report.driver_version}"
    return {"driver": driver.upper(), "vbios": f"NV_GPU_VBIOS_{board}_{vbios}".upper()}


def check_measurements(
    name: str, report: Report, device: Device, *, store: RimStore, root: bytes, now: datetime
) -> tuple[list[Check], Comparison | None]:
    """Choose and verify a device's reference files, then compare.

    Args:
        name: prefix of the checks, e.g. ``gpu.0``.
        report: the device's report.
        device: what its certificates say.
        store: the files there are.
        root: DER of the pinned root of reference measurements.
        now: time of the verification, timezone-aware.

    Returns:
        ``<name>.rim_<role>`` for each role and ``<name>.rim``; and the comparison if one was made.
    """
    if device.arch == SWITCH:
        versions = {"switch": report.vbios_version}
    else:
        versions = {"driver": report.driver_version, "vbios": report.vbios_version}
    checks: list[Check] = []
    found: dict[str, tuple[Rim, ...]] = {}
    for role, version in versions.items():
        item, files = _files(f"{name}.rim_{role}", role, version, report, device, store, root, now)
        checks.append(item)
        if files:
            found[role] = files
    if found.keys() != versions.keys():
        checks.append(not_asked(f"{name}.rim", reason="reference files are missing"))
        return checks, None
    best = _closest(report, found)
    checks.append(_result(f"{name}.rim", best))
    return checks, best


def _files(
    name: str, role: str, version: str, report: Report, device: Device, store: RimStore,
    root: bytes, now: datetime,
) -> tuple[Check, tuple[Rim, ...]]:  # fmt: skip
    # The version alone gives a file its role; a file of the right version for another chip is none.
    good, bad = store.verified(version, root=root, now=now) if version else ((), ())
    fitting = tuple(rim for rim in good if _fits(rim, device))[:MAX_TRIED]
    if fitting:
        until = min(rim.valid_until for rim in fitting).isoformat()
        return check(name, passed=True, observed=f"{version}, valid until {until}"), fitting
    wanted = f"reference file {rim_ids(report, device)[role]}"
    reason = "; ".join(bad)
    if not bad:
        others = ", ".join(sorted({rim.product for rim in good}))
        reason = f"there is none for version {version or 'none'}"
        reason += f" of this chip, only for {others}" if others else ""
        if store.if_available:
            return not_asked(name, "none", reason), ()
    return check(name, passed=False, observed="none", expected=wanted, reason=reason), ()


def _fits(rim: Rim, device: Device) -> bool:
    return bool(device.arch) and ARCHITECTURES.get(rim.product[:3]) == device.arch


def _closest(report: Report, found: dict[str, tuple[Rim, ...]]) -> Comparison:
    # Test and production builds share a version, and each is signed by NVIDIA; only a complete
    # match passes, whichever of them it is with.
    roles = list(found)
    results = [
        compare(report, dict(zip(roles, choice, strict=True)))
        for choice in product(*found.values())
    ]
    return min(results, key=lambda item: len(item.mismatches) + len(item.conflicts))


def _result(name: str, comparison: Comparison) -> Check:
    parts: list[str] = []
    if comparison.conflicts:
        parts.append(f"two files claim {_listed(comparison.conflicts)}")
    parts += [f"nothing to compare with the {role} file" for role in comparison.idle]
    for role in comparison.rims:
        differing = [index for index, owner in comparison.mismatches if owner == role]
        if differing:
            parts.append(f"{_listed(differing)} ({role}) differ")
    return check(
        name,
        passed=comparison.equal,
        observed=f"{comparison.compared - len(comparison.mismatches)} equal",
        expected=f"{comparison.compared} equal",
        reason="; ".join(parts),
    )


def _listed(indexes: Sequence[int]) -> str:
    return "measurement " + ", ".join(str(index) for index in indexes)
