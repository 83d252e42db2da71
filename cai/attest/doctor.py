"""What is missing on this host before it can attest, and how to set it right.

Each finding is a check whose reason says what to do. Nothing here proves anything to anybody: the
host judges itself, with its own files. What needs an earlier step is *not asked* when that failed.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from hashlib import sha384
from typing import TypeVar

from cai.attest.certificates import load_chain
from cai.attest.evidence import DeviceEvidence
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
from cai.attest.statement import stock_report_data
from cai.attest.tdx.collateral import CollateralStore
from cai.attest.tdx.collect import CCEL_DATA, MEASUREMENTS, REPORTS, GuestFiles, TdxGuest
from cai.attest.tdx.pck import pck_extension
from cai.attest.tdx.quote import parse_quote
from cai.attest.verdict import Check, Verdict, check, not_asked
from cai.errors import CaiError

TDX_DEVICE = "sys/devices/virtual/misc/tdx_guest"
CONFIGFS = "sys/kernel/config"
KERNEL_RELEASE = "proc/sys/kernel/osrelease"
SWAPS = "proc/swaps"
"""What is looked at, below the root of the file system."""

QUOTE_KERNEL = (6, 7)
RTMR_KERNEL = (6, 16)
"""First kernels with configfs-tsm and with RTMRs in sysfs."""

MIN_DRIVER = (550, 90)
"""First driver branch whose reports name the firmware that signs them (FWID)."""

MAX_PROC = 64 * 1024
"""Largest file below /proc that is read, bytes."""

RIM_SERVICE = "https://rim.attestation.nvidia.com/v1/rim/"

_VERSION = re.compile(r"(\d{1,6})\.(\d{1,6})")


_T = TypeVar("_T")


@dataclass
class _Findings:
    """The checks so far."""

    checks: list[Check]

    def add(
        self, name: str, *, passed: bool, observed: object = None, expected: object = None,
        fix: str = "",
    ) -> bool:  # fmt: skip
        self.checks.append(
            check(name, passed=passed, observed=observed, expected=expected, reason=fix)
        )
        return passed

    def skip(self, reason: str, *names: str) -> None:
        self.checks += [not_asked(name, reason=reason) for name in names]

    def attempt(self, name: str, action: Callable[[], str]) -> bool:
        """Do something that says what it saw, or fails with an error that says what to do."""
        try:
            return self.add(name, passed=True, observed=action())
        except CaiError as error:
            fix = error.message if error.hint is None else f"{error.message}; {error.hint}"
            return self.add(name, passed=False, fix=fix)


def diagnose(
    files: GuestFiles,
    driver: GpuDriver,
    *,
    now: datetime,
    rims: RimStore | None = None,
    collateral: CollateralStore | None = None,
) -> Verdict:
    """Look at everything that attesting needs.

    Args:
        files: the kernel's files.
        driver: the GPU driver.
        now: time of the diagnosis.
        rims: NVIDIA's reference files, if the host keeps some.
        collateral: Intel's statements, if the host keeps some.

    Returns:
        Checks named ``host.…`` and ``gpu.…``; the reason of a failure is what to do.
    """
    found = _Findings([])
    _kernel(found, files)
    _tdx(found, files, collateral, now)
    _memory(found, files)
    _gpu(found, driver, rims)
    return Verdict("this host", tuple(found.checks))


def _kernel(found: _Findings, files: GuestFiles) -> None:
    release = _text(files, KERNEL_RELEASE)
    version = _version(release)
    if version is None:
        found.skip("the kernel's version cannot be read", "host.kernel")
        return
    needed = ".".join(map(str, RTMR_KERNEL))
    if version < QUOTE_KERNEL:
        fix = f"boot Linux {needed} or newer: quotes need 6.7, measuring a launch needs {needed}"
    else:
        fix = f"boot Linux {needed} or newer: quotes work, but a launch cannot be measured"
    found.add("host.kernel", passed=version >= RTMR_KERNEL, observed=release,
              expected=f"{needed} or newer", fix=fix)  # fmt: skip


def _tdx(
    found: _Findings, files: GuestFiles, collateral: CollateralStore | None, now: datetime
) -> None:
    running = files.exists(TDX_DEVICE)
    guest = found.add(
        "host.tdx_guest", passed=running, observed="yes" if running else "no", expected="yes",
        fix="start this machine as a TDX guest (QEMU: -object tdx-guest …) and modprobe tdx_guest",
    )  # fmt: skip
    configfs = found.add(
        "host.configfs", passed=files.exists(CONFIGFS) and files.exists(REPORTS),
        observed="mounted" if files.exists(CONFIGFS) else "absent", expected=f"/{REPORTS}",
        fix="mount -t configfs none /sys/kernel/config; the kernel needs CONFIG_TSM_REPORTS"
        if not files.exists(CONFIGFS) else
        "the kernel needs CONFIG_TSM_REPORTS and CONFIG_TDX_GUEST_DRIVER; modprobe tdx_guest",
    )  # fmt: skip
    if guest and configfs:
        _quote(found, files, collateral, now)
    else:
        found.skip("no quote can be made yet", "host.quote", "host.collateral")
    rtmr = f"{MEASUREMENTS}/rtmr3:sha384"
    found.add(
        "host.rtmr3", passed=files.exists(rtmr), observed=f"/{rtmr}",
        fix="boot Linux 6.16 or newer, or let a measured launcher extend RTMR3 before",
    )
    found.add(
        "host.event_log", passed=files.exists(CCEL_DATA), observed=f"/{CCEL_DATA}",
        fix="boot with a TDX-aware firmware (TDVF/OVMF) that leaves a CCEL table; without a log"
        " only exact register values can be demanded",
    )


def _quote(
    found: _Findings, files: GuestFiles, collateral: CollateralStore | None, now: datetime
) -> None:
    quotes: list[bytes] = []

    def make() -> str:
        binding = stock_report_data(sha384(secrets.token_bytes(32)).digest())
        quote = TdxGuest(files).quote(binding)
        parsed = parse_quote(quote)
        quotes.append(parsed.pck_chain)
        if parsed.body["report_data"] != binding:
            raise CaiError("the quote does not carry what it was asked to")
        debug = parsed.body["td_attributes"][0] & 1
        if debug:
            raise CaiError("this is a debug guest", hint="start it without debug")
        return f"version {parsed.header.version}"

    found.attempt("host.quote", make)
    if not quotes or collateral is None:
        reason = "no collateral was given (--collateral)" if quotes else "there is no quote"
        found.skip(reason, "host.collateral")
        return

    def platform() -> str:
        chain = load_chain(quotes[0], what="PCK chain")
        pck = pck_extension(chain[0])
        authority = "processor" if "Processor" in chain[0].issuer.rfc4514_string() else "platform"
        fmspc = pck.fmspc.hex()
        item = collateral.find(fmspc, authority, now)
        if item is None or not item.covers(now):
            state = "no collateral" if item is None else "only expired collateral"
            raise CaiError(
                f"{state} for FMSPC {fmspc}",
                hint=f"cai collateral fetch --fmspc {fmspc} --out bundle.tar",
            )
        return f"FMSPC {fmspc}, until {item.expires.isoformat()}"

    found.attempt("host.collateral", platform)


def _memory(found: _Findings, files: GuestFiles) -> None:
    lines = [line for line in _text(files, SWAPS).splitlines()[1:] if "/zram" not in line]
    found.add(
        "host.swap", passed=not lines, observed=lines[0].split()[0] if lines else "off",
        expected="off or zram", fix="swapoff -a, and take swap out of /etc/fstab",
    )


_AFTER_NVML = (
    "gpu.count", "gpu.driver", "gpu.cc_mode", "gpu.devtools", "gpu.ready", "gpu.report", "gpu.rim",
)  # fmt: skip


def _gpu(found: _Findings, driver: GpuDriver, rims: RimStore | None) -> None:
    if not found.attempt("gpu.nvml", lambda: f"driver {driver.version()}"):
        found.skip("NVML is not usable", *_AFTER_NVML)
        return
    count = _asked(driver.count, 0)
    present = found.add(
        "gpu.count", passed=count > 0, observed=count, expected="at least 1",
        fix="pass a GPU through to this guest (VFIO) and load its driver",
    )
    version = _version(driver.version())
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
    ready = _asked(lambda: "on" if driver.ready() else "off", "unknown")
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


def _modes(found: _Findings, driver: GpuDriver) -> None:
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


def _architectures(found: _Findings, driver: GpuDriver, count: int) -> None:
    for place in range(min(count, 16)):
        number = _asked(partial(driver.architecture, place), -1)
        found.add(
            f"gpu.{place}.architecture", passed=number in ARCHITECTURES,
            observed=ARCHITECTURES.get(number, f"number {number}"), expected="HOPPER or BLACKWELL",
            fix="only Hopper and Blackwell GPUs can attest; take this one out of the guest",
        )


def _rims(found: _Findings, devices: list[DeviceEvidence], rims: RimStore | None) -> None:
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


def _asked(question: Callable[[], _T], otherwise: _T) -> _T:
    try:
        return question()
    except CaiError:
        return otherwise


def _text(files: GuestFiles, path: str) -> str:
    try:
        return files.read(path, MAX_PROC)[:MAX_PROC].decode("utf-8", "replace").strip()
    except OSError:
        return ""


def _version(text: str) -> tuple[int, int] | None:
    match = _VERSION.match(text)
    return None if match is None else (int(match[1]), int(match[2]))
