"""Settings of policies: how much a Rego evaluation may take, how long reference values live."""

from __future__ import annotations

from dataclasses import dataclass

from cai.settings import Section


@dataclass(frozen=True, slots=True)
class PolicySettings:
    """The table ``[policy]``.

    Attributes:
        workers: most Rego evaluations at once; each has a process of its own.
        time_limit_s: wall clock of one evaluation, seconds; beyond it the process is killed.
        wait_limit_s: how long a request waits for a free process, seconds.
        memory_limit_mib: memory that one process may use, MiB; beyond it the process is killed.
        reference_days: life of reference values that come without an expiry, days.
        require_signed_references: refuse values that no registered key signed.
        unsafe_rego_only: an attestation policy may stand in for a missing ``policy.toml``.
    """

    workers: int = 2
    time_limit_s: int = 5
    wait_limit_s: int = 20
    memory_limit_mib: int = 512
    reference_days: int = 365
    require_signed_references: bool = False
    unsafe_rego_only: bool = False

    @classmethod
    def from_table(cls, section: Section | None) -> PolicySettings:
        """Read the table; a missing one or a missing member has its default.

        Raises:
            SettingError: a member is unknown or out of its range.
        """
        default = cls()
        if section is None:
            return default
        found = cls(
            workers=section.integer("workers", default.workers, least=1, most=64, unit="processes"),
            time_limit_s=section.integer(
                "time_limit_s", default.time_limit_s, least=1, most=60, unit="seconds"
            ),
            wait_limit_s=section.integer(
                "wait_limit_s", default.wait_limit_s, least=1, most=120, unit="seconds"
            ),
            memory_limit_mib=section.integer(
                "memory_limit_mib", default.memory_limit_mib, least=128, most=8192, unit="MiB"
            ),
            reference_days=section.integer(
                "reference_days", default.reference_days, least=1, most=3650, unit="days"
            ),
            require_signed_references=section.flag("require_signed_references", default=False),
            unsafe_rego_only=section.flag("unsafe_rego_only", default=False),
        )
        section.finish()
        return found

    @property
    def unsafe(self) -> tuple[str, ...]:
        """Names of the loosenings in force."""
        return ("policy.unsafe_rego_only",) if self.unsafe_rego_only else ()
