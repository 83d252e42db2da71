"""Attacks on RATS-TLS sessions and on the choice between the dialects.

In that dialect a connection is a stream, and the server's backend is connected before the client
has judged: what must not happen is that it sees a byte.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import io
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from cai.host.agent import Agent
from tests.tng.attackers import CountingEngine
from tests.tng.gateways import (
    NONCE,
    World,
    egress_config,
    error_of,
    port_of,
    running,
    serving,
    talk,
)
from tests.tng.guests import agent_of, at_socket, lax
from tests.tng.stock_peers import StockService
from tng.channel.link import accept
from tng.config.entries import parse
from tng.config.trust import Attest
from tng.operation.journal import Journal
from tng.peers.destination import Destination
from tng.stock.agent import StockAgent
from tng.stock.certificate import CocoEvidence, Identity, make_certificate, runtime_data, spki_der
from tng.stock.identity import IdentityKeeper
from tng.stock.peers import NoJudge, StockPeers
from tng.stock.tls import RAW, server_context

pytestmark = pytest.mark.anyio

REQUEST = b"GET / HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n"
NOW = dt.datetime.now(dt.UTC)


def ingress(port: int, verify: dict[str, object], **more: object) -> dict[str, Any]:
    rule = {
        "in": {"host": "127.0.0.1", "port": 0},
        "out": {"host": "127.0.0.1", "port": port},
    }
    return {"add_ingress": [{"mapping": rule, "verify": verify, **more}]}


@contextlib.asynccontextmanager
async def guest(
    world: World, tmp_path: Path, agent: Agent | None = None, **more: object
) -> AsyncIterator[tuple[int, CountingEngine, str]]:
    """An egress of ours with the real agent, serving both dialects."""
    engine, socket = CountingEngine(), tmp_path / "engine.sock"
    async with (
        at_socket(agent or agent_of(world), tmp_path / "aa.sock") as address,
        serving(engine, socket),
        running(
            egress_config({"unix": str(socket)}, attest={"aa_addr": address}, **more)
        ) as outside,
    ):
        yield port_of(outside, "egress[0]"), engine, address


async def failure(port: int, verify: dict[str, object], **more: object) -> str:
    async with running(ingress(port, verify, **more)) as inside:
        answer = await talk(port_of(inside, "ingress[0]"), REQUEST)
    assert answer.startswith(b"HTTP/1.1 502 "), answer
    return error_of(answer)["message"]


def by_key(world: World, tmp_path: Path, **more: object) -> dict[str, object]:
    return world.verify(binding="key", policy=lax(world, tmp_path), **more)


# Which dialect


async def test_a_guest_of_ours_over_the_stock_dialect(world: World, tmp_path: Path) -> None:
    """An ingress that would speak cai/1 meets a guest that says so, in the other dialect."""

    async def take_ours_away(data: bytes) -> bytes:
        # One in the middle ends whatever offers cai/1, until the client offers the other.
        return b"" if b"cai/1" in data else data

    async with (
        guest(world, tmp_path) as (port, engine, address),
        middle(port, take_ours_away) as between,
    ):
        message = await failure(
            between, by_key(world, tmp_path) | {"binding": "auto"}, attest={"aa_addr": address}
        )
    assert "channel.downgrade" in message
    assert engine.requests == 0


async def test_an_offer_that_was_changed_on_the_way(world: World, tmp_path: Path) -> None:
    """ALPN is under TLS's own transcript: nobody in between changes it."""

    async def other_name(data: bytes) -> bytes:
        return data.replace(b"\x05cai/1", b"\x05xai/1")

    async with (
        guest(world, tmp_path) as (port, engine, _address),
        middle(port, other_name) as between,
    ):
        message = await failure(between, by_key(world, tmp_path) | {"binding": "auto"})
    assert "without evidence" in message
    assert engine.requests == 0


async def test_a_client_that_wants_a_session_takes_no_stock_peer(
    world: World, tmp_path: Path
) -> None:
    keeper = Stolen(make_certificate(key(), None, now=NOW))
    async with stock_server(keeper) as port:
        message = await failure(port, world.verify())
    assert "without evidence" in message


async def test_a_client_of_ours_over_the_stock_dialect(world: World, tmp_path: Path) -> None:
    """The other way round: a client that says it speaks cai/1 must not come by RATS-TLS."""
    log, socket = io.StringIO(), tmp_path / "engine.sock"
    engine = CountingEngine()
    verify = by_key(world, tmp_path) | {"binding": "auto"}
    async with at_socket(agent_of(world), tmp_path / "aa.sock") as address:
        config = egress_config({"unix": str(socket)}, attest={"aa_addr": address}, verify=verify)
        async with serving(engine, socket), running(config, None, log) as outside:
            port = port_of(outside, "egress[0]")
            attest = Attest(tmp_path / "aa.sock")
            journal = Journal(io.StringIO())
            peers = StockPeers(
                "client", NoJudge(), IdentityKeeper("client", attest, journal, dialect=True),
                transport=parse(ingress(port, verify), where="test").ingress[0].transport,  # type: ignore[arg-type]
                filters=(), journal=journal, own=lambda: (),
            )  # fmt: skip
            stream, _proven = await peers.open(Destination("127.0.0.1", port))
            await stream.write(REQUEST)
            with contextlib.suppress(Exception):
                async with asyncio.timeout(5):
                    assert await stream.read() == b""
            await peers.close()
    assert "channel.downgrade" in log.getvalue()
    assert engine.requests == 0


async def test_an_egress_that_demands_sessions_offers_no_stock_dialect(
    world: World, tmp_path: Path
) -> None:
    async with guest(world, tmp_path, verify=world.verify()) as (port, engine, address):
        message = await failure(port, by_key(world, tmp_path), attest={"aa_addr": address})
    assert "without evidence" in message
    assert engine.requests == 0


# Evidence


class Stolen:
    """Presents a certificate that somebody made up."""

    def __init__(self, identity: Identity) -> None:
        self.made = identity


def key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


@contextlib.asynccontextmanager
async def stock_server(stolen: Stolen) -> AsyncIterator[int]:
    context = server_context(stolen.made, demand=False)

    async def choose(_offered: tuple[bytes, ...]) -> Any:
        return context, (RAW,)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pipe = await accept(reader, writer, choose)
        assert await pipe.receive() == b""

    async with serving(serve) as port:
        yield port


async def evidence_of(
    world: World, tmp_path: Path, spki: bytes, agent: Agent | None = None, **claims: str
) -> CocoEvidence:
    path = tmp_path / "victim.sock"
    async with at_socket(agent or agent_of(world), path):
        return await StockAgent(path).collect(runtime_data(spki, **claims))


def gpu_claims(world: World) -> dict[str, str]:
    from cai.attest.statement import gpu_evidence_digest

    digest = gpu_evidence_digest([(item.report, item.chain) for item in world.devices])
    return {"cai-gpu-digest": digest.hex(), "cai-gpu-nonce": NONCE.hex()}


async def test_relayed_evidence_of_another_guest(world: World, tmp_path: Path) -> None:
    """What a guest shows everybody, in a certificate of the relay's own key."""
    victim, relay = key(), key()
    evidence = await evidence_of(
        world, tmp_path, spki_der(victim.public_key()), **gpu_claims(world)
    )
    stolen = Stolen(make_certificate(relay, evidence, now=NOW))
    async with stock_server(stolen) as port:
        message = await failure(port, by_key(world, tmp_path))
    assert "stock.key" in message


async def test_claims_that_the_quote_does_not_bind(world: World, tmp_path: Path) -> None:
    victim, relay = key(), key()
    evidence = await evidence_of(world, tmp_path, spki_der(victim.public_key()))
    forged = replace(evidence, runtime_data=runtime_data(spki_der(relay.public_key())))
    async with stock_server(Stolen(make_certificate(relay, forged, now=NOW))) as port:
        message = await failure(port, by_key(world, tmp_path))
    assert "tdx.report_data" in message


async def test_a_debug_guest(world: World, tmp_path: Path) -> None:
    agent = agent_of(world, world.debug_guest)
    async with guest(world, tmp_path, agent) as (port, engine, _address):
        message = await failure(port, by_key(world, tmp_path))
    assert "tdx.debug" in message
    assert engine.requests == 0


@pytest.mark.parametrize("claims", [True, False], ids=["bound", "unbound"])
async def test_swapped_gpu_evidence(world: World, tmp_path: Path, claims: bool) -> None:
    from cai.attest.rcar import additional_evidence
    from cai.attest.sim import SimulatedPlatform

    other = tmp_path / "other"
    SimulatedPlatform.create(other, now=NOW)
    devices = SimulatedPlatform.load(other / "platform").devices().collect(NONCE)
    own = key()
    bound = gpu_claims(world) if claims else {}
    evidence = await evidence_of(world, tmp_path, spki_der(own.public_key()), **bound)
    swapped = replace(evidence, additional=additional_evidence(devices, None).encode())
    async with stock_server(Stolen(make_certificate(own, swapped, now=NOW))) as port:
        message = await failure(port, by_key(world, tmp_path))
    assert "stock.gpu_digest" in message


async def test_an_old_certificate(world: World, tmp_path: Path) -> None:
    own = key()
    evidence = await evidence_of(world, tmp_path, spki_der(own.public_key()), **gpu_claims(world))
    old = make_certificate(own, evidence, now=NOW - dt.timedelta(hours=2))
    async with stock_server(Stolen(old)) as port:
        message = await failure(port, by_key(world, tmp_path))
    assert "stock.certificate" in message


async def test_a_certificate_without_evidence(world: World, tmp_path: Path) -> None:
    async with stock_server(Stolen(make_certificate(key(), None, now=NOW))) as port:
        message = await failure(port, by_key(world, tmp_path))
    assert "stock." in message


async def test_a_passport_where_evidence_is_verified(world: World, tmp_path: Path) -> None:
    passport = make_certificate(key(), StockService().sign({"exp": 2**31}), now=NOW)
    async with stock_server(Stolen(passport)) as port:
        message = await failure(port, by_key(world, tmp_path))
    assert "stock.model" in message


async def test_who_asks_for_a_ticket_takes_no_stock_evidence(
    world: World, tmp_path: Path
) -> None:
    async with guest(world, tmp_path) as (port, engine, _address):
        message = await failure(port, by_key(world, tmp_path, kbs_key="ab" * 32))
    assert "ticket.present" in message
    assert engine.requests == 0


@pytest.mark.parametrize("refused", ["stopped", "no-dialect"])
async def test_a_guest_whose_agent_serves_no_stock_evidence(
    world: World, tmp_path: Path, refused: str
) -> None:
    agent = agent_of(world, **({"dialects": ("cai/1",)} if refused == "no-dialect" else {}))
    if refused == "stopped":
        agent.stop("the release was revoked")
    async with guest(world, tmp_path, agent) as (port, engine, _address):
        message = await failure(port, by_key(world, tmp_path))
    assert "without evidence" in message
    assert engine.requests == 0


Change = Any


@contextlib.asynccontextmanager
async def middle(target: int, change: Change) -> AsyncIterator[int]:
    """Somebody between client and guest who may change the client's first message."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first = await change(await reader.read(65536))
        if not first:
            return
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", target)
        far_writer.write(first)

        async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            while data := await source.read(65536):
                sink.write(data)
            sink.close()

        try:
            await asyncio.gather(copy(reader, far_writer), copy(far_reader, writer))
        finally:
            far_writer.close()

    async with serving(serve) as port:
        yield port
