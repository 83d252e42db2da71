"""One quote at a time, the urgent ones first; many sessions under one quote.

A TDX quote takes tens of milliseconds and the hardware makes them one after another. Release quotes
go before channel quotes; sessions that wait while a channel quote is in flight form the next batch
and share one quote through a Merkle tree (decisions §4, batching).
"""

from __future__ import annotations

import asyncio
import heapq
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import IntEnum
from itertools import islice

from cai import merkle
from cai.attest.agent_client import PROOF_WAIT_S, Busy
from cai.attest.channel import ChannelEvidence
from cai.attest.evidence import Evidence, QuoteSource
from cai.errors import CaiError

MAX_BATCH = 4096
"""Most leaves of one session tree."""

MAX_WAITING_LEAVES = 3072
"""Most new sessions that may wait for the next quote; the newest beyond it is refused."""

MAX_WAITING_RENEWALS = MAX_BATCH - MAX_WAITING_LEAVES
"""Most running sessions that may wait to be proven again; no new session takes their places."""

MAX_WAITING_PER_SOURCE = 512
"""Most new sessions of one source that may wait for the next quote."""


class Urgency(IntEnum):
    """Who is quoted first."""

    RELEASE = 0
    CHANNEL = 1


class QuoteQueue:
    """Serialises the one quoting device.

    Args:
        source: the guest.
    """

    def __init__(self, source: QuoteSource) -> None:
        self._source = source
        self._busy = False
        self._count = 0
        self._waiting: list[tuple[Urgency, int, asyncio.Future[None]]] = []

    async def quote(self, report_data: bytes, urgency: Urgency) -> bytes:
        """A quote over 64 bytes of report data."""
        await self._turn(urgency)
        try:
            return await asyncio.to_thread(self._source.quote, report_data)
        finally:
            self._next()

    async def _turn(self, urgency: Urgency) -> None:
        if not self._busy:
            self._busy = True
            return
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._count += 1
        heapq.heappush(self._waiting, (urgency, self._count, ready))
        try:
            await ready
        except asyncio.CancelledError:
            if ready.done() and not ready.cancelled():
                self._next()
            raise

    def _next(self) -> None:
        while self._waiting:
            _urgency, _count, ready = heapq.heappop(self._waiting)
            if not ready.done():
                ready.set_result(None)
                return
        self._busy = False


@dataclass(frozen=True, slots=True)
class SignedTree:
    """A session tree's root under a quote, and the admission ticket that the statement names."""

    statement: bytes
    evidence: Evidence
    ticket: bytes = b""


SignTree = Callable[[bytes, int], Awaitable[SignedTree]]
"""Makes statement and quote for a session root and tree size."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    leaf: bytes
    proof: asyncio.Future[ChannelEvidence]

    @property
    def over(self) -> bool:
        return self.proof.done()


class SessionBatcher:
    """Collects waiting leaves into one tree per quote.

    One quote is in flight while the next batch forms. Running sessions that are proven again go
    before new ones and have places of their own, so that a flood of new ones cannot end them.

    Args:
        sign: makes statement and quote for a root.
    """

    def __init__(self, sign: SignTree) -> None:
        self._sign = sign
        self._renewals: dict[int, _Waiting] = {}
        self._new: dict[int, _Waiting] = {}
        self._count = 0
        self._sources: Counter[str] = Counter()
        self._worker: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """Leaves that wait for the next quote."""
        return len(self._renewals) + len(self._new)

    async def prove(
        self, leaf: bytes, *, source: str = "", renewal: bool = False
    ) -> ChannelEvidence:
        """Evidence whose tree holds this leaf hash.

        Args:
            leaf: of the session.
            source: for whom; of one source so many new sessions wait and no more.
            renewal: the session runs already.

        Raises:
            Busy: too many sessions wait; the newest is refused.
            Refused: the guest may not prove now, or made no quote within ``PROOF_WAIT_S``.
        """
        queue = self._renewals if renewal else self._new
        self._demand_room(source, renewal=renewal)
        proof: asyncio.Future[ChannelEvidence] = asyncio.get_running_loop().create_future()
        self._count += 1
        place = self._count
        queue[place] = _Waiting(leaf, proof)
        self._sources[source] += not renewal
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        try:
            async with asyncio.timeout(PROOF_WAIT_S):
                return await proof
        except TimeoutError as error:
            raise Busy(f"no quote could be made within {PROOF_WAIT_S:g} s") from error
        finally:
            # Who gave up waiting leaves no leaf behind.
            queue.pop(place, None)
            if not renewal:
                self._sources[source] -= 1
                if not self._sources[source]:
                    del self._sources[source]

    def _demand_room(self, source: str, *, renewal: bool) -> None:
        if renewal:
            if len(self._renewals) >= MAX_WAITING_RENEWALS:
                raise Busy(f"{MAX_WAITING_RENEWALS} running sessions already wait for a quote")
            return
        if len(self._new) >= MAX_WAITING_LEAVES:
            raise Busy(f"{MAX_WAITING_LEAVES} new sessions already wait for a quote")
        if self._sources[source] >= MAX_WAITING_PER_SOURCE:
            raise Busy(f"{MAX_WAITING_PER_SOURCE} sessions of this source already wait")

    async def _work(self) -> None:
        while self._renewals or self._new:
            batch = self._take()
            leaves = [item.leaf for item in batch]
            try:
                signed = await self._sign(merkle.root(leaves), len(leaves))
            except CaiError as error:
                _fail(batch, error)
                continue
            except Exception:
                _fail(batch, CaiError("the quote could not be made"))
                raise
            paths = merkle.inclusion_paths(leaves)
            for index, (item, path) in enumerate(zip(batch, paths, strict=True)):
                if not item.over:
                    item.proof.set_result(
                        ChannelEvidence(
                            signed.statement, signed.evidence, index, path, signed.ticket
                        )
                    )

    def _take(self) -> list[_Waiting]:
        batch: list[_Waiting] = []
        for queue in (self._renewals, self._new):
            places = list(islice(queue, MAX_BATCH - len(batch)))
            batch += [queue.pop(place) for place in places]
        return batch


def _fail(batch: list[_Waiting], error: CaiError) -> None:
    for item in batch:
        if not item.over:
            item.proof.set_exception(error)
