"""One quote at a time, the urgent ones first; many sessions under one quote.

A TDX quote takes tens of milliseconds and the hardware makes them one after another. Release quotes
go before channel quotes; sessions that wait while a channel quote is in flight form the next batch
and share one quote through a Merkle tree (decisions §4, batching).
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import IntEnum

from cai import merkle
from cai.attest.channel import ChannelEvidence
from cai.attest.evidence import Evidence, QuoteSource
from cai.errors import CaiError, Refused

MAX_BATCH = 4096
"""Most leaves of one session tree."""

MAX_WAITING_LEAVES = 4096
"""Most sessions that may wait for the next quote; the newest beyond it is refused."""


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
    """A session tree's root under a quote."""

    statement: bytes
    evidence: Evidence


SignTree = Callable[[bytes, int], Awaitable[SignedTree]]
"""Makes statement and quote for a session root and tree size."""


class SessionBatcher:
    """Collects waiting leaves into one tree per quote.

    Args:
        sign: makes statement and quote for a root.
    """

    def __init__(self, sign: SignTree) -> None:
        self._sign = sign
        self._forming: list[tuple[bytes, asyncio.Future[ChannelEvidence]]] = []
        self._worker: asyncio.Task[None] | None = None

    async def prove(self, leaf: bytes) -> ChannelEvidence:
        """Evidence whose tree holds this leaf hash.

        Raises:
            Refused: too many sessions wait, or the guest may not prove now.
        """
        if len(self._forming) >= MAX_WAITING_LEAVES:
            raise Refused(f"{MAX_WAITING_LEAVES} sessions already wait for a quote")
        proof: asyncio.Future[ChannelEvidence] = asyncio.get_running_loop().create_future()
        self._forming.append((leaf, proof))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await proof

    async def _work(self) -> None:
        while self._forming:
            batch, self._forming = self._forming[:MAX_BATCH], self._forming[MAX_BATCH:]
            # Who gave up waiting costs no place in the tree.
            batch = [item for item in batch if not item[1].done()]
            if not batch:
                continue
            leaves = [leaf for leaf, _proof in batch]
            try:
                signed = await self._sign(merkle.root(leaves), len(leaves))
            except CaiError as error:
                _fail(batch, error)
                continue
            except Exception:
                _fail(batch, CaiError("the quote could not be made"))
                raise
            for index, (_leaf, proof) in enumerate(batch):
                if not proof.done():
                    path = tuple(merkle.inclusion_path(leaves, index))
                    proof.set_result(
                        ChannelEvidence(signed.statement, signed.evidence, index, path)
                    )


def _fail(
    batch: list[tuple[bytes, asyncio.Future[ChannelEvidence]]], error: CaiError
) -> None:
    for _leaf, proof in batch:
        if not proof.done():
            proof.set_exception(error)
