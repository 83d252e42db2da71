"""Table ``[tdx]`` of ``policy.toml``: its members, defaults and limits (docs/spec-policy.md §2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from cai.attest.facts import TdxFacts
from cai.attest.policy_values import choices, hexes, moment, optional_hexes, texts
from cai.errors import SettingError
from cai.settings import Section

MAX_EVAL_DATA_NUMBER = 1_000_000
"""Largest TCB evaluation data number that can be demanded."""

MAX_COLLATERAL_AGE_DAYS = 365
"""Largest collateral age that can be set, days."""

MAX_EXCEPTIONS = 16
"""Most dated exceptions in one policy."""

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
"""TCB statuses for a dated exception or ``unsafe_tcb_status``; ``Revoked`` nothing can allow."""

PLATFORM_FLAGS = ("dynamic_platform", "cached_keys", "smt_enabled")
"""What a platform's certificate says of its configuration."""

LAUNCH_READY = "launch-ready"
"""RTMR3 holds one launch event, then one ready event, and nothing else (decisions §1.2)."""

BOTH_ENGINES = ("dcap-qvl", "pure")

REQUIRED_MEASUREMENTS = {
    "mr_td": ("mr_td", 48), "rtmr0": ("rtmr_0", 48), "rtmr1": ("rtmr_1", 48),
    "rtmr2": ("rtmr_2", 48), "rtmr3": ("rtmr_3", 48), "xfam": ("xfam", 8),
}  # fmt: skip
"""Members that must be listed or be named in ``unsafe_any_<member>``, with the body field and its
size in bytes; ``rtmr3_events`` can stand for ``rtmr3``."""

DEFAULTED_MEASUREMENTS = {
    "td_attributes": ("td_attributes", 8, NORMAL_ATTRIBUTES),
    "mr_config_id": ("mr_config_id", 48, ZERO_48),
    "mr_owner": ("mr_owner", 48, ZERO_48),
    "mr_owner_config": ("mr_owner_config", 48, ZERO_48),
}
"""Members with a safe default, with the body field, its size and that default."""

ALL_MEASUREMENTS: Mapping[str, tuple[str, int]] = {
    **REQUIRED_MEASUREMENTS,
    **{name: (field, size) for name, (field, size, _) in DEFAULTED_MEASUREMENTS.items()},
}
"""Every exactly compared member, with its body field and size in bytes."""


RISK_RTMR3 = "any runtime event is accepted (unsafe_any_rtmr3): what was started is not measured"


@dataclass(frozen=True, slots=True)
class StatusException:
    """A status that is accepted for a while, with the advisories that are known and accepted.

    Attributes:
        status: the TCB status.
        advisories: a platform to which any other advisory applies is refused.
        expires: after it the exception is void.
    """

    status: str
    advisories: tuple[str, ...]
    expires: datetime

    def covers(self, facts: TdxFacts, now: datetime) -> bool:
        """Whether it holds now for this platform."""
        return (
            facts.tcb_status == self.status
            and set(facts.advisory_ids) <= set(self.advisories)
            and now <= self.expires
        )


@dataclass(frozen=True, slots=True)
class TdxPolicy:
    """Table ``[tdx]``.

    Attributes:
        allowed: policy member to accepted hex values; ``None`` where anything is accepted.
        rtmr3_events: RTMR3 is judged by its events and not by its value.
        tcb_status: accepted statuses.
        exceptions: dated exceptions.
        mr_seam: accepted TDX modules; empty is not asked.
        ppid: accepted processor packages; empty is not asked.
        platform_instance_id: accepted platforms; empty is not asked.
        platform_flags_denied: configurations with which a platform is refused.
        min_eval_data_number: oldest generation of TCB information; 0 is not asked.
        max_collateral_age_days: greatest age of TCB information; 0 is not asked.
        min_tcb_date: oldest TCB recovery; ``None`` is not asked.
        advisories_denied: advisories with which a platform is refused.
        require_event_log: there must be an event log that replays.
        require_agreement: both engines must have verified the quote.
    """

    allowed: Mapping[str, tuple[str, ...] | None]
    rtmr3_events: bool
    tcb_status: tuple[str, ...]
    exceptions: tuple[StatusException, ...]
    mr_seam: tuple[str, ...]
    ppid: tuple[str, ...]
    platform_instance_id: tuple[str, ...]
    platform_flags_denied: tuple[str, ...]
    min_eval_data_number: int
    max_collateral_age_days: int
    min_tcb_date: datetime | None
    advisories_denied: tuple[str, ...]
    require_event_log: bool
    require_agreement: bool

    @property
    def residual_risks(self) -> tuple[str, ...]:
        """What a guest that passes is still not protected from."""
        risks = []
        if self.allowed["rtmr3"] is None and not self.rtmr3_events:
            risks.append(RISK_RTMR3)
        risks += [
            f"dated exception: {item.status} with {', '.join(item.advisories) or 'no advisory'}"
            f" is accepted until {item.expires:%Y-%m-%dT%H:%M:%SZ}"
            for item in self.exceptions
        ]
        return tuple(risks)


def parse_tdx(section: Section, unsafe: list[str]) -> TdxPolicy:
    """Read table ``[tdx]``; its loosenings are appended to ``unsafe``.

    Raises:
        SettingError: a member is missing, unknown, contradictory or out of its range.
    """
    events = _rtmr3_events(section)
    allowed = _measurements(section, unsafe, by_events=events)
    hints = {status: f"list {status} in a dated [[tdx.exception]], or in unsafe_tcb_status"
             for status in UNSOUND_STATUS}  # fmt: skip
    status = choices(section, "tcb_status", SOUND_STATUS, ["UpToDate"], hints=hints)
    loosened_status = choices(section, "unsafe_tcb_status", UNSOUND_STATUS, [])
    exceptions = _exceptions(section)
    if not (status or loosened_status or exceptions):
        raise SettingError(
            f"{section.where}: no TCB status is accepted", hint="list at least UpToDate"
        )
    unsafe += ["tdx.unsafe_tcb_status"] * bool(loosened_status)
    unsafe += ["tdx.exception"] * bool(exceptions)
    policy = TdxPolicy(
        allowed=allowed,
        rtmr3_events=events,
        tcb_status=(*status, *loosened_status),
        exceptions=exceptions,
        mr_seam=optional_hexes(section, "mr_seam", 48),
        ppid=optional_hexes(section, "ppid", 16),
        platform_instance_id=optional_hexes(section, "platform_instance_id", 16),
        platform_flags_denied=choices(section, "platform_flags_denied", PLATFORM_FLAGS, []),
        min_eval_data_number=section.integer(
            "min_eval_data_number", 0, least=0, most=MAX_EVAL_DATA_NUMBER, unit="generations"
        ),
        max_collateral_age_days=section.integer(
            "max_collateral_age_days", 0, least=0, most=MAX_COLLATERAL_AGE_DAYS, unit="days"
        ),
        min_tcb_date=moment(section, "min_tcb_date") if section.has("min_tcb_date") else None,
        advisories_denied=texts(section, "advisories_denied", []),
        require_event_log=section.flag("require_event_log", default=False),
        require_agreement=section.flag("require_agreement", default=False),
    )
    section.finish()
    return policy


def _rtmr3_events(section: Section) -> bool:
    if not section.has("rtmr3_events"):
        return False
    if section.text("rtmr3_events") != LAUNCH_READY:
        raise SettingError(
            f"{section.where}: rtmr3_events is unknown", hint=f"known is: {LAUNCH_READY}"
        )
    for name in ("rtmr3", "unsafe_any_rtmr3"):
        if section.has(name):
            raise SettingError(f"{section.where}: rtmr3_events and {name} contradict")
    return True


def _measurements(
    section: Section, unsafe: list[str], *, by_events: bool
) -> dict[str, tuple[str, ...] | None]:
    allowed: dict[str, tuple[str, ...] | None] = {}
    for name, (_, size) in REQUIRED_MEASUREMENTS.items():
        if name == "rtmr3" and by_events:
            allowed[name] = None
            continue
        loosened = section.flag(f"unsafe_any_{name}", default=False)
        if loosened and section.has(name):
            raise SettingError(f"{section.where}: {name} and unsafe_any_{name} contradict")
        if loosened:
            unsafe.append(f"tdx.unsafe_any_{name}")
        allowed[name] = None if loosened else hexes(section, name, size)
    for name, (_, size, default) in DEFAULTED_MEASUREMENTS.items():
        allowed[name] = hexes(section, name, size) if section.has(name) else (default,)
    return allowed


def _exceptions(section: Section) -> tuple[StatusException, ...]:
    values = section.raw("exception")
    if values is None:
        return ()
    if not isinstance(values, list) or len(values) > MAX_EXCEPTIONS:
        raise SettingError(
            f"{section.where}: exception must be a list of at most {MAX_EXCEPTIONS} tables",
            hint="write [[tdx.exception]]",
        )
    found = []
    for value in values:
        inner = Section(value, where=f"{section.where}.exception")
        status = inner.text("status")
        if status not in (*SOUND_STATUS, *UNSOUND_STATUS):
            raise SettingError(f"{inner.where}: no exception can be made for {status[:60]!r}")
        item = StatusException(status, texts(inner, "advisories", None), moment(inner, "expires"))
        inner.finish()
        found.append(item)
    return tuple(found)
