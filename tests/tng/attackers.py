"""Peers and people in the middle as tests need them, and what a client learns that meets them."""

from __future__ import annotations

import asyncio
from pathlib import Path

from cai.errors import PeerError
from tests.tng.gateways import (
    FakeAgent,
    World,
    echo,
    egress_config,
    error_of,
    port_of,
    proxy_config,
    read_request,
    running,
    serving,
    talk,
)
from tng.channel.frames import Frame, FrameDecoder, FrameType, encode
from tng.channel.tls import ChannelKey, TlsSession, client_context, server_context


def get(port: int) -> bytes:
    return (
        f"GET http://127.0.0.1:{port}/ HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\n"
        "connection: close\r\n\r\n"
    ).encode()


def connect(port: int) -> bytes:
    return f"CONNECT 127.0.0.1:{port} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\n\r\n".encode()


async def refused(world: World, port: int, **verify: object) -> dict[str, str]:
    """What a client learns that asks for this peer, by GET and by CONNECT alike."""
    async with running(proxy_config(world.verify(**verify))) as inside:
        proxy = port_of(inside, "ingress[0]")
        answer = await talk(proxy, get(port))
        tunnel = await talk(proxy, connect(port))
    assert answer.startswith(b"HTTP/1.1 502 "), answer
    assert tunnel.startswith(b"HTTP/1.1 502 "), tunnel
    assert error_of(tunnel)["code"] == error_of(answer)["code"]
    return error_of(answer)


class CountingEngine:
    """An engine that counts its connections, and those on which a byte came."""

    def __init__(self) -> None:
        self.connections = 0
        self.requests = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            head, body = await read_request(reader)
        except asyncio.IncompleteReadError as error:
            self.requests += bool(error.partial)
            raise
        self.requests += 1
        writer.write(echo(head, body))
        await writer.drain()


async def refused_behind(
    world: World, agent: FakeAgent, tmp_path: Path, **verify: object
) -> dict[str, str]:
    """As ``refused``, with a real egress; its engine must see nothing."""
    engine = CountingEngine()
    socket = tmp_path / "engine.sock"
    async with (
        serving(engine, socket),
        running(egress_config({"unix": str(socket)}), agent) as outside,
    ):
        error = await refused(world, port_of(outside, "egress[0]"), **verify)
    assert engine.connections == 0
    return error


class Impostor:
    """Speaks ``cai/1`` TLS, then sends whatever frames a test gives; keeps what it got."""

    def __init__(self, *frames: Frame) -> None:
        self.frames = frames
        self.got: list[Frame] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tls = TlsSession(server_context(ChannelKey()), server=True)
        decoder = FrameDecoder()
        greeted = False
        while data := await reader.read(65536):
            self.got += decoder.feed(tls.receive(data))
            if tls.established and not greeted:
                greeted = True
                for frame in self.frames:
                    tls.send(encode(frame))
            writer.write(tls.outgoing())


ACK = Frame(FrameType.ACK, 0, bytes(32))
READY = Frame(FrameType.READY)


async def raw_client(
    port: int, *frames: Frame, key: ChannelKey | None = None
) -> list[Frame]:
    """A client of an egress that sends these frames after TLS; what it is answered until close."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    tls = TlsSession(client_context(key), server=False)
    tls.start()
    writer.write(tls.outgoing())
    decoder = FrameDecoder()
    got: list[Frame] = []
    sent = False
    try:
        async with asyncio.timeout(15):
            while data := await reader.read(65536):
                try:
                    got += decoder.feed(tls.receive(data))
                except PeerError:
                    break
                if tls.established and not sent:
                    sent = True
                    for frame in frames:
                        tls.send(encode(frame))
                writer.write(tls.outgoing())
    except OSError:
        pass
    finally:
        writer.close()
    return got


PROVE = Frame(FrameType.PROVE, 0, bytes(36))
OPEN = Frame(FrameType.OPEN, 1)


def prove(seq: int) -> Frame:
    return Frame(FrameType.PROVE, 0, bytes(32) + seq.to_bytes(4, "big"))
