"""The tables of ``policy.toml``: their members, defaults and limits (docs/spec-policy.md §2).

``cai.attest.policy`` reads a whole file with them and appraises facts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from cai.errors import SettingError
from cai.settings import Section

MAX_LISTED = 256
"""Most values in one list."""

MAX_GPUS = 16
"""Largest GPU count that can be demanded."""

MAX_EVAL_DATA_NUMBER = 1_000_000
"""Largest TCB evaluation data number that can be demanded."""

ZERO_48 = "00" * 48
"""mr_config_id, mr_owner and mr_owner_config of a guest to which the host gave none."""

NORMAL_ATTRIBUTES = "0000001000000000"
"""td_attributes with SEPT_VE_DISABLE and nothing else."""

SOUND_STATUS = ("UpToDate", "SWHardeningNeeded")
"""TCB statuses that ``tcb_status`` may list."""

UNSOUND_STATUS = (
    "ConfigurationNeeded", "ConfigurationAndSWHardeningNeeded", "OutOfDate",
    "OutOfDateConfigurationNeeded", "TDRelaunchAdvised", "TDRelaunchAdvisedConfigurationNeeded",
)  # fmt: skip
"""TCB statuses that only ``unsafe_tcb_status`` may list; ``Revoked`` nothing can allow."""

ARCHITECTURES = ("HOPPER", "BLACKWELL")

REQUIRED_MEASUREMENTS = {
    "mr_td": ("mr_td", 48), "rtmr0": ("rtmr_0", 48), "rtmr1": ("rtmr_1", 48),
    "rtmr2": ("rtmr_2", 48), "rtmr3": ("rtmr_3", 48), "xfam": ("xfam", 8),
}  # fmt: skip
"""Members of ``[tdx]`` that must be listed or be named in ``unsafe_any_<member>``, with the body
field and its size in bytes."""

DEFAULTED_MEASUREMENTS = {
    "td_attributes": ("td_attributes", 8, NORMAL_ATTRIBUTES),
    "mr_config_id": ("mr_config_id", 48, ZERO_48),
    "mr_owner": ("mr_owner", 48, ZERO_48),
    "mr_owner_config": ("mr_owner_config", 48, ZERO_48),
}
"""Members of ``[tdx]`` with a safe default, with the body field, its size and that default."""

GPU_FACTS = {"cc_feature": "on", "devtools": "off"}
"""Guest facts that must hold wherever there is a GPU; the GPU's report does not show them."""

ALL_MEASUREMENTS: Mapping[str, tuple[str, int]] = {
    **REQUIRED_MEASUREMENTS,
    **{name: (field, size) for name, (field, size, _) in DEFAULTED_MEASUREMENTS.items()},
}
"""Every exactly compared member of ``[tdx]``, with its body field and size in bytes."""


class Profile(StrEnum):
    """Guest profiles (decisions §1.1)."""

    SEALED = "sealed"
    OPERATED = "operated"


@dataclass(frozen=True, slots=True)
class TdxPolicy:
    """Table ``[tdx]``.

    Attributes:
        allowed: policy member to accepted hex values; ``None`` where anything is accepted.
        tcb_status: accepted statuses.
        mr_seam: accepted TDX modules; empty is not asked.
        ppid: accepted platforms; empty is not asked.
        min_eval_data_number: oldest generation of TCB information; 0 is not asked.
        advisories_denied: advisories with which a platform is refused.
    """

    allowed: Mapping[str, tuple[str, ...] | None]
    tcb_status: tuple[str, ...]
    mr_seam: tuple[str, ...]
    ppid: tuple[str, ...]
    min_eval_data_number: int
    advisories_denied: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GpuPolicy:
    """Table ``[gpu]``.

    Attributes:
        count: exact number of GPUs; ``None`` where any number is accepted.
        architectures: accepted ones.
        driver_versions: accepted ones; empty is not asked.
        vbios_versions: accepted ones; empty is not asked.
    """

    count: int | None
    architectures: tuple[str, ...]
    driver_versions: tuple[str, ...]
    vbios_versions: tuple[str, ...]


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


def parse_tdx(section: Section, unsafe: list[str]) -> TdxPolicy:
    """Read table ``[tdx]``; its loosenings are appended to ``unsafe``.

    Raises:
        SettingError: a member is missing, unknown, contradictory or out of its range.
    """
    allowed: dict[str, tuple[str, ...] | None] = {}
    for name, (_, size) in REQUIRED_MEASUREMENTS.items():
        loosened = section.flag(f"unsafe_any_{name}", default=False)
        if loosened and section.has(name):
            raise SettingError(f"{section.where}: {name} and unsafe_any_{name} contradict")
        if loosened:
            unsafe.append(f"tdx.unsafe_any_{name}")
        allowed[name] = None if loosened else _hexes(section, name, size)
    for name, (_, size, default) in DEFAULTED_MEASUREMENTS.items():
        allowed[name] = _hexes(section, name, size) if section.has(name) else (default,)
    status = _choices(section, "tcb_status", SOUND_STATUS, ["UpToDate"])
    loosened_status = _choices(section, "unsafe_tcb_status", UNSOUND_STATUS, [])
    if loosened_status:
        unsafe.append("tdx.unsafe_tcb_status")
    policy = TdxPolicy(
        allowed=allowed,
        tcb_status=(*status, *loosened_status),
        mr_seam=_hexes(section, "mr_seam", 48) if section.has("mr_seam") else (),
        ppid=_hexes(section, "ppid", 16) if section.has("ppid") else (),
        min_eval_data_number=section.integer(
            "min_eval_data_number", 0, least=0, most=MAX_EVAL_DATA_NUMBER, unit="generations"
        ),
        advisories_denied=_texts(section, "advisories_denied", []),
    )
    section.finish()
    return policy


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
        architectures=_choices(section, "architectures", ARCHITECTURES, list(ARCHITECTURES)),
        driver_versions=_texts(section, "driver_versions", []),
        vbios_versions=_texts(section, "vbios_versions", []),
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
        launch_digest=None if any_launch else _hexes(section, "launch_digest", 48),
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


def _hexes(section: Section, name: str, size: int) -> tuple[str, ...]:
    values = _texts(section, name, None)
    if not values:
        raise SettingError(
            f"{section.where}: {name} is an empty list, which no guest can pass",
            hint="list at least one value",
        )
    for value in values:
        if len(value) != 2 * size or not set(value) <= set("0123456789abcdef"):
            raise SettingError(
                f"{section.where}: {name} has {value[:100]!r}, expected {2 * size} lower-case hex"
                " digits"
            )
    return values


def _choices(
    section: Section, name: str, known: Iterable[str], default: list[str]
) -> tuple[str, ...]:
    values = _texts(section, name, default)
    for value in values:
        if value not in tuple(known):
            hint = f"known are: {', '.join(known)}"
            if value in UNSOUND_STATUS:
                hint = f"list {value} in unsafe_tcb_status"
            raise SettingError(f"{section.where}: {name} has {value[:100]!r}", hint=hint)
    return values


def _texts(section: Section, name: str, default: list[str] | None) -> tuple[str, ...]:
    values = section.texts(name, default)
    if len(values) > MAX_LISTED:
        raise SettingError(f"{section.where}: {name} lists more than {MAX_LISTED} values")
    return tuple(values)
