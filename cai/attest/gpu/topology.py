"""Which devices together are evidence: plain lists, or one complete protected-PCIe system.

In protected-PCIe mode the links between GPUs and switches carry plaintext, so a GPU counts only
inside a system whose every part is verified and named by the others (docs/spec-evidence.md §4.9).
"""

from __future__ import annotations

from collections.abc import Sequence

from cai.attest.gpu.certificates import SWITCH, Device
from cai.attest.gpu.report import Report
from cai.attest.verdict import Check, check, not_asked

SYSTEM_GPUS = 8
SYSTEM_SWITCHES = 4
"""Members of a protected-PCIe system (HGX H100 and H200)."""

SYSTEM_ARCHITECTURE = "HOPPER"
"""Blackwell systems encrypt their links instead."""

FLAG_PROTECTED_PCIE = 2
PLAIN_FLAGS = {None, 0, 1}
"""Feature flags of devices that stand alone. NVIDIA's sources contradict each other on what 0 and 1
mean, so neither is named; old reports have none."""

PROTECTED_PCIE_ON, PROTECTED_PCIE_OFF = 0xAA, 0x55

_ABSENT = (bytes(8), b"\xff" * 8)
"""Entries of a list of identities that name nothing."""

Member = tuple[Report, Device]


def check_list(members: Sequence[Member]) -> list[Check]:
    """Checks across all devices of a list, each of which has been verified by itself.

    Returns:
        ``gpu.distinct``, ``gpu.mode`` and ``gpu.topology``.
    """
    gpus = [member for member in members if member[1].arch != SWITCH]
    switches = [member for member in members if member[1].arch == SWITCH]
    protected = bool(switches) or any(_protected(report) for report, _ in gpus)
    mode = _mode(gpus, protected=protected)
    if not protected:
        topology = not_asked("gpu.topology", reason="no device is of a protected-PCIe system")
    else:
        faults = [*_counts(gpus, switches), *_links(gpus, switches)]
        topology = check(
            "gpu.topology", passed=not faults,
            observed=f"{len(gpus)} GPUs and {len(switches)} switches",
            expected=f"{SYSTEM_GPUS} GPUs and {SYSTEM_SWITCHES} switches that name each other",
            reason="; ".join(faults),
        )  # fmt: skip
    return [_distinct(members), mode, topology]


def _protected(report: Report) -> bool:
    # Firmware from before the flag says it by the status alone.
    return (
        report.feature_flag == FLAG_PROTECTED_PCIE
        or report.protected_pcie_status == PROTECTED_PCIE_ON
    )


def _distinct(members: Sequence[Member]) -> Check:
    # One device counts once: by the leaf it signs with, and by the key burnt into it.
    distinct = min(
        len({device.ueid for _, device in members}),
        len({device.key_info for _, device in members}),
        len({device.boot_rom_info for _, device in members}),
    )
    return check(
        "gpu.distinct", passed=distinct == len(members), observed=distinct,
        expected=len(members), reason="one device stands in the list twice",
    )  # fmt: skip


def _mode(gpus: Sequence[Member], *, protected: bool) -> Check:
    flags = {report.feature_flag for report, _ in gpus}
    states = {report.protected_pcie_status for report, _ in gpus}
    observed = ", ".join(sorted("absent" if flag is None else str(flag) for flag in flags))
    allowed = {FLAG_PROTECTED_PCIE} if protected else PLAIN_FLAGS
    status = {PROTECTED_PCIE_ON} if protected else {None, PROTECTED_PCIE_OFF}
    if not flags:
        reason = "there are switches but no GPU"
    elif not flags <= {*PLAIN_FLAGS, FLAG_PROTECTED_PCIE}:
        reason = "unknown feature flag"
    elif len(flags) > 1:
        reason = "devices of different modes in one list"
    elif not states <= status:
        reason = "protected-PCIe status and feature flag contradict"
    else:
        reason = "switches beside GPUs that are not in protected-PCIe mode"
    return check(
        "gpu.mode", passed=len(flags) == 1 and flags <= allowed and states <= status,
        observed=observed or "no GPU", reason=reason,
    )  # fmt: skip


def _counts(gpus: Sequence[Member], switches: Sequence[Member]) -> list[str]:
    faults: list[str] = []
    if (len(gpus), len(switches)) != (SYSTEM_GPUS, SYSTEM_SWITCHES):
        faults.append("not a complete system")
    if any(device.arch != SYSTEM_ARCHITECTURE for _, device in gpus):
        faults.append(f"not all GPUs are {SYSTEM_ARCHITECTURE}")
    if len({report.nonce for report, _ in (*gpus, *switches)}) > 1:
        faults.append("the reports are not of one moment (nonces differ)")
    return faults


def _links(gpus: Sequence[Member], switches: Sequence[Member]) -> list[str]:
    faults: list[str] = []
    # (a) What each switch calls itself, and that its certificate says the same.
    own = {identity for report, _ in switches for identity in report.switch_pdis}
    if len(own) != SYSTEM_SWITCHES or any(
        len(report.switch_pdis) != 1 or (device.pdi or report.switch_pdis[0]) not in
        report.switch_pdis for report, device in switches
    ):  # fmt: skip
        faults.append("the switches do not each name themselves")
    # (b) Every GPU is linked to exactly these switches; GPUs spell identities backwards.
    if any(_named(report.switch_pdis, backwards=True) != own for report, _ in gpus):
        faults.append("a GPU is linked to other switches")
    # (c) Every switch is linked to the same eight GPUs.
    seen = {frozenset(_named(report.gpu_pdis)) for report, _ in switches}
    listed = next(iter(seen)) if len(seen) == 1 else frozenset[bytes]()
    if len(listed) != SYSTEM_GPUS:
        faults.append("the switches do not all name the same eight GPUs")
    # (d) They are these GPUs, wherever certificates say which GPU is which.
    if any(device.pdi is not None and device.pdi not in listed for _, device in gpus):
        faults.append("a GPU is not among those that the switches name")
    return faults


def _named(entries: Sequence[bytes], *, backwards: bool = False) -> set[bytes]:
    return {
        entry[::-1] if backwards else entry for entry in entries if entry not in _ABSENT
    }
