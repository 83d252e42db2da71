"""What a policy asks of verified devices."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from cai.attest.facts import DeviceFacts
from cai.attest.gpu.policy import (
    CLOCK_SKEW,
    MAX_OCSP_AGE_H,
    DevicePolicy,
    appraise_devices,
    parse_device_policy,
)
from cai.attest.verdict import Outcome
from cai.errors import FormatError, SettingError
from cai.settings import Section

NOW = datetime(2026, 11, 20, tzinfo=UTC)
BARE = DeviceFacts("HOPPER", "GH100 A01 GSP BROM", "1", "580.95.05", "96.00.74.00.1A", "", {})
FULL = replace(
    BARE, rims={"driver": "aa", "vbios": "bb"}, ocsp_produced=NOW.isoformat(),
    rim_expires=(NOW + timedelta(days=9)).isoformat(),
)  # fmt: skip
LOOSE = DevicePolicy(rim_required=False, ocsp_max_age_h=None)


def outcomes(device: DeviceFacts, policy: DevicePolicy, now: datetime = NOW) -> dict[str, Outcome]:
    return {item.name: item.outcome for item in appraise_devices([device], policy, now=now)}


def test_both_are_required_by_default() -> None:
    good = {"gpu.0.rim_compared": Outcome.PASS, "gpu.0.ocsp_age": Outcome.PASS}
    assert outcomes(FULL, DevicePolicy()) == good
    assert set(outcomes(BARE, DevicePolicy()).values()) == {Outcome.FAIL}
    assert set(outcomes(BARE, LOOSE).values()) == {Outcome.NOT_ASKED}
    assert set(outcomes(FULL, LOOSE).values()) == {Outcome.NOT_ASKED}


def test_every_device_is_asked() -> None:
    checks = appraise_devices([FULL, BARE, FULL], DevicePolicy(), now=NOW)
    assert [item.name for item in checks if item.outcome is Outcome.FAIL] == [
        "gpu.1.rim_compared", "gpu.1.ocsp_age"
    ]  # fmt: skip


def test_ages() -> None:
    def age(hours: float, policy: DevicePolicy) -> Outcome:
        return outcomes(FULL, policy, NOW + timedelta(hours=hours))["gpu.0.ocsp_age"]

    day = DevicePolicy()
    assert age(24, day) is Outcome.PASS
    assert age(24.01, day) is Outcome.FAIL
    assert age(1.01, DevicePolicy(ocsp_max_age_h=1)) is Outcome.FAIL
    skew = CLOCK_SKEW / timedelta(hours=1)
    assert age(-skew, day) is Outcome.PASS
    assert age(-skew - 0.01, day) is Outcome.FAIL


def test_reference_files_that_have_expired_since() -> None:
    for days, outcome in ((9, Outcome.PASS), (9.1, Outcome.FAIL)):
        found = outcomes(FULL, DevicePolicy(), NOW + timedelta(days=days))
        assert found["gpu.0.rim_compared"] is outcome
    undated = replace(FULL, rim_expires="")
    assert outcomes(undated, DevicePolicy())["gpu.0.rim_compared"] is Outcome.FAIL


def test_times_that_are_none() -> None:
    for member in ("ocsp_produced", "rim_expires"):
        changes: dict[str, Any] = {member: "yesterday"}
        with pytest.raises(FormatError):
            appraise_devices([replace(FULL, **changes)], DevicePolicy(), now=NOW)
    naive = replace(FULL, ocsp_produced="2026-11-20T00:00:00")
    assert outcomes(naive, DevicePolicy())["gpu.0.ocsp_age"] is Outcome.PASS


def parse(**members: object) -> tuple[DevicePolicy, list[str]]:
    unsafe: list[str] = []
    section = Section(members, where="[gpu]")
    policy = parse_device_policy(section, unsafe)
    section.finish()
    return policy, unsafe


def test_members() -> None:
    assert parse() == (DevicePolicy(), [])
    assert parse(ocsp_max_age_h=3) == (DevicePolicy(ocsp_max_age_h=3), [])
    assert parse(unsafe_without_rim=True, unsafe_without_ocsp=True) == (
        LOOSE, ["gpu.unsafe_without_rim", "gpu.unsafe_without_ocsp"]
    )  # fmt: skip
    assert parse(unsafe_without_rim=False) == (DevicePolicy(), [])


@pytest.mark.parametrize(
    "members",
    [
        {"ocsp_max_age_h": 0}, {"ocsp_max_age_h": MAX_OCSP_AGE_H + 1}, {"ocsp_max_age_h": "24"},
        {"unsafe_without_rim": "yes"}, {"unsafe_without_ocsp": 1}, {"without_rim": True},
        {"unsafe_without_ocsp": True, "ocsp_max_age_h": 3},
    ],
)  # fmt: skip
def test_bad_members(members: dict[str, object]) -> None:
    with pytest.raises(SettingError):
        parse(**members)
