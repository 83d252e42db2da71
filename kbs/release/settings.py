"""Leases and tickets, as the configuration says it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cai.attest.ticket_form import MAX_DRAIN_S, MAX_TTL_S

if TYPE_CHECKING:
    from cai.settings import Section

TTL_S = 900
"""Lifetime of a lease whose resource does not say, seconds (decisions §5)."""

DRAIN_S = 300
"""Time for running requests after that, seconds (decisions §5)."""

MIN_TTL_S = 10
"""Shortest lifetime, seconds; a renewal needs a quote."""


@dataclass(frozen=True, slots=True)
class ReleaseSettings:
    """The table ``[release]``.

    Attributes:
        lease_ttl_s: lifetime of a lease whose resource does not say, seconds.
        lease_drain_s: time for running requests after that, seconds.
        max_lease_ttl_s: longest lifetime that is granted, whatever a resource says, seconds.
    """

    lease_ttl_s: int = TTL_S
    lease_drain_s: int = DRAIN_S
    max_lease_ttl_s: int = MAX_TTL_S

    @classmethod
    def from_table(cls, section: Section | None) -> ReleaseSettings:
        """Read the table; a missing one or a missing member has its default.

        Raises:
            SettingError: a member is unknown or out of its range.
        """
        if section is None:
            return cls()
        found = cls(
            lease_ttl_s=section.integer(
                "lease_ttl_s", TTL_S, least=MIN_TTL_S, most=MAX_TTL_S, unit="seconds"
            ),
            lease_drain_s=section.integer(
                "lease_drain_s", DRAIN_S, least=0, most=MAX_DRAIN_S, unit="seconds"
            ),
            max_lease_ttl_s=section.integer(
                "max_lease_ttl_s", MAX_TTL_S, least=MIN_TTL_S, most=MAX_TTL_S, unit="seconds"
            ),
        )
        section.finish()
        return found

    def lifetime(self, ttl_s: int | None, drain_s: int | None) -> tuple[int, int]:
        """Lifetime and drain of a lease.

        Args:
            ttl_s: as the resource says it, or ``None``.
            drain_s: likewise.

        Returns:
            Both in seconds, within the limits.
        """
        ttl = self.lease_ttl_s if ttl_s is None else max(ttl_s, MIN_TTL_S)
        drain = self.lease_drain_s if drain_s is None else drain_s
        return min(ttl, self.max_lease_ttl_s), min(drain, MAX_DRAIN_S)
