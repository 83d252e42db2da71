"""What a policy may ask of verified devices beyond their count and versions (spec-policy §2).

Layer 1 refuses devices whose reference measurements differ or whose certificates are revoked. That
reference files and revocation answers were there at all is asked here, because facts outlive the
verification: a broker appraises them again at each request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cai.attest.facts import DeviceFacts
from cai.attest.verdict import Check, check, not_asked
from cai.errors import FormatError, SettingError
from cai.settings import Section

DEFAULT_OCSP_AGE_H = 24
"""Greatest age of a revocation answer that a policy accepts unless it says otherwise, hours."""

MAX_OCSP_AGE_H = 30 * 24
"""Greatest age that a policy can accept, hours."""

CLOCK_SKEW = timedelta(minutes=5)
"""How far ahead of the appraiser's clock an answer may have been produced."""


@dataclass(frozen=True, slots=True)
class DevicePolicy:
    """Members of table ``[gpu]`` about reference measurements and revocation.

    Attributes:
        rim_required: measurements must have been compared with NVIDIA's reference values.
        ocsp_max_age_h: greatest age of the oldest revocation answer, hours; ``None`` does not ask.
    """

    rim_required: bool = True
    ocsp_max_age_h: int | None = DEFAULT_OCSP_AGE_H


def parse_device_policy(section: Section, unsafe: list[str]) -> DevicePolicy:
    """Read these members of ``[gpu]``; the caller finishes the section.

    Args:
        section: the table.
        unsafe: loosenings in force are appended.

    Raises:
        SettingError: a member is contradictory or out of its range.
    """
    without_rim = section.flag("unsafe_without_rim", default=False)
    without_ocsp = section.flag("unsafe_without_ocsp", default=False)
    if without_ocsp and section.has("ocsp_max_age_h"):
        raise SettingError(f"{section.where}: ocsp_max_age_h and unsafe_without_ocsp contradict")
    age = section.integer(
        "ocsp_max_age_h", DEFAULT_OCSP_AGE_H, least=1, most=MAX_OCSP_AGE_H, unit="hours"
    )
    unsafe += ["gpu.unsafe_without_rim"] * without_rim
    unsafe += ["gpu.unsafe_without_ocsp"] * without_ocsp
    return DevicePolicy(not without_rim, None if without_ocsp else age)


def appraise_devices(
    devices: Sequence[DeviceFacts], policy: DevicePolicy, *, now: datetime
) -> list[Check]:
    """Compare verified devices with these demands.

    Args:
        devices: facts in the order of the evidence.
        policy: the demands.
        now: time of the appraisal, timezone-aware.

    Returns:
        Per device ``gpu.n.rim_compared`` and ``gpu.n.ocsp_age``.
    """
    return [
        item
        for place, device in enumerate(devices)
        for item in (
            _rim(f"gpu.{place}.rim_compared", device, policy, now),
            _ocsp(f"gpu.{place}.ocsp_age", device, policy, now),
        )
    ]


def _rim(name: str, device: DeviceFacts, policy: DevicePolicy, now: datetime) -> Check:
    observed = ", ".join(f"{role} {digest}" for role, digest in sorted(device.rims.items()))
    if not policy.rim_required:
        return not_asked(name, observed or "none", "the policy does not ask (unsafe_without_rim)")
    expires = _time(device.rim_expires)
    reason = "measurements were not compared with NVIDIA's reference values"
    if device.rims:
        reason = "the reference values have expired since"
    return check(
        name, passed=bool(device.rims) and expires is not None and now <= expires,
        observed=observed or "none", expected="reference measurements (RIM)", reason=reason,
    )  # fmt: skip


def _ocsp(name: str, device: DeviceFacts, policy: DevicePolicy, now: datetime) -> Check:
    produced = _time(device.ocsp_produced)
    observed = device.ocsp_produced or "none"
    if policy.ocsp_max_age_h is None:
        return not_asked(name, observed, "the policy does not ask (unsafe_without_ocsp)")
    limit = timedelta(hours=policy.ocsp_max_age_h)
    reason = "revocation of the device's certificates was not asked"
    if produced is not None:
        reason = "the revocation answers are too old"
    return check(
        name,
        passed=produced is not None and -CLOCK_SKEW <= now - produced <= limit,
        observed=observed,
        expected=f"answers at most {policy.ocsp_max_age_h} hours old",
        reason=reason,
    )


def _time(text: str) -> datetime | None:
    if not text:
        return None
    try:
        value = datetime.fromisoformat(text)
    except ValueError as error:
        raise FormatError(f"facts: {text[:40]!r} is not a time") from error
    return value if value.tzinfo else value.replace(tzinfo=UTC)
