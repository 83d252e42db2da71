"""What is missing on this host before it can attest, and how to set it right.

Each finding is a check whose reason says what to do. Nothing here proves anything to anybody: the
host judges itself, with its own files. What needs an earlier step is *not asked* when that failed.
"""

from __future__ import annotations

import secrets
from datetime import datetime
from hashlib import sha384

from cai.attest.certificates import load_chain
from cai.attest.findings import Findings, version_of
from cai.attest.gpu.collect import GpuDriver
from cai.attest.gpu.doctor import diagnose_gpus
from cai.attest.gpu.rim_store import RimStore
from cai.attest.statement import stock_report_data
from cai.attest.tdx.collateral import CollateralStore
from cai.attest.tdx.collect import CCEL_DATA, MEASUREMENTS, REPORTS, GuestFiles, TdxGuest
from cai.attest.tdx.pck import pck_extension
from cai.attest.tdx.quote import parse_quote
from cai.attest.verdict import Verdict
from cai.errors import CaiError

TDX_DEVICE = "sys/devices/virtual/misc/tdx_guest"
CONFIGFS = "sys/kernel/config"
KERNEL_RELEASE = "proc/sys/kernel/osrelease"
SWAPS = "proc/swaps"
"""What is looked at, below the root of the file system."""

QUOTE_KERNEL = (6, 7)
RTMR_KERNEL = (6, 16)
"""First kernels with configfs-tsm and with RTMRs in sysfs."""

MAX_PROC = 64 * 1024
"""Largest file below /proc that is read, bytes."""


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
    found = Findings([])
    _kernel(found, files)
    _tdx(found, files, collateral, now)
    _memory(found, files)
    diagnose_gpus(found, driver, rims)
    return Verdict("this host", tuple(found.checks))


def _kernel(found: Findings, files: GuestFiles) -> None:
    release = _text(files, KERNEL_RELEASE)
    version = version_of(release)
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
    found: Findings, files: GuestFiles, collateral: CollateralStore | None, now: datetime
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
    found: Findings, files: GuestFiles, collateral: CollateralStore | None, now: datetime
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


def _memory(found: Findings, files: GuestFiles) -> None:
    lines = [line for line in _text(files, SWAPS).splitlines()[1:] if "/zram" not in line]
    found.add(
        "host.swap", passed=not lines, observed=lines[0].split()[0] if lines else "off",
        expected="off or zram", fix="swapoff -a, and take swap out of /etc/fstab",
    )


def _text(files: GuestFiles, path: str) -> str:
    try:
        return files.read(path, MAX_PROC)[:MAX_PROC].decode("utf-8", "replace").strip()
    except OSError:
        return ""
