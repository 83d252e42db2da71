"""What a pair must not do: each refusal with its reason, never a byte on the wrong side."""

from __future__ import annotations

import asyncio
import contextlib
import io
import ssl
from dataclasses import replace
from pathlib import Path

import pytest
from OpenSSL import SSL

from cai.attest.channel import ChannelEvidence
from cai.errors import PeerUnreachable
from tests.tng.attackers import (
    ACK,
    OPEN,
    PROVE,
    READY,
    CountingEngine,
    Impostor,
    get,
    prove,
    raw_client,
    refused,
    refused_behind,
)
from tests.tng.gateways import (
    FakeAgent,
    World,
    echo_engine,
    egress_config,
    error_of,
    port_of,
    proxy_config,
    running,
    serving,
    talk,
)
from tng.channel.frames import Frame, FrameType, parse_reason
from tng.channel.tls import ChannelKey, TlsSession, client_context, server_context
from tng.streams import Code

pytestmark = pytest.mark.anyio


# Evidence that does not pass


async def test_a_debug_guest(world: World, tmp_path: Path) -> None:
    agent = FakeAgent(world, world.debug_guest)
    error = await refused_behind(world, agent, tmp_path)
    assert error["code"] == "evidence-refused"
    assert "tdx.debug" in error["message"]


async def test_a_guest_of_another_measurement(world: World, tmp_path: Path) -> None:
    from cai.attest.sim import GuestSettings, SimulatedPlatform

    platform = SimulatedPlatform.load(world.directory / "platform")
    agent = FakeAgent(world, platform.guest(GuestSettings(image="other")))
    error = await refused_behind(world, agent, tmp_path)
    assert "tdx.mr_td" in error["message"]


async def test_another_model_than_expected(
    world: World, agent: FakeAgent, tmp_path: Path
) -> None:
    error = await refused_behind(world, agent, tmp_path, expect={"model_root": "09" * 32})
    assert "expect.model_root" in error["message"]
    assert "tdx" not in error["message"]


async def test_a_replayed_proof(world: World, agent: FakeAgent, tmp_path: Path) -> None:
    old = agent.evidence([bytes(32)])

    async def replay(_leaf: bytes) -> ChannelEvidence:
        return old

    agent.answer = replay
    error = await refused_behind(world, agent, tmp_path)
    assert "channel.session" in error["message"]


async def test_gpu_reports_that_are_too_old(
    world: World, agent: FakeAgent, tmp_path: Path
) -> None:
    from cai.attest.statement import ChannelStatement

    gpu = ChannelStatement.decode(agent.evidence([bytes(32)]).statement).gpu
    agent.changes = {"gpu": replace(gpu, age_s=901)}
    error = await refused_behind(world, agent, tmp_path)
    assert "channel.gpu_age" in error["message"]


async def test_a_simulated_guest_is_nothing_to_vendor_roots(
    world: World, agent: FakeAgent, tmp_path: Path
) -> None:
    socket = tmp_path / "engine.sock"
    verify = world.verify()
    del verify["unsafe_simulated_root"]
    async with (
        serving(echo_engine, socket),
        running(egress_config({"unix": str(socket)}), agent) as outside,
        running(proxy_config(verify)) as inside,
    ):
        answer = await talk(
            port_of(inside, "ingress[0]"), get(port_of(outside, "egress[0]"))
        )
    assert answer.startswith(b"HTTP/1.1 502 ")
    assert "tdx.genuine" in error_of(answer)["message"]


async def test_no_collateral_is_no_genuine_quote(
    world: World, agent: FakeAgent, tmp_path: Path
) -> None:
    empty = tmp_path / "collateral"
    empty.mkdir()
    error = await refused_behind(world, agent, tmp_path, collateral=str(empty))
    assert error["code"] == "evidence-refused"


async def test_a_relay_between_client_and_guest(
    world: World, agent: FakeAgent, tmp_path: Path
) -> None:
    """A man in the middle with a key of his own passes every frame on between two TLS sessions."""
    engine = CountingEngine()
    socket = tmp_path / "engine.sock"
    async with (
        serving(engine, socket),
        running(egress_config({"unix": str(socket)}), agent) as outside,
    ):
        target = port_of(outside, "egress[0]")

        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            guest_in, guest_out = await asyncio.open_connection("127.0.0.1", target)
            towards_guest = TlsSession(client_context(), server=False)
            towards_client = TlsSession(server_context(ChannelKey()), server=True)
            towards_guest.start()
            guest_out.write(towards_guest.outgoing())
            while not towards_guest.established:
                towards_guest.receive(await guest_in.read(65536))
                guest_out.write(towards_guest.outgoing())

            async def one_way(
                source: asyncio.StreamReader, taken: TlsSession, given: TlsSession
            ) -> None:
                while data := await source.read(65536):
                    plain = taken.receive(data)
                    if plain:
                        given.send(plain)
                    writer.write(towards_client.outgoing())
                    guest_out.write(towards_guest.outgoing())

            while not towards_client.established:
                early = towards_client.receive(await reader.read(65536))
                writer.write(towards_client.outgoing())
                if early:
                    towards_guest.send(early)
                    guest_out.write(towards_guest.outgoing())
            await asyncio.gather(
                one_way(reader, towards_client, towards_guest),
                one_way(guest_in, towards_guest, towards_client),
            )

        async with serving(relay) as port:
            error = await refused(world, port)
    assert "channel.session" in error["message"]
    assert agent.calls
    assert engine.connections == 0


# Peers without evidence


async def test_nobody_there(world: World) -> None:
    async with serving(echo_engine) as port:
        pass
    error = await refused(world, port)
    assert error["code"] == "peer-unreachable"
    assert "refused" in error["message"]


async def test_a_plain_http_server(world: World) -> None:
    async with serving(echo_engine) as port:
        pass

    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(b"HTTP/1.0 400 Bad request syntax\r\n\r\nwhat?")

    async with serving(plain) as port:
        error = await refused(world, port)
    assert error["code"] == "peer-no-evidence"
    assert "answers without evidence" in error["message"]
    assert "plain text" in error["message"]


async def test_a_server_that_closes(world: World) -> None:
    async def closing(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await reader.read(10)

    async with serving(closing) as port:
        error = await refused(world, port)
    assert error["code"] == "peer-no-evidence"
    assert "closed" in error["message"]


async def test_a_silent_server(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tng.channel.link.TLS_TIMEOUT_S", 0.2)

    async def silent(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with serving(silent) as port:
        error = await refused(world, port)
    assert error["code"] == "peer-no-evidence"
    assert "within 0.2 s" in error["message"]


def tls_server(alpn: list[bytes]) -> SSL.Context:
    context = SSL.Context(SSL.TLS_METHOD)
    ChannelKey().install(context)
    if alpn:
        context.set_alpn_select_callback(lambda _c, _o: alpn[0])
    return context


async def test_plain_tls_without_our_alpn(world: World) -> None:
    async def server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tls = SSL.Connection(tls_server([]), None)
        tls.set_accept_state()
        while data := await reader.read(65536):
            tls.bio_write(data)
            with contextlib.suppress(SSL.WantReadError):
                tls.do_handshake()
            with contextlib.suppress(SSL.WantReadError):
                writer.write(tls.bio_read(65536))

    async with serving(server) as port:
        error = await refused(world, port)
    assert error["code"] == "peer-no-evidence"
    assert "not cai/1" in error["message"]


@pytest.mark.parametrize(
    "frames",
    [
        (READY, Frame(FrameType.OPENED, 1), Frame(FrameType.DATA, 1, b"HTTP/1.1 200 OK\r\n\r\n")),
        (READY, ACK, Frame(FrameType.DATA, 1, b"HTTP/1.1 200 OK\r\n\r\n")),
        (READY, ACK, READY),
        (READY, ACK, Frame(FrameType.EVIDENCE, 0, b"{}")),
        (READY, Frame(FrameType.EVIDENCE, 0, b"{}")),
        (ACK, ACK),
        (Frame(FrameType.PROVE, 0, bytes(36)),),
        (Frame(FrameType.GOAWAY),),
        (Frame(FrameType.REFUSE, 0, b"\x00\x03no agent"),),
    ],
    ids=["stripped", "early", "twice", "empty", "no-ack", "acks", "reflect", "away", "refuses"],
)
async def test_an_impostor_gets_no_application_byte(
    world: World, frames: tuple[Frame, ...]
) -> None:
    impostor = Impostor(*frames)
    async with serving(impostor) as port:
        await refused(world, port)
    assert impostor.got
    assert {frame.type for frame in impostor.got} <= {FrameType.PROVE, FrameType.REFUSE}


async def test_an_impostor_that_never_proves(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tng.channel.session.PROOF_TIMEOUT_S", 0.2)
    async with serving(Impostor(READY, ACK)) as port:
        error = await refused(world, port)
    assert error["code"] == "peer-no-evidence"


async def test_frames_that_break_the_table(world: World) -> None:
    async def server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tls = TlsSession(server_context(ChannelKey()), server=True)
        while data := await reader.read(65536):
            tls.receive(data)
            if tls.established:
                tls.send(b"\x7f\x00\x00\x00\x00\x00\x00\x00")
            writer.write(tls.outgoing())

    async with serving(server) as port:
        error = await refused(world, port)
    assert "frame type" in error["message"]


# The guest's side


async def test_no_agent(world: World, tmp_path: Path) -> None:
    """The real client of the agent, and nobody behind its socket."""
    socket = tmp_path / "engine.sock"
    log = io.StringIO()
    config = egress_config({"unix": str(socket)}, attest={"aa_addr": f"unix://{tmp_path}/no.sock"})
    async with serving(echo_engine, socket), running(config, None, log) as outside:
        error = await refused(world, port_of(outside, "egress[0]"))
    assert error["code"] == "peer-no-evidence"
    assert "attestation agent" in error["message"]
    assert str(tmp_path) not in error["message"]
    assert str(tmp_path) in log.getvalue()


async def test_an_agent_that_refuses(world: World, agent: FakeAgent, tmp_path: Path) -> None:
    async def refuse(_leaf: bytes) -> ChannelEvidence:
        raise PeerUnreachable("attestation agent is busy")

    agent.answer = refuse
    error = await refused_behind(world, agent, tmp_path)
    assert error["code"] == "peer-no-evidence"


async def test_no_engine(world: World, agent: FakeAgent, tmp_path: Path) -> None:
    socket = tmp_path / "engine.sock"
    async with running(egress_config({"unix": str(socket)}), agent) as outside:
        error = await refused(world, port_of(outside, "egress[0]"))
    assert error["code"] == "peer-upstream"
    assert "upstream" in error["message"]
    assert str(socket) not in error["message"]


async def test_an_engine_that_speaks_no_http(
    world: World, agent: FakeAgent, tmp_path: Path
) -> None:
    async def engine(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 smtp here\r\n\r\n")

    socket = tmp_path / "engine.sock"
    async with (
        serving(engine, socket),
        running(egress_config({"unix": str(socket)}), agent) as outside,
        running(proxy_config(world.verify())) as inside,
    ):
        answer = await talk(
            port_of(inside, "ingress[0]"), get(port_of(outside, "egress[0]"))
        )
    assert answer.startswith(b"HTTP/1.1 502 ")


async def test_a_response_that_disowns_its_length(
    world: World, agent: FakeAgent, tmp_path: Path
) -> None:
    async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(
            b"HTTP/1.1 200 OK\r\nconnection: content-length\r\ncontent-length: 0\r\n\r\n"
        )

    socket = tmp_path / "engine.sock"
    async with (
        serving(engine, socket),
        running(egress_config({"unix": str(socket)}), agent) as outside,
        running(proxy_config(world.verify())) as inside,
    ):
        answer = await talk(
            port_of(inside, "ingress[0]"), get(port_of(outside, "egress[0]"))
        )
    assert answer.startswith(b"HTTP/1.1 502 ")


async def test_a_fault_of_our_own_is_told_by_kind_only(
    world: World, agent: FakeAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_args: object, **_kw: object) -> None:
        raise ValueError("secret words")

    monkeypatch.setattr("tng.peers.judge.verify_channel", broken)
    log = io.StringIO()
    socket = tmp_path / "engine.sock"
    engine = CountingEngine()
    async with (
        serving(engine, socket),
        running(egress_config({"unix": str(socket)}), agent) as outside,
        running(proxy_config(world.verify()), log=log) as inside,
    ):
        answer = await talk(
            port_of(inside, "ingress[0]"), get(port_of(outside, "egress[0]"))
        )
    assert answer == b""
    assert "ValueError" in log.getvalue()
    assert "secret words" not in log.getvalue()
    assert engine.connections == 0


async def test_a_cut_response_does_not_look_whole(
    world: World, agent: FakeAgent, tmp_path: Path
) -> None:
    async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n")

    socket = tmp_path / "engine.sock"
    async with (
        serving(engine, socket),
        running(egress_config({"unix": str(socket)}), agent) as outside,
        running(proxy_config(world.verify())) as inside,
    ):
        port = port_of(inside, "ingress[0]")
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await _read_to_terminator(port, get(port_of(outside, "egress[0]")))


async def _read_to_terminator(port: int, request: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        async with asyncio.timeout(15):
            await reader.readuntil(b"\r\n0\r\n\r\n")
    finally:
        writer.close()


@pytest.mark.parametrize(
    "first", [b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", b"POST /v1", b"\x00\x00", b"SSH-2.0\r\n"]
)
async def test_a_plain_request_to_the_egress_port(
    agent: FakeAgent, tmp_path: Path, first: bytes
) -> None:
    engine = CountingEngine()
    socket = tmp_path / "engine.sock"
    async with (
        serving(engine, socket),
        running(egress_config({"unix": str(socket)}), agent) as outside,
    ):
        answer = await talk(port_of(outside, "egress[0]"), first)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert f"content-length: {len(body)}".encode() in head
    assert b"attested TLS" in body
    assert engine.connections == 0
    assert not agent.calls


async def test_ordinary_https_to_the_egress_port(agent: FakeAgent, tmp_path: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["http/1.1"])
    async with running(egress_config({"unix": str(tmp_path / "none")}), agent) as outside:
        port = port_of(outside, "egress[0]")
        with pytest.raises(ssl.SSLError, match=r"(?i)no.application.protocol"):
            await asyncio.open_connection("127.0.0.1", port, ssl=context)
    assert not agent.calls


@pytest.mark.parametrize(
    "frames",
    [
        (OPEN, Frame(FrameType.DATA, 1, b"GET / HTTP/1.1\r\n\r\n")),
        (READY, OPEN),
        (PROVE, OPEN, Frame(FrameType.DATA, 1, b"x")),
        (PROVE, PROVE),
        (Frame(FrameType.PROVE, 0, bytes(35) + b"\x01"),),
        (ACK,),
        (Frame(FrameType.EVIDENCE, 0, b"{}"),),
        (PROVE, READY, Frame(FrameType.DATA, 1, b"never opened")),
        (PROVE, READY, OPEN, OPEN),
        (PROVE, READY, Frame(FrameType.OPENED, 7)),
        (PROVE, READY, READY),
        (PROVE, READY, OPEN, Frame(FrameType.FIN, 1), Frame(FrameType.DATA, 1, b"x")),
        (PROVE, READY, OPEN, Frame(FrameType.CREDIT, 1, bytes(4))),
        (PROVE, READY, OPEN, *[Frame(FrameType.DATA, 1, bytes(16376))] * 17),
    ],
)
async def test_a_client_that_breaks_the_protocol_is_cut_off(
    agent: FakeAgent, tmp_path: Path, frames: tuple[Frame, ...]
) -> None:
    async def engine(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(20)  # takes nothing, so that credit runs out
        await reader.read()

    socket = tmp_path / "engine.sock"
    async with (
        serving(engine, socket),
        running(egress_config({"unix": str(socket)}), agent) as outside,
    ):
        got = await raw_client(port_of(outside, "egress[0]"), *frames)
    assert got[-1].type is FrameType.REFUSE
    assert parse_reason(got[-1].payload)[0] is Code.PROTOCOL
    assert FrameType.DATA not in {frame.type for frame in got}


async def test_no_stream_reaches_the_engine_before_the_client_is_ready(
    agent: FakeAgent, tmp_path: Path
) -> None:
    engine = CountingEngine()
    socket = tmp_path / "engine.sock"
    async with (
        serving(engine, socket),
        running(egress_config({"unix": str(socket)}), agent) as outside,
    ):
        await raw_client(port_of(outside, "egress[0]"), PROVE, OPEN)
    assert engine.connections == 0


@pytest.mark.parametrize("seq", [0, 2, 2**32 - 1])
async def test_a_further_proof_under_another_number_ends_the_session(
    agent: FakeAgent, tmp_path: Path, seq: int
) -> None:
    socket = tmp_path / "engine.sock"
    async with running(egress_config({"unix": str(socket)}), agent) as outside:
        got = await raw_client(port_of(outside, "egress[0]"), PROVE, READY, prove(seq))
    assert got[-1].type is FrameType.REFUSE
    assert parse_reason(got[-1].payload)[0] is Code.PROTOCOL
    assert len(agent.calls) == 1


async def test_proofs_that_are_asked_for_too_often_end_the_session(
    agent: FakeAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tng.channel.renewal.MAX_PROOFS_A_MINUTE", 0)
    socket = tmp_path / "engine.sock"
    async with running(egress_config({"unix": str(socket)}), agent) as outside:
        got = await raw_client(port_of(outside, "egress[0]"), PROVE, READY, prove(1))
    assert got[-1].type is FrameType.REFUSE
    assert "in a minute" in parse_reason(got[-1].payload)[1]
    assert len(agent.calls) == 1


async def test_too_many_streams_are_refused_one_by_one(
    agent: FakeAgent, tmp_path: Path
) -> None:
    async def engine(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await reader.read()

    socket = tmp_path / "engine.sock"
    frames = [Frame(FrameType.OPEN, number) for number in range(1, 258)]
    # Ends the session, so that the raw client returns.
    frames.append(Frame(FrameType.READY))
    async with (
        serving(engine, socket),
        running(egress_config({"unix": str(socket)}), agent) as outside,
    ):
        got = await raw_client(port_of(outside, "egress[0]"), PROVE, READY, *frames)
    resets = [frame for frame in got if frame.type is FrameType.RESET]
    assert [frame.stream for frame in resets] == [257]
    assert parse_reason(resets[0].payload)[0] is Code.BUSY


async def test_an_egress_opens_no_stream_past_the_age_of_a_session(
    agent: FakeAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tng.channel.renewal.MAX_SESSION_AGE_S", 0.0)
    engine = CountingEngine()
    socket = tmp_path / "engine.sock"
    async with (
        serving(engine, socket),
        running(egress_config({"unix": str(socket)}), agent) as outside,
    ):
        got = await raw_client(port_of(outside, "egress[0]"), PROVE, READY, OPEN)
    resets = [frame for frame in got if frame.type is FrameType.RESET]
    assert [parse_reason(frame.payload)[0] for frame in resets] == [Code.SHUTTING_DOWN]
    assert FrameType.GOAWAY in {frame.type for frame in got}
    assert engine.connections == 0


@pytest.mark.parametrize(
    ("first", "answered"), [(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n", True), (b"EHLO a\r\n", False)]
)
async def test_a_mapping_without_a_proven_channel(
    world: World, tmp_path: Path, first: bytes, answered: bool
) -> None:
    """A client that speaks HTTP is told; another one gets a closed connection and no byte."""
    engine = CountingEngine()
    socket = tmp_path / "engine.sock"
    agent = FakeAgent(world, world.debug_guest)
    async with (
        serving(engine, socket),
        running(egress_config({"unix": str(socket)}), agent) as outside,
    ):
        out = {"host": "127.0.0.1", "port": port_of(outside, "egress[0]")}
        rule = {"in": {"host": "127.0.0.1", "port": 0}, "out": out}
        config = {"add_ingress": [{"mapping": rule, "verify": world.verify()}]}
        async with running(config) as inside:
            answer = await talk(port_of(inside, "ingress[0]"), first)
    if answered:
        assert answer.startswith(b"HTTP/1.1 502 ")
        assert "tdx.debug" in error_of(answer)["message"]
    else:
        assert answer == b""
    assert engine.connections == 0


async def test_a_client_of_the_egress_that_says_nothing(
    agent: FakeAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tng.channel.link.TLS_TIMEOUT_S", 0.2)
    async with running(egress_config({"unix": str(tmp_path / "none")}), agent) as outside:
        with contextlib.suppress(ConnectionResetError):
            assert await talk(port_of(outside, "egress[0]"), b"") == b""


async def test_a_client_that_proves_nothing_back_is_dropped(
    agent: FakeAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TLS stands, but no PROVE comes: the session does not stay."""
    monkeypatch.setattr("tng.channel.session.PROOF_TIMEOUT_S", 0.2)
    async with running(egress_config({"unix": str(tmp_path / "none")}), agent) as outside:
        got = await raw_client(port_of(outside, "egress[0]"))
    assert [frame.type for frame in got] == [FrameType.READY]
    assert not agent.calls
