"""What is missing of the GPUs before this host can attest (``cai.attest.doctor``)."""

from __future__ import annotations

import secrets
from functools import partial

from cai.attest.certificates import load_chain
from cai.attest.evidence import DeviceEvidence
from cai.attest.findings import Findings, asked, version_of
from cai.attest.gpu.certificates import describe
from cai.attest.gpu.collect import (
    ARCHITECTURES,
    FIX_CC_MODE,
    FIX_DEVTOOLS,
    MULTI_GPU_MODES,
    GpuDriver,
    NvidiaDevices,
)
from cai.attest.gpu.measurements import rim_ids
from cai.attest.gpu.report import parse_report
from cai.attest.gpu.rim_store import RimStore
from cai.attest.verdict import not_asked
from cai.errors import CaiError

MIN_DRIVER = (550, 90)
"""First driver branch whose reports name the firmware that signs them (FWID)."""

RIM_SERVICE = "https://rim.attestation.nvidia.com/v1/rim/"

_AFTER_NVML = (
    "gpu.count", "gpu.driver", "gpu.cc_mode", "gpu.devtools", "gpu.ready", "gpu.report", "gpu.rim",
)  # fmt: skip


def diagnose_gpus(found: Findings, driver: GpuDriver, rims: RimStore | None) -> None:
    """Look at driver, modes, devices, reports and reference files."""
    if not found.attempt("gpu.nvml", lambda: f"driver {driver.version()}"):
        found.skip("NVML is not usable", *_AFTER_NVML)
        return
    count = asked(driver.count, 0)
    present = found.add(
        "gpu.count", passed=count > 0, observed=count, expected="at least 1",
        fix="pass a GPU through to this guest (VFIO) and load its driver",
    )
    version = version_of(driver.version())
    least = ".".join(map(str, MIN_DRIVER))
    found.add(
        "gpu.driver", passed=version is not None and version >= MIN_DRIVER,
        observed=driver.version(), expected=f"{least} or newer",
        fix=f"install driver {least} or newer: older reports do not name their firmware",
    )
    _modes(found, driver)
    if not present:
        found.skip("there is no GPU", "gpu.ready", "gpu.report", "gpu.rim")
        return
    _architectures(found, driver, count)
    ready = asked(lambda: "on" if driver.ready() else "off", "unknown")
    reason = "the agent turns it on once the evidence has verified"
    found.checks.append(not_asked("gpu.ready", ready, reason))
    devices: list[DeviceEvidence] = []

    def report() -> str:
        devices.extend(NvidiaDevices(driver).collect(secrets.token_bytes(32)))
        return f"{len(devices)} reports"

    if not found.attempt("gpu.report", report):
        found.skip("there is no report", "gpu.rim")
        return
    _rims(found, devices, rims)


def _modes(found: Findings, driver: GpuDriver) -> None:
    try:
        mode = driver.mode()
    except CaiError as error:
        found.add("gpu.cc_mode", passed=False, fix=f"{error.message}; {error.hint or FIX_CC_MODE}")
        found.skip("CC mode cannot be read", "gpu.devtools")
        return
    found.add("gpu.cc_mode", passed=mode.cc_feature == 1, expected="on", fix=FIX_CC_MODE,
              observed="on" if mode.cc_feature == 1 else "off")  # fmt: skip
    found.add("gpu.devtools", passed=mode.devtools == 0, expected="off", fix=FIX_DEVTOOLS,
              observed="off" if mode.devtools == 0 else "on")  # fmt: skip
    name = MULTI_GPU_MODES.get(mode.multi_gpu, f"unknown-{mode.multi_gpu}")
    found.add(
        "gpu.multi_gpu_mode", passed=name != "protected_pcie" and mode.multi_gpu in MULTI_GPU_MODES,
        observed=name, expected="none or nvlink_encryption",
        fix="protected PCIe also needs the reports of its switches (NSCQ), which this version does"
        " not collect: use single GPUs or NVLink encryption",
    )


def _architectures(found: Findings, driver: GpuDriver, count: int) -> None:
    for place in range(min(count, 16)):
        number = asked(partial(driver.architecture, place), -1)
        found.add(
            f"gpu.{place}.architecture", passed=number in ARCHITECTURES,
            observed=ARCHITECTURES.get(number, f"number {number}"), expected="HOPPER or BLACKWELL",
            fix="only Hopper and Blackwell GPUs can attest; take this one out of the guest",
        )


def _rims(found: Findings, devices: list[DeviceEvidence], rims: RimStore | None) -> None:
    if rims is None:
        found.skip("no reference files were given (--rims)", "gpu.rim")
        return
    for place, evidence in enumerate(devices):
        try:
            report = parse_report(evidence.report)
            device = describe(load_chain(evidence.chain, what="device chain"))
        except CaiError as error:
            found.add(f"gpu.{place}.rim", passed=False, fix=error.message)
            continue
        versions = {"driver": report.driver_version, "vbios": report.vbios_version}
        missing = [
            name for role, name in rim_ids(report, device).items()
            if versions.get(role, report.vbios_version).lower() not in rims.files
        ]  # fmt: skip
        found.add(
            f"gpu.{place}.rim", passed=not missing, observed=", ".join(missing) or "present",
            fix="fetch " + ", ".join(f"{RIM_SERVICE}{name}" for name in missing),
        )
