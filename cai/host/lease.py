"""Keeping a lease: renew early, and say clearly when it has ended (decisions §5).

A renewal is the whole handshake again. It is tried when one third of the lease has passed, with
jitter. A broker that refuses ends the lease at once; one that cannot be reached, or cannot decide
now, is tried again until the lease runs out by the guest's own clock, which counts suspension.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from cai.errors import CaiError, PeerError, Refused, Unauthenticated
from cai.host.agent import now
from cai.host.release import Release

RENEW_FRACTION = 3
"""A lease is renewed when one third of its lifetime has passed (decisions §5)."""

RETRY_S = 5.0
"""Pause after a renewal that the broker did not decide, seconds."""

SOON_S = 1.0
"""Least time between a lease and a renewal that somebody asks for, seconds."""

LOOK_S = 5.0
"""How long at most a sleep goes on without a look at the clock that counts suspension, seconds."""

MAX_DRAIN_S = 300
"""Longest time in which running requests may end, seconds (decisions §5)."""

log = logging.getLogger("cai.host")

Fetch = Callable[[Release], Awaitable[Release]]
"""Attests again and renews the lease of this release."""


@dataclass(frozen=True, slots=True)
class Withdrawal:
    """Why nothing new may start, and until when the rest may run.

    Attributes:
        error: the refusal, or that the lease ran out.
        ends_at: when the mount goes, seconds since boot.
    """

    error: CaiError
    ends_at: float


class LeaseKeeper:
    """Renews one lease until it ends.

    Args:
        release: as it was fetched first.
        fetch: renews it.
        renewed: called with each renewed release.
        clock: seconds since boot.
    """

    def __init__(
        self,
        release: Release,
        fetch: Fetch,
        renewed: Callable[[Release], None],
        *,
        clock: Callable[[], float] = now,
    ) -> None:
        self._release = release
        self._fetch = fetch
        self._renewed = renewed
        self._clock = clock
        self._asked = asyncio.Event()

    def renew_soon(self) -> None:
        """Renew now, or as soon as the last lease is ``SOON_S`` old."""
        self._asked.set()

    async def run(self) -> Withdrawal:
        """Renew until the broker refuses or the lease runs out."""
        try_at = self._next()
        while True:
            await self._wait(min(try_at, self._expires))
            left = self._expires - self._clock()
            if left <= 0:
                return self._withdrawal(_expired())
            try:
                renewed = await asyncio.wait_for(self._fetch(self._release), left)
            except TimeoutError:
                return self._withdrawal(_expired())
            except (PeerError, Unauthenticated) as error:
                # Nobody decided: no answer, a broker in trouble, or a session that went with it.
                log.warning("renewal failed, %.0f s of the lease are left: %s", left, error)
                try_at = self._clock() + RETRY_S * random.uniform(0.8, 1.2)  # noqa: S311
                continue
            except CaiError as error:
                return self._withdrawal(error)
            self._release = renewed
            self._renewed(renewed)
            try_at = self._next()

    async def _wait(self, moment: float) -> None:
        """Sleep until a moment, or until somebody asks for a renewal."""
        least = self._release.sent_at + SOON_S
        while (left := moment - self._clock()) > 0:
            if self._asked.is_set():
                left = min(left, least - self._clock())
                if left <= 0:
                    break
                await asyncio.sleep(min(left, LOOK_S))
                continue
            # The event loop's own clock stands still while the guest is suspended.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._asked.wait(), min(left, LOOK_S))
        self._asked.clear()

    @property
    def _expires(self) -> float:
        return self._release.expires_at

    def _next(self) -> float:
        # Jitter keeps a fleet that was started at once from renewing at once.
        share = self._release.ttl_s / RENEW_FRACTION * random.uniform(0.9, 1.0)  # noqa: S311
        return self._release.sent_at + share

    def _withdrawal(self, error: CaiError) -> Withdrawal:
        drain = min(self._release.drain_s, MAX_DRAIN_S)
        # Never later than the lease's own end, also when the guest slept over it.
        ends_at = min(self._clock(), self._expires) + drain
        log.warning("the lease has ended, running requests have %d s: %s", drain, error)
        return Withdrawal(error, ends_at)


async def sleep_until(moment: float, clock: Callable[[], float] = now) -> None:
    """Sleep until a moment since boot.

    The event loop's own clock stands still while the guest is suspended, so this looks often.
    """
    while (left := moment - clock()) > 0:  # noqa: ASYNC110 - nobody sets an event when time passes
        await asyncio.sleep(min(left, LOOK_S))


def _expired() -> Refused:
    return Refused(
        "the lease has ended and the key broker could not be asked to renew it",
        hint="check TRUSTEE_URL; the host starts again once the broker answers",
        code="lease-expired",
    )
