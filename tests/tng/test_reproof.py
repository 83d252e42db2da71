"""A running session is proven again in time; where it is not, it opens no stream any more."""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from cai.attest.agent_client import Busy
from cai.attest.channel import ChannelEvidence
from cai.errors import PeerUnreachable, Refused
from tests.tng.gateways import (
    FakeAgent,
    World,
    echo_engine,
    egress_config,
    error_of,
    port_of,
    running,
    serving,
    talk,
)

pytestmark = pytest.mark.anyio

AGE_S = 1.0


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds instead of minutes."""
    monkeypatch.setattr("tng.channel.renewal.MAX_SESSION_AGE_S", AGE_S)
    monkeypatch.setattr("tng.channel.renewal.RENEW_FRACTION", 0.3)
    monkeypatch.setattr("tng.channel.renewal.MAX_PROOFS_A_MINUTE", 1000)
    monkeypatch.setattr("tng.channel.renewal.MAX_DRAIN_S", 0.5)
    monkeypatch.setattr("tng.channel.renewal.RETRY_S", 0.02)
    monkeypatch.setattr("tng.channel.streams.LOOK_S", 0.05)


@dataclass
class Running:
    """A pair over which one long request runs."""

    port: int
    agent: FakeAgent
    log: io.StringIO
    reader: asyncio.StreamReader
    released: asyncio.Event

    async def ask(self) -> bytes:
        return await talk(self.port, b"GET /short HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n")

    @property
    def sessions(self) -> int:
        return self.log.getvalue().count("session proven")

    async def until(self, done: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not done():
                await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def pair(
    world: World, agent: FakeAgent, tmp_path: Path, *, mutual: FakeAgent | None = None
) -> AsyncIterator[Running]:
    released = asyncio.Event()

    async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = await reader.readline()
        if b"/long" not in line:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
            return
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nfirst")
        await released.wait()
        writer.write(b"final")

    socket, log = tmp_path / "engine.sock", io.StringIO()
    outside = egress_config({"unix": str(socket)}, **({"verify": world.verify()} if mutual else {}))
    async with serving(engine, socket), running(outside, agent, log) as far:
        rule = {
            "in": {"host": "127.0.0.1", "port": 0},
            "out": {"host": "127.0.0.1", "port": port_of(far, "egress[0]")},
        }
        entry: dict[str, object] = {"mapping": rule, "verify": world.verify()}
        if mutual:
            entry["attest"] = {"aa_addr": "unix:///nowhere/client.sock"}
        async with running({"add_ingress": [entry]}, mutual, log) as near:
            port = port_of(near, "ingress[0]")
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /long HTTP/1.1\r\nhost: h\r\n\r\n")
            await asyncio.wait_for(reader.readuntil(b"first"), 10)
            try:
                yield Running(port, agent, log, reader, released)
            finally:
                released.set()
                writer.close()


async def test_a_session_lives_on_its_renewed_proofs(
    world: World, agent: FakeAgent, tmp_path: Path
) -> None:
    async with pair(world, agent, tmp_path) as pairs:
        await asyncio.sleep(2.5 * AGE_S)
        assert (await pairs.ask()).endswith(b"ok")
        assert pairs.sessions == 1
        pairs.released.set()
        assert await asyncio.wait_for(pairs.reader.readexactly(5), 10) == b"final"
    assert len(agent.calls) >= 4
    assert len(set(agent.calls)) == len(agent.calls)
    assert [request.renewal for request in agent.requests[:2]] == [False, True]
    assert "proven again" in pairs.log.getvalue()


async def test_both_ends_renew(world: World, agent: FakeAgent, tmp_path: Path) -> None:
    client = FakeAgent(world, world.guest)
    async with pair(world, agent, tmp_path, mutual=client) as pairs:
        await pairs.until(lambda: min(len(agent.calls), len(client.calls)) >= 4)
        assert (await pairs.ask()).endswith(b"ok")
        assert pairs.sessions == 1
    assert any(request.renewal for request in client.requests)


async def replay(old: ChannelEvidence) -> ChannelEvidence:
    return old


@pytest.mark.parametrize("kind", ["debug", "replayed", "gpu"])
async def test_a_renewal_that_does_not_pass_ends_the_session(
    world: World, agent: FakeAgent, tmp_path: Path, kind: str
) -> None:
    async with pair(world, agent, tmp_path) as pairs:
        old = agent.evidence([bytes(32)])
        if kind == "debug":
            agent.guest = world.debug_guest
        elif kind == "replayed":
            agent.answer = lambda _leaf: replay(old)
        else:
            from cai.attest.statement import GpuFacts

            agent.changes = {"gpu": GpuFacts("00" * 32, "00" * 32, 5)}
        await pairs.until(lambda: "not again" in pairs.log.getvalue())
        answer = await pairs.ask()
        assert answer.startswith(b"HTTP/1.1 502 ")
        seen = {"debug": "tdx.debug", "replayed": "channel.session", "gpu": "channel.gpu_digest"}
        assert seen[kind] in error_of(answer)["message"]
        # What runs has its drain, and no more.
        assert await asyncio.wait_for(pairs.reader.read(), 10) == b""


async def test_a_client_whose_renewal_does_not_pass_gets_no_new_stream(
    world: World, agent: FakeAgent, tmp_path: Path
) -> None:
    client = FakeAgent(world, world.guest)
    async with pair(world, agent, tmp_path, mutual=client) as pairs:
        client.guest = world.debug_guest
        await pairs.until(lambda: len(client.calls) >= 2)
        await asyncio.sleep(0.2)
        answer = await pairs.ask()
        assert answer.startswith(b"HTTP/1.1 502 ")
        assert "refuses the evidence" in error_of(answer)["message"]
        assert await asyncio.wait_for(pairs.reader.read(), 10) == b""


async def test_a_guest_that_may_not_prove_any_more(
    world: World, agent: FakeAgent, tmp_path: Path
) -> None:
    async def refuse(_leaf: bytes) -> ChannelEvidence:
        raise Refused("the release was revoked")

    async with pair(world, agent, tmp_path) as pairs:
        agent.answer = refuse
        await pairs.until(lambda: len(agent.calls) >= 2)
        await asyncio.sleep(0.1)
        assert (await pairs.ask()).startswith(b"HTTP/1.1 502 ")
        assert await asyncio.wait_for(pairs.reader.read(), 10) == b""


@pytest.mark.parametrize("error", [Busy("full"), PeerUnreachable("away")])
async def test_an_agent_that_is_away_for_a_moment_ends_nothing(
    world: World, agent: FakeAgent, tmp_path: Path, error: Exception
) -> None:
    failures = 3

    async def sometimes(leaf: bytes) -> ChannelEvidence:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise error
        return agent.evidence([leaf])

    async with pair(world, agent, tmp_path) as pairs:
        agent.answer = sometimes
        await asyncio.sleep(1.5 * AGE_S)
        assert failures < 0
        assert (await pairs.ask()).endswith(b"ok")
        assert pairs.sessions == 1


async def test_a_guest_s_lease_bounds_its_sessions(
    world: World, agent: FakeAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server ends a session with its lease, also when no verifier knows of a lease."""
    monkeypatch.setattr("tng.channel.renewal.RENEW_FRACTION", 0.95)
    agent.good_for_s = 0.2
    async with pair(world, agent, tmp_path) as pairs:
        await asyncio.sleep(0.4)
        assert (await pairs.ask()).endswith(b"ok")
        assert pairs.sessions == 2


async def test_an_idle_client_pays_nothing(
    world: World, agent: FakeAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tng.channel.streams.IDLE_S", 0.1)
    socket = tmp_path / "engine.sock"
    async with (
        serving(echo_engine, socket),
        running(egress_config({"unix": str(socket)}), agent) as far,
    ):
        rule = {
            "in": {"host": "127.0.0.1", "port": 0},
            "out": {"host": "127.0.0.1", "port": port_of(far, "egress[0]")},
        }
        config = {"add_ingress": [{"mapping": rule, "verify": world.verify()}]}
        async with running(config) as near:
            await talk(
                port_of(near, "ingress[0]"), b"GET / HTTP/1.1\r\nconnection: close\r\n\r\n"
            )
            await asyncio.sleep(1.2)
    assert len(agent.calls) == 1
