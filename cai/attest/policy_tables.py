"""Tables ``[gpu]`` and ``[guest]`` of ``policy.toml`` (docs/spec-policy.md §2).

``cai.attest.policy`` reads a whole file with them and with ``cai.attest.policy_tdx``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from cai.attest.gpu.policy import DevicePolicy, parse_device_policy
from cai.attest.policy_values import choices, hexes, texts
from cai.errors import SettingError
from cai.settings import Section

MAX_GPUS = 16
"""Largest GPU count that can be demanded."""

ARCHITECTURES = ("HOPPER", "BLACKWELL")

GPU_FACTS = {"cc_feature": "on", "devtools": "off"}
"""Guest facts that must hold wherever there is a GPU; the GPU's report does not show them."""


class Profile(StrEnum):
    """Guest profiles (decisions §1.1)."""

    SEALED = "sealed"
    OPERATED = "operated"


@dataclass(frozen=True, slots=True)
class GpuPolicy:
    """Table ``[gpu]``.

    Attributes:
        count: exact number of GPUs; ``None`` where any number is accepted.
        architectures: accepted ones.
        driver_versions: accepted ones; empty is not asked.
        vbios_versions: accepted ones; empty is not asked.
        devices: what is asked about reference measurements and revocation.
    """

    count: int | None
    architectures: tuple[str, ...]
    driver_versions: tuple[str, ...]
    vbios_versions: tuple[str, ...]
    devices: DevicePolicy


@dataclass(frozen=True, slots=True)
class GuestPolicy:
    """Table ``[guest]``.

    Attributes:
        launch_digest: accepted digests of ``launch.json``; ``None`` where any is accepted.
        facts: facts that must have exactly these values.
        asked: whether guest facts, profile included, are asked for at all.
    """

    launch_digest: tuple[str, ...] | None
    facts: Mapping[str, str]
    asked: bool


def parse_gpu(section: Section, unsafe: list[str]) -> GpuPolicy:
    """Read table ``[gpu]``; its loosenings are appended to ``unsafe``.

    Raises:
        SettingError: a member is missing, unknown, contradictory or out of its range.
    """
    loosened = section.flag("unsafe_any_count", default=False)
    if loosened and section.has("count"):
        raise SettingError(f"{section.where}: count and unsafe_any_count contradict")
    if loosened:
        unsafe.append("gpu.unsafe_any_count")
    policy = GpuPolicy(
        count=None if loosened else section.integer("count", least=0, most=MAX_GPUS, unit="GPUs"),
        architectures=choices(section, "architectures", ARCHITECTURES, list(ARCHITECTURES)),
        driver_versions=texts(section, "driver_versions", []),
        vbios_versions=texts(section, "vbios_versions", []),
        devices=parse_device_policy(section, unsafe),
    )
    section.finish()
    return policy


def parse_guest(section: Section, unsafe: list[str]) -> GuestPolicy:
    """Read table ``[guest]``; its loosenings are appended to ``unsafe``.

    Raises:
        SettingError: a member is missing, unknown, contradictory or out of its range.
    """
    any_launch = section.flag("unsafe_any_launch_digest", default=False)
    if any_launch and section.has("launch_digest"):
        raise SettingError(
            f"{section.where}: launch_digest and unsafe_any_launch_digest contradict"
        )
    without_facts = section.flag("unsafe_without_facts", default=False)
    unsafe += ["guest.unsafe_any_launch_digest"] * any_launch
    unsafe += ["guest.unsafe_without_facts"] * without_facts
    inner = section.section("facts")
    facts: dict[str, str] = {}
    if inner is not None:
        if without_facts:
            raise SettingError(f"{section.where}: facts and unsafe_without_facts contradict")
        facts = _fact_table(inner, section.raw("facts"))
    policy = GuestPolicy(
        launch_digest=None if any_launch else hexes(section, "launch_digest", 48),
        facts=facts,
        asked=not without_facts,
    )
    section.finish()
    return policy


def _fact_table(section: Section, values: object) -> dict[str, str]:
    names = list(values) if isinstance(values, dict) else []
    for name in (*GPU_FACTS, "profile", "count"):
        if name in names:
            raise SettingError(
                f"{section.where}: {name} is always asked for and cannot be set here"
            )
    return {name: section.text(name) for name in names}
