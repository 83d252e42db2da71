"""One quote at a time, releases first; waiting sessions share one quote."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine
from typing import Any

import pytest

from cai import merkle
from cai.attest.channel import ChannelEvidence
from cai.attest.evidence import Evidence
from cai.errors import CaiError, Refused
from cai.host import quoting
from cai.host.quoting import QuoteQueue, SessionBatcher, SignedTree, Urgency


class SlowGuest:
    """A quote source that records its order and refuses to be asked twice at once."""

    simulated = True

    def __init__(self) -> None:
        self.order: list[bytes] = []
        self._lock = threading.Lock()

    def quote(self, report_data: bytes) -> bytes:
        assert self._lock.acquire(blocking=False), "two quotes at once"
        time.sleep(0.02)
        self.order.append(report_data)
        self._lock.release()
        return b"quote " + report_data

    def event_log(self) -> bytes | None:
        return None


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 20))


def test_release_quotes_go_first() -> None:
    guest = SlowGuest()

    async def work() -> None:
        queue = QuoteQueue(guest)
        first = asyncio.create_task(queue.quote(b"0", Urgency.CHANNEL))
        await asyncio.sleep(0)
        rest = [
            asyncio.create_task(queue.quote(name, urgency))
            for name, urgency in (
                (b"c1", Urgency.CHANNEL), (b"c2", Urgency.CHANNEL), (b"r", Urgency.RELEASE)
            )
        ]
        await asyncio.gather(first, *rest)

    run(work())
    assert guest.order == [b"0", b"r", b"c1", b"c2"]


def test_a_caller_who_gave_up_does_not_block_the_queue() -> None:
    guest = SlowGuest()

    async def work() -> bytes:
        queue = QuoteQueue(guest)
        first = asyncio.create_task(queue.quote(b"0", Urgency.CHANNEL))
        await asyncio.sleep(0)
        gone = asyncio.create_task(queue.quote(b"gone", Urgency.CHANNEL))
        await asyncio.sleep(0)
        gone.cancel()
        last = await queue.quote(b"last", Urgency.CHANNEL)
        await first
        return last

    assert run(work()) == b"quote last"
    assert b"gone" not in guest.order


def test_a_failed_quote_frees_the_device() -> None:
    class Failing(SlowGuest):
        def quote(self, report_data: bytes) -> bytes:
            if report_data == b"bad":
                raise CaiError("no quote")
            return super().quote(report_data)

    async def work() -> bytes:
        queue = QuoteQueue(Failing())
        with pytest.raises(CaiError, match="no quote"):
            await queue.quote(b"bad", Urgency.CHANNEL)
        return await queue.quote(b"good", Urgency.CHANNEL)

    assert run(work()) == b"quote good"


class Signer:
    """Signs trees and remembers their sizes."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.sizes: list[int] = []
        self.roots: list[bytes] = []
        self.failure = failure

    async def __call__(self, root: bytes, size: int) -> SignedTree:
        self.sizes.append(size)
        self.roots.append(root)
        await asyncio.sleep(0.02)
        if self.failure is not None:
            raise self.failure
        return SignedTree(b"statement", Evidence(b"quote"))


def leaves(count: int) -> list[bytes]:
    return [merkle.leaf_hash(bytes([number])) for number in range(count)]


def test_sessions_that_wait_share_one_quote() -> None:
    signer = Signer()
    hashes = leaves(6)

    async def work() -> list[ChannelEvidence]:
        batcher = SessionBatcher(signer)
        first = asyncio.create_task(batcher.prove(hashes[0]))
        await asyncio.sleep(0.005)
        return [*await asyncio.gather(first, *(batcher.prove(leaf) for leaf in hashes[1:]))]

    proofs = run(work())
    assert signer.sizes == [1, 5]
    for leaf, proof in zip(hashes[1:], proofs[1:], strict=True):
        reached = merkle.root_from_path(leaf, proof.index, 5, proof.path)
        assert reached == signer.roots[1]


def test_no_quote_is_made_when_nobody_waits() -> None:
    signer = Signer()

    async def work() -> None:
        await SessionBatcher(signer).prove(leaves(1)[0])
        await asyncio.sleep(0.05)

    run(work())
    assert signer.sizes == [1]


def test_a_refusal_reaches_every_session_of_the_batch_and_the_next_batch_is_made() -> None:
    signer = Signer(Refused("stopped"))

    async def work() -> None:
        batcher = SessionBatcher(signer)
        answers = await asyncio.gather(
            *(batcher.prove(leaf) for leaf in leaves(3)), return_exceptions=True
        )
        assert all(isinstance(answer, Refused) for answer in answers)
        signer.failure = None
        assert (await batcher.prove(leaves(1)[0])).index == 0

    run(work())


def test_the_newest_session_is_refused_when_too_many_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quoting, "MAX_WAITING_LEAVES", 2)

    async def work() -> None:
        batcher = SessionBatcher(Signer())
        waiting = [asyncio.create_task(batcher.prove(leaf)) for leaf in leaves(2)]
        # The worker has not started yet: both leaves are still forming.
        for task in waiting:
            assert not task.done()
        await asyncio.sleep(0)
        results = await asyncio.gather(
            *(batcher.prove(leaf) for leaf in leaves(5)), return_exceptions=True
        )
        assert any(isinstance(result, Refused) for result in results)
        await asyncio.gather(*waiting)

    run(work())


def test_a_session_that_gave_up_costs_no_leaf() -> None:
    signer = Signer()

    async def work() -> None:
        batcher = SessionBatcher(signer)
        first = asyncio.create_task(batcher.prove(leaves(1)[0]))
        await asyncio.sleep(0.005)
        gone = asyncio.create_task(batcher.prove(leaves(2)[1]))
        kept = asyncio.create_task(batcher.prove(leaves(3)[2]))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.gather(first, kept)

    run(work())
    assert signer.sizes == [1, 1]
