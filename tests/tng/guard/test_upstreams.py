"""Several backends: the idlest one that lives, and what becomes of those that do not."""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cai.errors import PeerUnreachable
from tests.tng.gateways import (
    FakeAgent,
    World,
    egress_config,
    port_of,
    proxy_config,
    running,
    serving,
    talk,
)
from tng.config.addresses import TcpUpstream, UnixUpstream
from tng.egress import upstreams as module
from tng.egress.upstreams import Probe, Upstreams
from tng.operation.journal import Journal

pytestmark = pytest.mark.anyio


class Fake:
    """A backend that can be told what its health check answers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.status: bytes = b"200 OK"
        self.connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"GET /health"):
            self.connections -= 1
        writer.write(b"HTTP/1.1 " + self.status + b"\r\ncontent-length: 4\r\n\r\n"
                     + self.path.stem[:4].encode())
        await writer.drain()


@contextlib.asynccontextmanager
async def three(
    tmp_path: Path, **more: object
) -> AsyncIterator[tuple[Upstreams, list[Fake], io.StringIO]]:
    fakes = [Fake(tmp_path / f"bk-{index}.sock") for index in range(3)]
    log = io.StringIO()
    async with contextlib.AsyncExitStack() as stack:
        for fake in fakes:
            await stack.enter_async_context(serving(fake.serve, fake.path))
        targets = [UnixUpstream(fake.path) for fake in fakes]
        found = Upstreams("egress[0]", targets, Journal(log), **more)  # type: ignore[arg-type]
        try:
            yield found, fakes, log
        finally:
            await found.close()


def states(found: Upstreams) -> list[tuple[object, object]]:
    return [(item["up"], item["running"]) for item in found.status()]


async def test_the_one_with_the_least_to_do_is_taken(tmp_path: Path) -> None:
    async with three(tmp_path) as (found, _fakes, _log):
        leases = [await found.connect() for _ in range(9)]
        assert states(found) == [(True, 3)] * 3
        for lease in leases[:2]:
            lease.close()
            lease.close()
        assert sum(running for _up, running in states(found)) == 7  # type: ignore[misc]
        more = [await found.connect() for _ in range(2)]
        assert states(found) == [(True, 3)] * 3
        for lease in (*leases, *more):
            lease.close(abort=True)
        assert states(found) == [(True, 0)] * 3


async def test_requests_at_once_are_spread(tmp_path: Path) -> None:
    async with three(tmp_path) as (found, _fakes, _log):
        leases = await asyncio.gather(*(found.connect() for _ in range(30)))
        assert states(found) == [(True, 10)] * 3
        for lease in leases:
            lease.close()


async def test_one_that_fails_is_passed_over_and_comes_back(tmp_path: Path) -> None:
    now = [0.0]
    async with three(tmp_path, clock=lambda: now[0]) as (found, fakes, log):
        held = fakes[0].path.rename(tmp_path / "away")
        for _ in range(6):
            (await found.connect()).close()
        assert [up for up, _running in states(found)] == [False, True, True]
        assert log.getvalue().count("is down") == 1
        held.rename(fakes[0].path)
        now[0] += module.RETRY_S
        for _ in range(3):
            (await found.connect()).close()
        assert [up for up, _running in states(found)] == [True, True, True]
        assert "is back" in log.getvalue()


async def test_none_left_is_told_and_still_tried(tmp_path: Path) -> None:
    async with three(tmp_path) as (found, fakes, _log):
        for fake in fakes:
            fake.path.rename(fake.path.with_suffix(".away"))
        for _ in range(2):
            with pytest.raises(PeerUnreachable):
                await found.connect()
        assert not found.ready
        assert states(found) == [(False, 0)] * 3
        fakes[1].path.with_suffix(".away").rename(fakes[1].path)
        (await found.connect()).close()
        assert found.ready


async def test_a_sick_backend_gets_nothing_until_it_is_well(tmp_path: Path) -> None:
    probe = Probe("/health", 0.05)
    async with three(tmp_path, probe=probe) as (found, fakes, _log):
        fakes[0].status = b"503 Service Unavailable"
        found.start()
        async with asyncio.timeout(5):
            while states(found)[0][0]:
                await asyncio.sleep(0.01)
            for _ in range(6):
                (await found.connect()).close()
            fakes[0].status = b"404 Not Found"
            while not states(found)[0][0]:
                await asyncio.sleep(0.01)
        assert "health check answers 503" in _log.getvalue()


@pytest.mark.parametrize("answer", [b"", b"nonsense\r\n", b"HTTP/1.1\r\n", b"HTTP/1.1 abc x\r\n"])
async def test_an_answer_of_no_http_is_a_sick_backend(tmp_path: Path, answer: bytes) -> None:
    async def odd(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()

    async with serving(odd, tmp_path / "odd.sock"):
        target = UnixUpstream(tmp_path / "odd.sock")
        found = Upstreams("e", [target], Journal(io.StringIO()), probe=Probe("/health", 60))
        found.start()
        async with asyncio.timeout(5):
            while found.ready:
                await asyncio.sleep(0.01)
        await found.close()


async def test_a_port_that_nobody_listens_on() -> None:
    found = Upstreams("e", [TcpUpstream("127.0.0.1", 1)], Journal(io.StringIO()))
    with pytest.raises(PeerUnreachable):
        await found.connect()


async def test_a_plain_egress_balances_too(world: World, agent: FakeAgent, tmp_path: Path) -> None:
    fakes = [Fake(tmp_path / f"bk-{index}.sock") for index in range(2)]
    outs = [{"unix": str(fake.path)} for fake in fakes]
    config = egress_config(outs)  # type: ignore[arg-type]
    async with contextlib.AsyncExitStack() as stack:
        for fake in fakes:
            await stack.enter_async_context(serving(fake.serve, fake.path))
        outside = await stack.enter_async_context(running(config, agent))
        inside = await stack.enter_async_context(running(proxy_config(world.verify())))
        peer = f"127.0.0.1:{port_of(outside, 'egress[0]')}"
        head = f"GET http://{peer}/a HTTP/1.1\r\nhost: {peer}\r\nconnection: close\r\n\r\n"
        answers = [await talk(port_of(inside, "ingress[0]"), head.encode()) for _ in range(4)]
        fakes[0].path.unlink()
        answers += [await talk(port_of(inside, "ingress[0]"), head.encode()) for _ in range(3)]
    assert all(item.startswith(b"HTTP/1.1 200") for item in answers)
    assert fakes[0].connections == 2
    assert fakes[1].connections == 5
