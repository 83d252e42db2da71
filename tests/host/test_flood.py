"""A flood of new sessions: the newest are refused, running ones still get their quote."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from cai import merkle
from cai.attest.agent_client import Busy, ProofRequest
from cai.attest.channel import ChannelEvidence
from cai.attest.evidence import Evidence
from cai.errors import FormatError
from cai.host import quoting
from cai.host.quoting import SessionBatcher, SignedTree


class Slow:
    """Signs trees when it is told to."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.go = asyncio.Semaphore(0)

    async def __call__(self, _root: bytes, size: int) -> SignedTree:
        self.sizes.append(size)
        await self.go.acquire()
        return SignedTree(b"statement", Evidence(b"quote"), b"ticket")


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 60))


def leaf(number: int) -> bytes:
    return merkle.leaf_hash(number.to_bytes(4))


async def flood(
    batcher: SessionBatcher, count: int, source: str | None = None
) -> list[asyncio.Task[ChannelEvidence]]:
    tasks = [
        asyncio.create_task(batcher.prove(leaf(number), source=source or f"s{number}"))
        for number in range(count)
    ]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return tasks


async def end(tasks: list[asyncio.Task[ChannelEvidence]]) -> int:
    """How many were refused; the rest is given up."""
    refused = 0
    for task in tasks:
        if task.done() and isinstance(task.exception(), Busy):
            refused += 1
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return refused


def test_a_full_flood_leaves_room_for_renewals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quoting, "MAX_WAITING_LEAVES", 100)

    async def work() -> tuple[int, ChannelEvidence, list[int]]:
        slow = Slow()
        batcher = SessionBatcher(slow)
        first = await flood(batcher, 1)
        tasks = await flood(batcher, 150)
        renewal = asyncio.create_task(batcher.prove(leaf(9999), renewal=True))
        await asyncio.sleep(0)
        slow.go.release()
        slow.go.release()
        proof = await renewal
        return await end([*first, *tasks]), proof, slow.sizes

    refused, proof, sizes = run(work())
    assert refused == 50
    assert sizes[:2] == [1, 101]
    # It is the first leaf of the very next tree, however many new ones came before it.
    assert proof.index == 0
    assert proof.ticket == b"ticket"


def test_a_batch_that_is_too_small_for_all_takes_renewals_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quoting, "MAX_BATCH", 4)

    async def work() -> list[ChannelEvidence]:
        slow = Slow()
        batcher = SessionBatcher(slow)
        first = await flood(batcher, 1)
        tasks = await flood(batcher, 40)
        renewals = [
            asyncio.create_task(batcher.prove(leaf(500 + number), renewal=True))
            for number in range(4)
        ]
        await asyncio.sleep(0)
        slow.go.release()
        slow.go.release()
        proofs = await asyncio.gather(*renewals)
        assert slow.sizes[1] == 4
        await end([*first, *tasks])
        return proofs

    assert [proof.index for proof in run(work())] == [0, 1, 2, 3]


def test_one_source_takes_no_more_than_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quoting, "MAX_WAITING_PER_SOURCE", 10)

    async def work() -> tuple[int, int]:
        batcher = SessionBatcher(Slow())
        loud = await flood(batcher, 30, source="loud")
        quiet = await flood(batcher, 5)
        return await end(loud), await end(quiet)

    assert run(work()) == (20, 0)


def test_a_source_that_gave_up_may_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quoting, "MAX_WAITING_PER_SOURCE", 3)

    async def work() -> int:
        batcher = SessionBatcher(Slow())
        await end(await flood(batcher, 3, source="s"))
        assert batcher.waiting == 0
        return await end(await flood(batcher, 3, source="s"))

    assert run(work()) == 0


def test_renewals_have_a_limit_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quoting, "MAX_WAITING_RENEWALS", 1)

    async def work() -> None:
        batcher = SessionBatcher(Slow())
        tasks = [
            asyncio.create_task(batcher.prove(leaf(number), renewal=True)) for number in range(4)
        ]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert await end(tasks) >= 1

    run(work())


def test_nobody_waits_for_a_quote_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quoting, "PROOF_WAIT_S", 0.05)

    async def work() -> None:
        batcher = SessionBatcher(Slow())
        with pytest.raises(Busy, match="no quote"):
            await batcher.prove(leaf(1))

    run(work())


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 9, 100])
def test_all_paths_at_once_are_the_paths_one_by_one(count: int) -> None:
    leaves = [leaf(number) for number in range(count)]
    paths = merkle.inclusion_paths(leaves)
    assert paths == [tuple(merkle.inclusion_path(leaves, index)) for index in range(count)]


def test_no_leaves_have_no_paths() -> None:
    assert merkle.inclusion_paths([]) == []


@pytest.mark.parametrize(
    "request_",
    [
        ProofRequest(bytes(31)),
        ProofRequest(bytes(32), key=bytes(31)),
        ProofRequest(b""),
    ],
)
def test_requests_of_another_form(request_: ProofRequest) -> None:
    with pytest.raises(FormatError):
        ProofRequest.decode(request_.encode())


def test_requests_round_trip() -> None:
    request = ProofRequest(bytes(range(32)), "192.0.2.1", renewal=True, key=bytes(32))
    assert ProofRequest.decode(request.encode()) == request
    # A name that is too long is cut, not refused: it only says who waits.
    assert len(ProofRequest.decode(ProofRequest(bytes(32), "x" * 100).encode()).source) == 64
