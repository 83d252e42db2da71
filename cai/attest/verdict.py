"""The one structure in which every verification answers.

A verdict lists each check by name with its outcome, what was observed and what was expected. It is
printed by the command line, stored in the audit log and carried in tokens, so that a refusal
always says which check failed. Raising is the default (``Verdict.require``); reading the list is
the option.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from cai.errors import EvidenceRefused


class Outcome(StrEnum):
    """How a check ended."""

    PASS = "pass"  # noqa: S105 - an outcome, not a password
    FAIL = "fail"
    NOT_ASKED = "not asked"


class Binding(StrEnum):
    """What the evidence is bound to (decisions §2.4)."""

    SESSION = "session"
    KEY = "key"
    TOKEN = "token"  # noqa: S105 - a kind of binding, not a password
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Check:
    """One named check.

    Attributes:
        name: stable, dotted, e.g. ``tdx.debug``; policies, logs and tests match on it.
        outcome: pass, fail or not asked.
        observed: what the evidence says, as text; digests in lower-case hex.
        expected: what would have passed, as text.
        reason: one line for people, given on failure.
    """

    name: str
    outcome: Outcome
    observed: str | None = None
    expected: str | None = None
    reason: str | None = None

    def to_json(self) -> dict[str, object]:
        """The check without its empty members."""
        body: dict[str, object] = {"name": self.name, "outcome": self.outcome.value}
        for member in ("observed", "expected", "reason"):
            value = getattr(self, member)
            if value is not None:
                body[member] = value
        return body


def check(
    name: str,
    *,
    passed: bool,
    observed: object = None,
    expected: object = None,
    reason: str | None = None,
) -> Check:
    """A check that was made: ``reason`` is kept only when it failed."""
    return Check(
        name,
        Outcome.PASS if passed else Outcome.FAIL,
        None if observed is None else str(observed),
        None if expected is None else str(expected),
        None if passed else reason,
    )


def not_asked(name: str, observed: object = None, reason: str | None = None) -> Check:
    """A check that nobody asked for; what was observed is still shown."""
    return Check(name, Outcome.NOT_ASKED, None if observed is None else str(observed), None, reason)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Every check of one verification.

    Attributes:
        subject: what was verified, e.g. ``"tdx quote"`` or ``"guest at 127.0.0.1:41001"``.
        checks: in the order they were made.
        simulated: some check rests on a simulated root; then nothing here speaks of hardware.
        binding: what the evidence is bound to.
        hardware: identity of the platform as the signatures prove it (FMSPC, PPID, TCB date, …).
        unsafe: names of the ``unsafe_…`` settings in force.
        residual_risks: what no check covers, in plain words.
    """

    subject: str
    checks: tuple[Check, ...]
    simulated: bool = False
    binding: Binding = Binding.NONE
    hardware: Mapping[str, str] = field(default_factory=dict)
    unsafe: tuple[str, ...] = ()
    residual_risks: tuple[str, ...] = ()

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(item for item in self.checks if item.outcome is Outcome.FAIL)

    @property
    def passed(self) -> bool:
        """True when at least one check was made and none failed."""
        made = any(item.outcome is Outcome.PASS for item in self.checks)
        return made and not self.failures

    def require(self) -> Verdict:
        """Return this verdict if it passed.

        Raises:
            EvidenceRefused: naming every failed check, and carrying this verdict.
        """
        if self.passed:
            return self
        if not self.checks:
            raise EvidenceRefused(f"{self.subject}: nothing was checked", verdict=self)
        reasons = "; ".join(
            f"{item.name}: {item.reason or 'observed ' + str(item.observed)}"
            for item in self.failures
        )
        raise EvidenceRefused(
            f"{self.subject} refused: {reasons or 'no check was made'}", verdict=self
        )

    def extended(self, checks: Iterable[Check], **changes: object) -> Verdict:
        """This verdict with further checks at its end, and members changed by name."""
        return replace(self, checks=(*self.checks, *checks), **changes)  # type: ignore[arg-type]

    def to_json(self) -> dict[str, object]:
        """The verdict as the audit log, ``--json`` and services carry it."""
        return {
            "subject": self.subject,
            "verdict": "pass" if self.passed else "fail",
            "simulated": self.simulated,
            "binding": self.binding.value,
            "hardware": dict(self.hardware),
            "unsafe": list(self.unsafe),
            "residual_risks": list(self.residual_risks),
            "checks": [item.to_json() for item in self.checks],
        }
