"""Both ends prove themselves: the server first, then the client, each for this session."""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cai.attest.channel import ChannelEvidence
from tests.tng.attackers import ACK, PROVE, READY, CountingEngine, Impostor, raw_client
from tests.tng.gateways import (
    FakeAgent,
    World,
    egress_config,
    error_of,
    port_of,
    running,
    serving,
    talk,
)
from tng.channel.frames import Frame, FrameType, parse_reason
from tng.channel.tls import ChannelKey
from tng.config.entries import parse
from tng.operation.journal import Journal
from tng.operation.service import Gateway
from tng.streams import Code

pytestmark = pytest.mark.anyio

ATTEST = {"aa_addr": "unix:///nowhere/client.sock"}


def ingress(world: World, port: int, *, attest: bool = True, **verify: object) -> dict:
    entry: dict[str, object] = {
        "mapping": {
            "in": {"host": "127.0.0.1", "port": 0},
            "out": {"host": "127.0.0.1", "port": port},
        },
        "verify": world.verify(**verify),
    }
    return {"add_ingress": [entry | ({"attest": ATTEST} if attest else {})]}


REQUEST = b"GET /a HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n"


@contextlib.asynccontextmanager
async def egress(
    world: World, agent: FakeAgent, tmp_path: Path, log: io.StringIO | None = None,
    **verify: object,
) -> AsyncIterator[tuple[int, CountingEngine]]:  # fmt: skip
    """An egress that demands a proof of its clients."""
    engine, socket = CountingEngine(), tmp_path / "engine.sock"
    config = egress_config({"unix": str(socket)}, verify=world.verify(**verify))
    async with serving(engine, socket), running(config, agent, log) as outside:
        yield port_of(outside, "egress[0]"), engine


async def test_both_ends_are_proven(world: World, agent: FakeAgent, tmp_path: Path) -> None:
    client, log = FakeAgent(world, world.guest), io.StringIO()
    async with (
        egress(world, agent, tmp_path, log) as (port, _engine),
        running(ingress(world, port), client) as inside,
    ):
        answer = await talk(port_of(inside, "ingress[0]"), REQUEST)
    assert answer.endswith(b"GET /a HTTP/1.1|")
    assert "proven by both ends" in log.getvalue()
    assert len(agent.calls) == len(client.calls) == 1
    # Each end's leaf is of its own key and role.
    assert agent.calls != client.calls
    assert agent.requests[0].key != client.requests[0].key


async def test_a_client_without_attest_is_told_what_is_missing(
    world: World, agent: FakeAgent, tmp_path: Path
) -> None:
    log = io.StringIO()
    async with (
        egress(world, agent, tmp_path, log) as (port, engine),
        running(ingress(world, port, attest=False)) as inside,
    ):
        answer = await talk(port_of(inside, "ingress[0]"), REQUEST)
    assert answer.startswith(b"HTTP/1.1 502 ")
    assert "demanded" in error_of(answer)["message"]
    assert engine.connections == 0
    assert not agent.calls


@pytest.mark.parametrize("kind", ["debug", "expected", "replayed"])
async def test_a_client_whose_evidence_does_not_pass(
    world: World, agent: FakeAgent, tmp_path: Path, kind: str
) -> None:
    client = FakeAgent(world, world.debug_guest if kind == "debug" else world.guest)
    if kind == "replayed":
        old = client.evidence([bytes(32)])

        async def replay(_leaf: bytes) -> ChannelEvidence:
            return old

        client.answer = replay
    expect = {"expect": {"service": "another"}} if kind == "expected" else {}
    log = io.StringIO()
    async with (
        egress(world, agent, tmp_path, log, **expect) as (port, engine),
        running(ingress(world, port), client) as inside,
    ):
        answer = await talk(port_of(inside, "ingress[0]"), REQUEST)
    assert answer.startswith(b"HTTP/1.1 502 ")
    assert "refuses the evidence" in error_of(answer)["message"]
    seen = {"debug": "tdx.debug", "expected": "expect.service", "replayed": "channel.session"}
    assert seen[kind] in log.getvalue()
    assert seen[kind] not in answer.decode()
    assert engine.connections == 0


async def test_a_client_shows_nothing_to_a_server_that_has_not_proven_itself(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Role reflection: whoever demands the client's proof first gets none to show around."""
    monkeypatch.setattr("tng.channel.session.PROOF_TIMEOUT_S", 0.3)
    client = FakeAgent(world, world.guest)
    impostor = Impostor(Frame(FrameType.PROVE, 0, bytes(36)), ACK)
    async with (
        serving(impostor) as port,
        running(ingress(world, port), client) as inside,
    ):
        answer = await talk(port_of(inside, "ingress[0]"), REQUEST)
    assert answer.startswith(b"HTTP/1.1 502 ")
    assert not client.calls
    assert {frame.type for frame in impostor.got} == {FrameType.PROVE}


async def test_the_server_s_own_proof_is_none_of_the_client(
    world: World, agent: FakeAgent, tmp_path: Path
) -> None:
    """Role reflection: a client hands the server's evidence back as its own."""
    log, given = io.StringIO(), []
    client = FakeAgent(world, world.guest)

    async def keep(leaf: bytes) -> ChannelEvidence:
        given.append(agent.evidence([leaf]))
        return given[-1]

    async def reflect(_leaf: bytes) -> ChannelEvidence:
        return given[-1]

    agent.answer, client.answer = keep, reflect
    async with (
        egress(world, agent, tmp_path, log) as (port, engine),
        running(ingress(world, port), client) as inside,
    ):
        answer = await talk(port_of(inside, "ingress[0]"), REQUEST)
    assert given
    assert answer.startswith(b"HTTP/1.1 502 ")
    assert "channel.session" in log.getvalue()
    assert engine.connections == 0


OPEN = (Frame(FrameType.OPEN, 1), Frame(FrameType.DATA, 1, b"GET / HTTP/1.1\r\n\r\n"))


@pytest.mark.parametrize(
    ("frames", "key"),
    [
        ((PROVE, READY, *OPEN), True),
        ((PROVE, READY, ACK, READY), True),
        ((PROVE, READY, Frame(FrameType.EVIDENCE, 0, b"{}")), True),
        ((PROVE, READY, ACK, Frame(FrameType.EVIDENCE, 0, b"{}")), True),
        ((PROVE, READY, *OPEN), False),
    ],
    ids=["no-proof", "twice-ready", "no-ack", "empty", "no-certificate"],
)
async def test_no_byte_reaches_the_engine_before_the_client_is_proven(
    world: World, agent: FakeAgent, tmp_path: Path, frames: tuple[Frame, ...], key: bool
) -> None:
    async with egress(world, agent, tmp_path) as (port, engine):
        got = await raw_client(port, *frames, key=ChannelKey() if key else None)
    assert got[-1].type is FrameType.REFUSE
    assert parse_reason(got[-1].payload)[0] is (Code.PROTOCOL if key else Code.NO_PROOF)
    assert READY not in got
    assert engine.connections == 0


async def test_a_client_that_owes_no_proof_refuses_to_be_asked(world: World) -> None:
    impostor = Impostor(READY, Frame(FrameType.PROVE, 0, bytes(36)))
    async with (
        serving(impostor) as port,
        running(ingress(world, port, attest=False)) as inside,
    ):
        answer = await talk(port_of(inside, "ingress[0]"), REQUEST)
    assert answer.startswith(b"HTTP/1.1 502 ")
    assert impostor.got[-1].type is FrameType.REFUSE


async def test_the_caller_s_key_reaches_the_backend(
    world: World, agent: FakeAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hashlib import sha256

    from tng.egress.raw import RawBackend

    seen = asyncio.get_running_loop().create_future()

    async def carry(self: RawBackend, stream: object, caller: object) -> None:
        if not seen.done():
            seen.set_result(caller)
        stream.reset()  # type: ignore[attr-defined]

    monkeypatch.setattr(RawBackend, "carry", carry)
    client = FakeAgent(world, world.guest)
    async with (
        egress(world, agent, tmp_path) as (port, _engine),
        running(ingress(world, port), client) as inside,
    ):
        await talk(port_of(inside, "ingress[0]"), REQUEST)
        caller = await asyncio.wait_for(seen, 10)
    assert bytes.fromhex(caller.client_key) == client.requests[0].key
    assert len(caller.client_key) == 2 * sha256().digest_size


async def test_an_egress_that_proves_nothing_cannot_demand_sessions(world: World) -> None:
    from cai.errors import SettingError

    config = egress_config({"unix": "/nowhere"}, verify=world.verify())
    del config["add_egress"][0]["attest"]  # type: ignore[index]
    with pytest.raises(SettingError, match="egress that proves itself"):
        Gateway(parse(config, where="test"), Journal(io.StringIO()))
