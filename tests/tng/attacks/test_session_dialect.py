"""Attacks on sessions of ``cai/1``, each with the refusal that it must meet.

Relays, replays in a handshake, stripped proofs and debug guests are in ``test_refusals``; role
reflection between two proving ends is in ``test_mutual``; replays in a running session are in
``test_reproof``; other guests' tickets are in ``test_tickets``.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import ssl
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from cai import merkle
from cai.attest.channel import ChannelEvidence
from tests.tng.attackers import (
    OPEN,
    PROVE,
    READY,
    CountingEngine,
    raw_client,
    refused_behind,
)
from tests.tng.gateways import (
    NONCE,
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
from tests.tng.guests import agent_of, at_socket
from tng.channel.frames import FrameType, parse_reason
from tng.channel.tls import TlsSession, client_context
from tng.streams import Code

pytestmark = pytest.mark.anyio

REQUEST = b"GET / HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n"


@pytest.mark.parametrize(
    ("other", "expected", "seen"),
    [
        ({"service_id": "other"}, {"service": "demo"}, "expect.service"),
        ({"launch_digest": "bb" * 48}, {"launch": "ab" * 48}, "expect.launch"),
        ({"owner_key": "ee" * 32}, {"owner": "cd" * 32}, "expect.owner"),
        ({"models": ()}, {"model_root": "01" * 32}, "expect.model_root"),
        ({"models": ()}, {"content_root": "02" * 32}, "expect.content_root"),
    ],
    ids=["service", "launch", "owner", "model", "content"],
)
async def test_diversion_to_another_honest_guest(
    world: World, agent: FakeAgent, tmp_path: Path, other: dict, expected: dict, seen: str
) -> None:
    """The network leads to a guest that proves itself honestly, and is not the one meant."""
    agent.changes = other
    error = await refused_behind(world, agent, tmp_path, expect=expected)
    assert seen in error["message"]
    assert "channel.session" not in error["message"]


async def test_swapped_gpu_evidence(world: World, agent: FakeAgent, tmp_path: Path) -> None:
    """Genuine reports of another machine's GPU, under the same nonce, beside an honest quote."""
    from cai.attest.sim import SimulatedPlatform

    directory = tmp_path / "other"
    SimulatedPlatform.create(directory, now=datetime.now(UTC))
    others = SimulatedPlatform.load(directory / "platform").devices().collect(NONCE)

    async def swap(leaf: bytes) -> ChannelEvidence:
        honest = agent.evidence([leaf])
        return replace(honest, evidence=replace(honest.evidence, devices=others))

    agent.answer = swap
    error = await refused_behind(world, agent, tmp_path)
    assert "channel.gpu_digest" in error["message"]


async def test_gpu_evidence_left_out(world: World, agent: FakeAgent, tmp_path: Path) -> None:
    async def without(leaf: bytes) -> ChannelEvidence:
        honest = agent.evidence([leaf])
        return replace(honest, evidence=replace(honest.evidence, devices=()))

    agent.answer = without
    error = await refused_behind(world, agent, tmp_path)
    assert "channel.gpu_digest" in error["message"]


Forge = Callable[[FakeAgent, bytes], ChannelEvidence]
OTHER = merkle.leaf_hash(b"another session")


def inner_node(agent: FakeAgent, leaf: bytes) -> ChannelEvidence:
    """The root over this leaf and another one, offered as a tree of one leaf."""
    both = agent.evidence([leaf, OTHER])
    agent.changes = {"session_size": 1, "session_root": merkle.root([leaf, OTHER]).hex()}
    return replace(agent.evidence([leaf]), path=both.path)


def root_as_leaf(agent: FakeAgent, leaf: bytes) -> ChannelEvidence:
    agent.changes = {"session_size": 1, "session_root": merkle.root([leaf, OTHER]).hex()}
    return agent.evidence([leaf])


def another_size(agent: FakeAgent, leaf: bytes) -> ChannelEvidence:
    honest = agent.evidence([leaf, OTHER])
    agent.changes = {"session_size": 3, "session_root": merkle.root([leaf, OTHER]).hex()}
    return replace(agent.evidence([leaf]), path=honest.path)


def another_place(agent: FakeAgent, leaf: bytes) -> ChannelEvidence:
    return replace(agent.evidence([leaf, OTHER]), index=1)


def longer_path(agent: FakeAgent, leaf: bytes) -> ChannelEvidence:
    honest = agent.evidence([leaf, OTHER])
    return replace(honest, path=(*honest.path, OTHER))


def statement_of_another_session(agent: FakeAgent, leaf: bytes) -> ChannelEvidence:
    del leaf
    return agent.evidence([OTHER])


@pytest.mark.parametrize(
    "forge",
    [inner_node, root_as_leaf, another_size, another_place, longer_path,
     statement_of_another_session],
)  # fmt: skip
async def test_another_tree(
    world: World, agent: FakeAgent, tmp_path: Path, forge: Forge
) -> None:
    async def answer(leaf: bytes) -> ChannelEvidence:
        return forge(agent, leaf)

    agent.answer = answer
    error = await refused_behind(world, agent, tmp_path)
    assert "channel.session" in error["message"]


async def test_a_changed_statement_under_an_honest_quote(
    world: World, agent: FakeAgent, tmp_path: Path
) -> None:
    async def other_words(leaf: bytes) -> ChannelEvidence:
        honest = agent.evidence([leaf])
        agent.changes = {"guest_facts": {**world.told, "profile": "sealed"}}
        return replace(agent.evidence([leaf]), evidence=honest.evidence)

    agent.answer = other_words
    error = await refused_behind(world, agent, tmp_path)
    assert "tdx.report_data" in error["message"]


async def test_a_stock_quote_is_none_of_a_session(
    world: World, agent: FakeAgent, tmp_path: Path
) -> None:
    """What the same agent quotes for stock callers ends in zeros, whatever they ask for."""

    async def stock(leaf: bytes) -> ChannelEvidence:
        honest = agent.evidence([leaf])
        from hashlib import sha384

        digest = sha384(b"cai/statement/v1\x00" + honest.statement).digest()
        quote = world.guest.quote(digest + bytes(16))
        return replace(honest, evidence=replace(honest.evidence, quote=quote))

    agent.answer = stock
    error = await refused_behind(world, agent, tmp_path)
    assert "tdx.report_data" in error["message"]


@pytest.mark.parametrize("protocol", ["cai/1", "rats-tls"])
async def test_nothing_is_resumed(world: World, tmp_path: Path, protocol: str) -> None:
    """There is no ticket to come back with, so no session outlives its evidence."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols([protocol])
    async with at_socket(agent_of(world), tmp_path / "aa.sock") as address:
        config = egress_config({"unix": str(tmp_path / "none")}, attest={"aa_addr": address})
        async with running(config) as outside:
            port = port_of(outside, "egress[0]")
            assert await asyncio.to_thread(_resumes, context, port, protocol) == (False, False)


def _resumes(context: ssl.SSLContext, port: int, protocol: str) -> tuple[bool, bool]:
    import socket

    first = context.wrap_socket(socket.create_connection(("127.0.0.1", port)))
    assert first.selected_alpn_protocol() == protocol
    first.settimeout(0.3)
    with contextlib.suppress(OSError):
        first.recv(1)
    kept = first.session
    first.close()
    second = context.wrap_socket(socket.create_connection(("127.0.0.1", port)), session=kept)
    reused = bool(second.session_reused)
    second.close()
    return bool(kept and kept.has_ticket and reused), reused


async def test_strict_traffic_never_runs_on_a_lax_tunnel(
    world: World, agent: FakeAgent, tmp_path: Path
) -> None:
    """Two rules lead to one peer; what the lax one proved counts nothing for the strict one."""
    engine, socket = CountingEngine(), tmp_path / "engine.sock"
    async with (
        serving(engine, socket),
        running(egress_config({"unix": str(socket)}), agent) as outside,
    ):
        rule = {
            "in": {"host": "127.0.0.1", "port": 0},
            "out": {"host": "127.0.0.1", "port": port_of(outside, "egress[0]")},
        }
        strict = world.verify(expect={"service": "another"})
        config = {
            "add_ingress": [
                {"mapping": rule, "verify": world.verify()},
                {"mapping": rule, "verify": strict},
            ]
        }
        async with running(config) as inside:
            lax, sharp = port_of(inside, "ingress[0]"), port_of(inside, "ingress[1]")
            assert (await talk(lax, REQUEST)).startswith(b"HTTP/1.1 200")
            answer = await talk(sharp, REQUEST)
            assert answer.startswith(b"HTTP/1.1 502 ")
            assert "expect.service" in error_of(answer)["message"]
            assert (await talk(lax, REQUEST)).startswith(b"HTTP/1.1 200")
    assert len(agent.calls) == 2
    assert engine.connections == 2


async def _half_open(port: int) -> asyncio.StreamWriter:
    """TLS stands, the server is ready, and no proof is asked for."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    tls = TlsSession(client_context(), server=False)
    tls.start()
    writer.write(tls.outgoing())
    while not tls.established:
        tls.receive(await reader.read(65536))
        writer.write(tls.outgoing())
    return writer


async def test_a_flood_of_half_open_proofs(
    world: World, agent: FakeAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest is refused with a reason; running sessions are renewed as ever."""
    monkeypatch.setattr("tng.egress.sessions.MAX_OPENING", 4)
    monkeypatch.setattr("tng.channel.renewal.MAX_SESSION_AGE_S", 1.0)
    monkeypatch.setattr("tng.channel.renewal.RENEW_FRACTION", 0.3)
    monkeypatch.setattr("tng.channel.renewal.MAX_PROOFS_A_MINUTE", 100)
    monkeypatch.setattr("tng.channel.streams.LOOK_S", 0.05)
    socket, log = tmp_path / "engine.sock", io.StringIO()
    async with (
        serving(echo_engine, socket),
        running(egress_config({"unix": str(socket)}), agent, log) as outside,
    ):
        port = port_of(outside, "egress[0]")
        rule = {
            "in": {"host": "127.0.0.1", "port": 0},
            "out": {"host": "127.0.0.1", "port": port},
        }
        config = {"add_ingress": [{"mapping": rule, "verify": world.verify()}]}
        async with running(config) as inside:
            honest = port_of(inside, "ingress[0]")
            assert (await talk(honest, REQUEST)).startswith(b"HTTP/1.1 200")
            flood = [await _half_open(port) for _ in range(4)]
            got = await raw_client(port, PROVE, READY, OPEN)
            assert got[-1].type is FrameType.REFUSE
            assert parse_reason(got[-1].payload)[0] is Code.BUSY
            await asyncio.sleep(1.5)
            assert (await talk(honest, REQUEST)).startswith(b"HTTP/1.1 200")
            assert log.getvalue().count("session proven") == 1
            for writer in flood:
                writer.close()
    assert sum(request.renewal for request in agent.requests) >= 3
    assert sum(not request.renewal for request in agent.requests) == 1


async def test_one_address_takes_not_every_place(
    agent: FakeAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tng.egress.sessions.MAX_OPENING_PER_SOURCE", 1)
    async with running(egress_config({"unix": str(tmp_path / "none")}), agent) as outside:
        port = port_of(outside, "egress[0]")
        held = await _half_open(port)
        got = await raw_client(port, PROVE, READY)
        held.close()
    assert parse_reason(got[-1].payload)[0] is Code.BUSY
    assert not agent.calls


async def test_a_client_that_leaves_costs_no_leaf(
    world: World, agent: FakeAgent, tmp_path: Path
) -> None:
    """Proofs are asked for and never waited for: the agent learns that nobody waits any more."""
    cancelled = asyncio.Event()

    async def slow(_leaf: bytes) -> ChannelEvidence:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        raise AssertionError

    agent.answer = slow
    async with running(egress_config({"unix": str(tmp_path / "none")}), agent) as outside:
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", port_of(outside, "egress[0]")
        )
        tls = TlsSession(client_context(), server=False)
        tls.start()
        writer.write(tls.outgoing())
        while not tls.established:
            tls.receive(await reader.read(65536))
            writer.write(tls.outgoing())
        from tng.channel.frames import encode

        tls.send(encode(PROVE))
        writer.write(tls.outgoing())
        async with asyncio.timeout(5):
            while not agent.calls:
                await asyncio.sleep(0.01)
        writer.close()
        await asyncio.wait_for(cancelled.wait(), 5)
