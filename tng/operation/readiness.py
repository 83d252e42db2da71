"""Whether a gateway can serve now: its listeners, its own evidence, its backends.

An ingress is ready when it listens: whether a peer proves itself depends on who is asked for. An
egress is ready when it can prove itself and a backend of each of its ports accepts a connection.
Answers are kept for a moment, so that probes from outside cost the agent no quote each.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from cai.errors import CaiError, PeerUnreachable
from tng.config.addresses import Upstream
from tng.egress.upstreams import connect_upstream
from tng.streams import Backend

BACKEND_KEPT_S = 5.0
"""How long it is believed that a backend answers, or that it does not, seconds."""

EVIDENCE_KEPT_S = 60.0
"""How long it is believed that the agent proves, seconds; a quote costs it some work."""

EVIDENCE_FAILED_KEPT_S = 5.0
"""How long it is believed that it does not, seconds."""

Probe = Callable[[], Awaitable[None]]
"""Raises a ``CaiError`` that says what is missing."""


@dataclass
class _Watched:
    what: str
    probe: Probe
    kept_s: float
    failed_kept_s: float
    reason: str = ""
    until: float = 0.0
    asking: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def missing(self) -> str:
        async with self.asking:
            if time.monotonic() >= self.until:
                try:
                    await self.probe()
                    self.reason = ""
                except CaiError as error:
                    self.reason = f"{self.what}: {error.message}"
                kept = self.failed_kept_s if self.reason else self.kept_s
                self.until = time.monotonic() + kept
            return self.reason


class Readiness:
    """Asks everything that a gateway needs to serve.

    Args:
        leaving: whether it takes no work any more.
    """

    def __init__(self, leaving: Callable[[], bool]) -> None:
        self._leaving = leaving
        self._watched: list[_Watched] = []

    def needs_backend(self, name: str, targets: Sequence[Upstream]) -> None:
        """One of these must accept a connection."""

        async def answers() -> None:
            last: PeerUnreachable | None = None
            for target in targets:
                try:
                    _reader, writer = await connect_upstream(target)
                except PeerUnreachable as error:
                    last = error
                else:
                    writer.transport.abort()
                    return
            if last is not None:
                raise last

        self._watched.append(_Watched(name, answers, BACKEND_KEPT_S, BACKEND_KEPT_S))

    def needs_health(self, name: str, backend: Backend) -> None:
        """One of its upstreams must have passed its last health check."""

        async def lives() -> None:
            if not backend.ready:
                raise PeerUnreachable("no backend passes its health check")

        self._watched.append(_Watched(name, lives, 0.0, 0.0))

    def needs_evidence(self, name: str, probe: Probe) -> None:
        """The agent must prove."""
        self._watched.append(_Watched(name, probe, EVIDENCE_KEPT_S, EVIDENCE_FAILED_KEPT_S))

    async def missing(self) -> tuple[str, ...]:
        """What is missing; empty when the gateway is ready."""
        if self._leaving():
            return ("the gateway is stopping",)
        found = await asyncio.gather(*(item.missing() for item in self._watched))
        return tuple(dict.fromkeys(reason for reason in found if reason))


def random_leaf() -> bytes:
    """The leaf of no session: what it proves is only that the agent proves."""
    return secrets.token_bytes(32)
