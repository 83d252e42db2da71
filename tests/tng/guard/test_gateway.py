"""A guard in a running pair: draining, readiness, several backends, attacks through the channel."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

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
from tests.tng.guard.guarded import CHAT, PROMPT, Engine, answer
from tests.tng.guard.test_streaming import chunk, event, word
from tng.config.entries import parse
from tng.operation import service
from tng.operation.journal import Journal
from tng.operation.service import Gateway

pytestmark = pytest.mark.anyio

STREAM = {**PROMPT, "stream": True}
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


@contextlib.asynccontextmanager
async def guarded_pair(
    world: World, agent: FakeAgent, out: object, **guard: Any
) -> AsyncIterator[tuple[Gateway, int, bytes]]:
    """The far gateway, the near proxy's port, and the peer as clients name it."""
    config = egress_config(out, guard=guard)  # type: ignore[arg-type]
    far = Gateway(parse(config, where="test"), Journal(io.StringIO()), agent)  # type: ignore[arg-type]
    try:
        listen = await far.start()
        async with running(proxy_config(world.verify())) as near:
            peer = f"127.0.0.1:{port_of(listen, 'egress[0]')}".encode()
            yield far, port_of(near, "ingress[0]"), peer
    finally:
        await far.close()


def post(peer: bytes, body: object, path: bytes = CHAT.encode()) -> bytes:
    data = json.dumps(body).encode()
    return (
        b"POST http://%s%s HTTP/1.1\r\nhost: %s\r\nconnection: close\r\n"
        b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%s"
    ) % (peer, path, peer, len(data), data)


async def test_running_streams_outlive_the_order_to_stop(
    world: World, agent: FakeAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "DRAIN_S", 0.1)
    step = asyncio.Event()

    async def stepwise(_engine: Engine, _body: object, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + chunk(word("one")))
        await writer.drain()
        await step.wait()
        writer.write(chunk(word("two")) + chunk(event("[DONE]")) + b"0\r\n\r\n")
        await writer.drain()

    engine, socket = Engine(stepwise), tmp_path / "engine.sock"
    async with (
        serving(engine.serve, socket),
        guarded_pair(world, agent, {"unix": str(socket)}, health={"path": ""}, drain_s=30) as (
            far, proxy, peer,
        ),
    ):  # fmt: skip
        asking = asyncio.create_task(talk(proxy, post(peer, STREAM)))
        async with asyncio.timeout(10):
            while not engine.bodies:
                await asyncio.sleep(0.01)
            draining = asyncio.create_task(far.drain())
            await asyncio.sleep(0.5)
            assert not draining.done()
            refused = await talk(proxy, post(peer, STREAM))
            assert refused.startswith(b"HTTP/1.1 502")
            step.set()
            whole = await asking
            await draining
    assert whole.endswith(b"0\r\n\r\n")
    assert b"two" in whole
    assert len(engine.bodies) == 1


async def test_a_sick_engine_makes_the_gateway_unready(
    world: World, agent: FakeAgent, tmp_path: Path
) -> None:
    sick = [True]

    async def health(_engine: Engine, _body: object, writer: asyncio.StreamWriter) -> None:
        status = "503 Service Unavailable" if sick[0] else "200 OK"
        await answer(writer, b"{}", status=status)

    socket = tmp_path / "engine.sock"
    async with (
        serving(Engine(health).serve, socket),
        guarded_pair(world, agent, {"unix": str(socket)}, health={"interval_s": 1}) as (far, _, _p),
        asyncio.timeout(10),
    ):
        ready = far._readiness
        while not await ready.missing():
            await asyncio.sleep(0.05)
        assert any("health check" in reason for reason in await ready.missing())
        sick[0] = False
        while await ready.missing():
            await asyncio.sleep(0.05)
        status = far.status()["egress"]["egress[0]"]["backends"][0]  # type: ignore[index]
        assert status["upstreams"][0]["up"] is True
        assert status["guard"]["receipt_key"]


async def test_two_engines_share_the_work_and_one_may_end(
    world: World, agent: FakeAgent, tmp_path: Path
) -> None:
    engines = [Engine(), Engine()]
    sockets = [tmp_path / f"{index}.sock" for index in range(2)]
    out = [{"unix": str(path)} for path in sockets]
    async with (
        serving(engines[0].serve, sockets[0]),
        serving(engines[1].serve, sockets[1]),
        guarded_pair(world, agent, out, health={"path": ""}) as (_far, proxy, peer),
    ):
        for _ in range(4):
            assert (await talk(proxy, post(peer, PROMPT))).startswith(b"HTTP/1.1 200")
        assert [len(engine.bodies) for engine in engines] == [2, 2]
        sockets[0].unlink()
        for _ in range(4):
            assert (await talk(proxy, post(peer, PROMPT))).startswith(b"HTTP/1.1 200")
    assert [len(engine.bodies) for engine in engines] == [2, 6]
    # Both engines' caches are one caller's: the salt does not depend on the engine.
    assert len({body["cache_salt"] for engine in engines for body in engine.bodies}) == 1


@pytest.mark.parametrize("framing", [
    b"content-length: 4\r\ntransfer-encoding: chunked", b"content-length: 4\r\ncontent-length: 50",
    b"transfer-encoding: chunked, identity", b"transfer-encoding: xchunked",
])  # fmt: skip
async def test_no_smuggling_through_a_tunnel(
    world: World, agent: FakeAgent, tmp_path: Path, framing: bytes
) -> None:
    """CONNECT hands the guard the client's own bytes, so it must judge them itself."""
    engine, socket = Engine(), tmp_path / "engine.sock"
    async with (
        serving(engine.serve, socket),
        guarded_pair(world, agent, {"unix": str(socket)}, health={"path": ""}) as (_f, proxy, peer),
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy)
        writer.write(b"CONNECT %s HTTP/1.1\r\nhost: %s\r\n\r\n" % (peer, peer))
        async with asyncio.timeout(10):
            assert b"200" in await reader.readuntil(b"\r\n\r\n")
            writer.write(
                b"POST %s HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n%s\r\n\r\n"
                b"0\r\n\r\nGET /metrics HTTP/1.1\r\nhost: a\r\n\r\n" % (CHAT.encode(), framing)
            )
            found = await reader.read()
        writer.close()
    assert found.startswith(b"HTTP/1.1 400")
    assert found.count(b"HTTP/1.1") == 1
    assert not engine.heads


async def test_callers_of_two_sessions_have_two_salts(
    world: World, agent: FakeAgent, tmp_path: Path
) -> None:
    engine, socket = Engine(), tmp_path / "engine.sock"
    async with (
        serving(engine.serve, socket),
        guarded_pair(world, agent, {"unix": str(socket)}, health={"path": ""}) as (_f, one, peer),
        running(proxy_config(world.verify())) as near,
    ):
        for proxy in (one, one, port_of(near, "ingress[0]")):
            assert (await talk(proxy, post(peer, PROMPT))).startswith(b"HTTP/1.1 200")
    salts = [body["cache_salt"] for body in engine.bodies]
    assert salts[0] == salts[1] != salts[2]
