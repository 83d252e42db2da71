"""Layer 2 of every decision: ``policy.toml``, which guest its owner wants (docs/spec-policy.md).

The same file serves the key broker, the gateway and ``cai verify``. It is safe by default: what is
not named is not accepted, nothing is a wildcard unless a member called ``unsafe_…`` says so, and
those members are listed in every verdict. A misspelt member is an error.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, replace
from datetime import datetime
from hashlib import sha256

from cai.attest.facts import Facts
from cai.attest.gpu.policy import appraise_devices
from cai.attest.policy_tables import (
    GPU_FACTS,
    GpuPolicy,
    GuestPolicy,
    Profile,
    parse_gpu,
    parse_guest,
)
from cai.attest.policy_tdx import TdxPolicy, parse_tdx
from cai.attest.policy_tdx_checks import tdx_checks
from cai.attest.policy_values import listed, optional
from cai.attest.reference import Measurements, gpu_count, measurements_of, policy_text
from cai.attest.tdx.eventlog import launched
from cai.attest.verdict import Check, Verdict, check, not_asked
from cai.errors import FormatError, LimitExceeded, SettingError
from cai.settings import MAX_SETTINGS_FILE, Section

__all__ = ["Profile", "VerificationPolicy", "policy_for", "policy_from"]

VERSION = 1
"""Version of the policy format."""

RISK_OPERATED = (
    "guest profile 'operated': an administrator of the host's operator has root in the guest; the"
    " evidence protects against hypervisor, storage and network, not against that administrator,"
    " and confidential-computing facts of the GPU are his word"
)


@dataclass(frozen=True, slots=True)
class VerificationPolicy:
    """A parsed ``policy.toml``.

    Attributes:
        digest: SHA-256 of the exact bytes, hex; verdicts and tickets name the policy by it.
        profile: the guest profile that is accepted.
        tdx: demands on the quote.
        gpu: demands on the devices.
        guest: demands on what the guest says of itself.
        unsafe: the loosenings in force, e.g. ``tdx.unsafe_any_rtmr3``.
    """

    digest: str
    profile: Profile
    tdx: TdxPolicy
    gpu: GpuPolicy
    guest: GuestPolicy
    unsafe: tuple[str, ...]

    @classmethod
    def parse(cls, data: bytes, *, where: str) -> VerificationPolicy:
        """Parse a policy strictly.

        Args:
            data: the exact bytes of the file.
            where: names it in errors.

        Raises:
            LimitExceeded: longer than ``MAX_SETTINGS_FILE``.
            FormatError: not UTF-8 or not TOML.
            SettingError: a member is missing, unknown, or out of its range.
        """
        section = Section(_toml(data, where), where=where)
        section.integer("version", least=VERSION, most=VERSION, unit="(the format's version)")
        unsafe: list[str] = []
        policy = cls(
            digest=sha256(data).hexdigest(),
            profile=_profile(section),
            tdx=parse_tdx(_table(section, "tdx"), unsafe),
            gpu=parse_gpu(_table(section, "gpu"), unsafe),
            guest=parse_guest(_table(section, "guest"), unsafe),
            unsafe=(),
        )
        section.finish()
        return cls(policy.digest, policy.profile, policy.tdx, policy.gpu, policy.guest,
                   tuple(unsafe))  # fmt: skip

    @property
    def residual_risks(self) -> tuple[str, ...]:
        """What a guest that passes this policy is still not protected from."""
        risks = [RISK_OPERATED] if self.profile is Profile.OPERATED else []
        return (*risks, *self.tdx.residual_risks)

    def appraise(self, facts: Facts, *, now: datetime) -> tuple[Check, ...]:
        """Compare verified facts with every demand (spec-policy §3).

        Args:
            facts: of a guest.
            now: time of the appraisal, timezone-aware; ages and dated exceptions count from it.
        """
        return (
            *tdx_checks(self.tdx, facts, self.guest.launch_digest, now),
            *self._gpu_checks(facts, now),
            *self._guest_checks(facts),
        )

    def apply(self, verdict: Verdict, facts: Facts, *, now: datetime) -> Verdict:
        """``verdict`` with this policy's checks, loosenings and residual risks."""
        return verdict.extended(
            self.appraise(facts, now=now),
            unsafe=tuple(dict.fromkeys((*verdict.unsafe, *self.unsafe))),
            residual_risks=tuple(dict.fromkeys((*verdict.residual_risks, *self.residual_risks))),
        )

    def _gpu_checks(self, facts: Facts, now: datetime) -> list[Check]:
        # (6) Exact number of verified GPUs; switches come only with a verified system of eight.
        count = gpu_count(facts)
        if self.gpu.count is None:
            checks = [not_asked("gpu.count", count)]
        else:
            checks = [
                check("gpu.count", passed=count == self.gpu.count, observed=count,
                      expected=self.gpu.count, reason="the policy demands another number of GPUs")
            ]  # fmt: skip
        # (7) Each device: architecture, driver, VBIOS.
        for place, device in enumerate(facts.devices):
            name = f"gpu.{place}"
            if device.is_switch:
                checks += [
                    not_asked(f"{name}.architecture", device.arch, "a switch"),
                    not_asked(f"{name}.driver_version", None, "a switch"),
                ]
            else:
                checks += [
                    listed(f"{name}.architecture", device.arch, self.gpu.architectures,
                           "this architecture is not accepted"),
                    optional(f"{name}.driver_version", device.driver_version,
                             self.gpu.driver_versions),
                ]  # fmt: skip
            checks.append(
                optional(f"{name}.vbios_version", device.vbios_version, self.gpu.vbios_versions)
            )
        # (8) Reference measurements and revocation.
        return [*checks, *appraise_devices(facts.devices, self.gpu.devices, now=now)]

    def _guest_checks(self, facts: Facts) -> list[Check]:
        # (9) What was launched: the guest's statement says it, or a measured event.
        stated = facts.launch_digest or self._measured_launch(facts)
        checks = [
            listed("guest.launch_digest", stated, self.guest.launch_digest,
                   "another launch configuration" if stated else "the guest gave no statement")
        ]  # fmt: skip
        if not self.guest.asked:
            checks.append(not_asked("guest.profile", facts.guest.get("profile")))
            return checks
        # (10) Profile, and who started the guest's services.
        checks.append(_fact(facts, "profile", self.profile.value))
        if self.profile is Profile.SEALED:
            checks.append(_fact(facts, "launched_by", "launcher"))
        # (11) GPU facts that only the measured guest can state.
        if facts.devices:
            demanded = {"count": str(gpu_count(facts)), **GPU_FACTS, **self.guest.facts}
        else:
            demanded = dict(self.guest.facts)
        checks += [_fact(facts, name, value) for name, value in sorted(demanded.items())]
        return checks

    def _measured_launch(self, facts: Facts) -> str:
        events = facts.runtime_events
        return (launched(events) or "") if self.tdx.rtmr3_events and events is not None else ""


def policy_for(
    facts: Facts,
    *,
    profile: Profile | str | None = None,
    launch_digest: str | None = None,
    rtmr3_events: bool = False,
) -> bytes:
    """A ``policy.toml`` that accepts exactly the guest these facts are of, and nothing else.

    Args:
        facts: of a guest whose evidence was verified.
        profile: the guest profile; by default the one that the guest states.
        launch_digest: by default the one that the guest states.
        rtmr3_events: judge RTMR3 by the launch and ready events and not by its value.

    Raises:
        SettingError: the facts hold no profile or launch digest and none is given.
    """
    measurements = measurements_of(
        facts, profile=None if profile is None else str(profile), launch_digest=launch_digest
    )
    return policy_from(replace(measurements, rtmr3_events=rtmr3_events))


def policy_from(measurements: Measurements) -> bytes:
    """A ``policy.toml`` that accepts exactly these measurements, and nothing else.

    Raises:
        SettingError: a value is none that a policy can name.
    """
    data = policy_text(measurements).encode("utf-8")
    VerificationPolicy.parse(data, where="written policy")
    return data


def _toml(data: bytes, where: str) -> dict[str, object]:
    if len(data) > MAX_SETTINGS_FILE:
        raise LimitExceeded(f"{where}: {len(data)} bytes, at most {MAX_SETTINGS_FILE} are accepted")
    try:
        return tomllib.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise FormatError(f"{where}: not UTF-8") from error
    except (tomllib.TOMLDecodeError, ValueError) as error:
        raise FormatError(f"{where}: not TOML ({error})") from error
    except RecursionError as error:
        raise FormatError(f"{where}: nested too deeply") from error


def _table(section: Section, name: str) -> Section:
    inner = section.section(name)
    if inner is None:
        raise SettingError(f"{section.where}: table [{name}] is missing")
    return inner


def _profile(section: Section) -> Profile:
    text = section.text("profile")
    if text not in list(Profile):
        raise SettingError(
            f"{section.where}: profile {text!r} is unknown", hint="known are: sealed, operated"
        )
    return Profile(text)


def _fact(facts: Facts, name: str, expected: str) -> Check:
    observed = facts.guest.get(name)
    return check(
        f"guest.{name}",
        passed=observed == expected,
        observed="absent" if observed is None else observed,
        expected=expected,
        reason="the guest does not state this" if observed is None else "the guest states another",
    )
