"""Layer 2 of every decision: ``policy.toml``, which guest its owner wants (docs/spec-policy.md).

The same file serves the key broker, the gateway and ``cai verify``. It is safe by default: what is
not named is not accepted, nothing is a wildcard unless a member called ``unsafe_…`` says so, and
those members are listed in every verdict. A misspelt member is an error.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256

from cai.attest.facts import Facts
from cai.attest.policy_tables import (
    ALL_MEASUREMENTS,
    GPU_FACTS,
    GpuPolicy,
    GuestPolicy,
    Profile,
    TdxPolicy,
    parse_gpu,
    parse_guest,
    parse_tdx,
)
from cai.attest.verdict import Check, Verdict, check, not_asked
from cai.errors import FormatError, LimitExceeded, SettingError
from cai.settings import MAX_SETTINGS_FILE, Section

__all__ = ["Profile", "VerificationPolicy", "policy_for"]

VERSION = 1
"""Version of the policy format."""

RISK_OPERATED = (
    "guest profile 'operated': an administrator of the host's operator has root in the guest; the"
    " evidence protects against hypervisor, storage and network, not against that administrator,"
    " and confidential-computing facts of the GPU are his word"
)
RISK_RTMR3 = "any runtime event is accepted (unsafe_any_rtmr3): what was started is not measured"


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
        if self.tdx.allowed["rtmr3"] is None:
            risks.append(RISK_RTMR3)
        return tuple(risks)

    def appraise(self, facts: Facts) -> tuple[Check, ...]:
        """Compare verified facts with every demand (spec-policy §3)."""
        return (*self._tdx_checks(facts), *self._gpu_checks(facts), *self._guest_checks(facts))

    def apply(self, verdict: Verdict, facts: Facts) -> Verdict:
        """``verdict`` with this policy's checks, loosenings and residual risks."""
        return verdict.extended(
            self.appraise(facts),
            unsafe=tuple(dict.fromkeys((*verdict.unsafe, *self.unsafe))),
            residual_risks=tuple(dict.fromkeys((*verdict.residual_risks, *self.residual_risks))),
        )

    def _tdx_checks(self, facts: Facts) -> list[Check]:
        tdx, policy = facts.tdx, self.tdx
        # (1) Measurements and host-chosen identities, each exactly one of the listed values.
        fields = {name: field for name, (field, *_) in ALL_MEASUREMENTS.items()}
        checks = [
            _listed(f"tdx.{name}", tdx.body[field], policy.allowed[name], "another guest")
            for name, field in fields.items()
        ]
        # (2) Status of platform, module and quoting enclave; Intel's advisories.
        reason = "Intel's status of this platform"
        checks.append(_listed("tdx.tcb_status", tdx.tcb_status, policy.tcb_status, reason))
        denied = sorted(set(tdx.advisory_ids) & set(policy.advisories_denied))
        observed = ", ".join(tdx.advisory_ids) or "none"
        if policy.advisories_denied:
            checks.append(
                check("tdx.advisories", passed=not denied, observed=observed,
                      expected=f"none of {', '.join(policy.advisories_denied)}",
                      reason=f"denied: {', '.join(denied)}")
            )  # fmt: skip
        else:
            checks.append(not_asked("tdx.advisories", observed))
        # (3) Age of the TCB information.
        least = policy.min_eval_data_number
        if least:
            checks.append(
                check("tdx.eval_data_number", passed=tdx.eval_data_number >= least,
                      observed=tdx.eval_data_number, expected=f"at least {least}",
                      reason="the TCB information is of an old generation")
            )  # fmt: skip
        else:
            checks.append(not_asked("tdx.eval_data_number", tdx.eval_data_number))
        # (4) TDX module build and machine, where the owner lists them.
        checks.append(_optional("tdx.mr_seam", tdx.body["mr_seam"], policy.mr_seam))
        checks.append(_optional("tdx.ppid", tdx.ppid, policy.ppid))
        return checks

    def _gpu_checks(self, facts: Facts) -> list[Check]:
        # (5) Exact number of verified devices.
        count = len(facts.devices)
        if self.gpu.count is None:
            checks = [not_asked("gpu.count", count)]
        else:
            checks = [
                check("gpu.count", passed=count == self.gpu.count, observed=count,
                      expected=self.gpu.count, reason="the policy demands another number of GPUs")
            ]  # fmt: skip
        # (6) Each device: architecture, driver, VBIOS.
        for place, device in enumerate(facts.devices):
            name = f"gpu.{place}"
            checks += [
                _listed(f"{name}.architecture", device.arch, self.gpu.architectures,
                        "this architecture is not accepted"),
                _optional(f"{name}.driver_version", device.driver_version,
                          self.gpu.driver_versions),
                _optional(f"{name}.vbios_version", device.vbios_version, self.gpu.vbios_versions),
            ]  # fmt: skip
        return checks

    def _guest_checks(self, facts: Facts) -> list[Check]:
        # (7) What was launched.
        checks = [
            _listed("guest.launch_digest", facts.launch_digest, self.guest.launch_digest,
                    "another launch configuration" if facts.launch_digest else
                    "the guest gave no statement")
        ]  # fmt: skip
        if not self.guest.asked:
            checks.append(not_asked("guest.profile", facts.guest.get("profile")))
            return checks
        # (8) Profile, and who started the guest's services.
        checks.append(_fact(facts, "profile", self.profile.value))
        if self.profile is Profile.SEALED:
            checks.append(_fact(facts, "launched_by", "launcher"))
        # (9) GPU facts that only the measured guest can state.
        if facts.devices:
            demanded = {"count": str(len(facts.devices)), **GPU_FACTS, **self.guest.facts}
        else:
            demanded = dict(self.guest.facts)
        checks += [_fact(facts, name, value) for name, value in sorted(demanded.items())]
        return checks


def policy_for(
    facts: Facts,
    *,
    profile: Profile | str | None = None,
    launch_digest: str | None = None,
) -> bytes:
    """A ``policy.toml`` that accepts exactly the guest these facts are of, and nothing else.

    Args:
        facts: of a guest whose evidence was verified.
        profile: the guest profile; by default the one that the guest states.
        launch_digest: by default the one that the guest states.

    Raises:
        SettingError: the facts hold no profile or launch digest and none is given.
    """
    stated = str(profile or facts.guest.get("profile", ""))
    if stated not in list(Profile):
        raise SettingError(
            f"no guest profile to write into a policy: {stated!r}",
            hint="give the profile: sealed or operated",
        )
    digest = launch_digest or facts.launch_digest
    if not digest:
        raise SettingError("no launch digest to write into a policy", hint="give the launch digest")
    body = facts.tdx.body
    lines = [
        "# Accepts exactly the guest whose evidence it was written from.",
        f"version = {VERSION}",
        f"profile = {_quoted(stated)}",
        "",
        "[tdx]",
        *(f"{name} = [{_quoted(body[field])}]" for name, (field, _) in ALL_MEASUREMENTS.items()),
        f"tcb_status = [{_quoted('UpToDate')}]",
        "",
        "[gpu]",
        f"count = {len(facts.devices)}",
        f"architectures = {_array(device.arch for device in facts.devices)}",
        f"driver_versions = {_array(device.driver_version for device in facts.devices)}",
        f"vbios_versions = {_array(device.vbios_version for device in facts.devices)}",
        "",
        "[guest]",
        f"launch_digest = [{_quoted(digest)}]",
        "",
    ]
    data = "\n".join(lines).encode("utf-8")
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


def _listed(
    name: str, observed: str, allowed: tuple[str, ...] | None, reason: str
) -> Check:
    if allowed is None:
        return not_asked(name, observed, "any value is accepted")
    return check(name, passed=observed in allowed, observed=observed or "absent",
                 expected=" or ".join(allowed), reason=reason)  # fmt: skip


def _optional(name: str, observed: str, allowed: tuple[str, ...]) -> Check:
    if not allowed:
        return not_asked(name, observed)
    return _listed(name, observed, allowed, "not among the listed values")


def _fact(facts: Facts, name: str, expected: str) -> Check:
    observed = facts.guest.get(name)
    return check(
        f"guest.{name}",
        passed=observed == expected,
        observed="absent" if observed is None else observed,
        expected=expected,
        reason="the guest does not state this" if observed is None else "the guest states another",
    )


def _quoted(text: str) -> str:
    """A TOML basic string; all values here are hex, versions or known words."""
    if not text.isascii() or any(char in '"\\' or not char.isprintable() for char in text):
        raise SettingError(f"no policy can name {text[:100]!r}")
    return f'"{text}"'


def _array(values: Iterable[str]) -> str:
    return "[" + ", ".join(_quoted(value) for value in sorted(set(values))) + "]"
