"""Streams of the stock dialect: raw, and multiplexed by HTTP/2."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
from collections.abc import AsyncIterator, Awaitable, Callable

import h2.config
import h2.connection
import h2.events
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from cai.errors import PeerError, PeerUnreachable, PeerWithoutEvidence
from tests.tng.gateways import serving
from tng.channel.link import accept, dial
from tng.channel.pipe import TlsPipe
from tng.stock import multiplex
from tng.stock.certificate import CocoEvidence, make_certificate, runtime_data, spki_der
from tng.stock.multiplex import Multiplex, MultiplexStream
from tng.stock.raw import RawStream
from tng.stock.tls import MULTIPLEX, RAW, client_context, server_context
from tng.streams import StreamReset

pytestmark = pytest.mark.anyio

IDENTITY = make_certificate(
    ec.generate_private_key(ec.SECP256R1()), None, now=dt.datetime.now(dt.UTC)
)


@contextlib.asynccontextmanager
async def pipes(protocol: bytes) -> AsyncIterator[tuple[TlsPipe, TlsPipe]]:
    """Both ends of one TLS connection, the client's first."""
    context = server_context(IDENTITY, demand=False)
    arrived: asyncio.Future[TlsPipe] = asyncio.get_running_loop().create_future()
    done = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def choose(_offered: tuple[bytes, ...]):  # type: ignore[no-untyped-def]
            return context, (protocol,)

        arrived.set_result(await accept(reader, writer, choose))
        await done.wait()

    async with serving(serve) as port:
        near = await dial(
            "127.0.0.1", port, client_context(None, (protocol,)), server_name=None,
            protocols=(protocol,),
        )  # fmt: skip
        try:
            yield near, await arrived
        finally:
            done.set()
            near.abort()


# Raw


async def test_raw_bytes_and_half_closes() -> None:
    async with pipes(RAW) as (one, two):
        near, far = RawStream(one), RawStream(two)
        await near.write(b"question")
        await near.finish()
        assert await far.read() == b"question"
        assert await far.read() == b""
        await far.write(b"answer")
        await far.finish()
        assert await near.read() == b"answer"
        assert await near.read() == b""
        assert near.over
        assert far.over


async def test_a_raw_connection_that_is_cut_is_no_end() -> None:
    """An end of TCP is not an end of the stream: only close_notify is."""
    async with pipes(RAW) as (one, two):
        near = RawStream(one)
        two.abort()
        with pytest.raises(PeerError):
            await near.read()


async def test_a_raw_stream_that_was_given_up() -> None:
    async with pipes(RAW) as (one, two):
        near, far = RawStream(one), RawStream(two)
        near.reset()
        with pytest.raises(StreamReset):
            await near.write(b"x")
        with pytest.raises(StreamReset):
            await near.read()
        with pytest.raises(PeerError):
            await far.read()


@pytest.mark.parametrize(("size", "taken"), [(90 * 1024, True), (101 * 1024, False)])
async def test_how_long_a_certificate_may_be(size: int, taken: bool) -> None:
    """OpenSSL takes 100 KiB: the evidence of a guest with many GPUs has to come over cai/1."""
    key = ec.generate_private_key(ec.SECP256R1())
    evidence = CocoEvidence("tdx", bytes(size), None, runtime_data(spki_der(key.public_key())))
    identity = make_certificate(key, evidence, now=dt.datetime.now(dt.UTC))

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def choose(_offered: tuple[bytes, ...]):  # type: ignore[no-untyped-def]
            return server_context(identity, demand=False), (RAW,)

        await accept(reader, writer, choose)

    async with serving(serve) as port:
        dialled = dial(
            "127.0.0.1", port, client_context(None, (RAW,)), server_name=None, protocols=(RAW,)
        )
        if taken:
            (await dialled).abort()
            return
        with pytest.raises(PeerWithoutEvidence, match="longer than 102400 bytes"):
            await dialled


# Multiplexed

Work = Callable[[MultiplexStream], Awaitable[None]]


async def echo(stream: MultiplexStream) -> None:
    await stream.accept()
    while data := await stream.read():
        await stream.write(data)
    await stream.finish()


@contextlib.asynccontextmanager
async def pair(work: Work = echo) -> AsyncIterator[tuple[Multiplex, Multiplex]]:
    async with pipes(MULTIPLEX) as (one, two):
        near, far = Multiplex(one), Multiplex(two, handler=work)
        try:
            yield near, far
        finally:
            await near.close()
            await far.close()


async def test_many_streams_and_large_bodies() -> None:
    body = bytes(range(256)) * 12288  # 3 MiB, beyond every window

    async def one(connection: Multiplex) -> bytes:
        stream = await connection.open()
        await stream.opened()

        async def send() -> None:
            await stream.write(body)
            await stream.finish()

        sending = asyncio.create_task(send())
        got = bytearray()
        while data := await stream.read():
            got += data
        await sending
        return bytes(got)

    async with pair() as (near, _far):
        assert await asyncio.gather(*(one(near) for _ in range(3))) == [body] * 3


async def test_a_server_that_resets() -> None:
    async def refuse(stream: MultiplexStream) -> None:
        stream.reset()

    async with pair(refuse) as (near, _far):
        stream = await near.open()
        with pytest.raises(StreamReset):
            await stream.opened()


async def test_a_connection_that_is_cut_ends_every_stream() -> None:
    async def wait(stream: MultiplexStream) -> None:
        await stream.accept()
        await stream.read()

    async with pair(wait) as (near, far):
        streams = [await near.open() for _ in range(3)]
        for stream in streams:
            await stream.opened()
        await far.close()
        for stream in streams:
            with pytest.raises(PeerError):
                await stream.read()
        assert not near.usable
        with pytest.raises(PeerUnreachable):
            await near.open()


async def test_a_connection_that_leaves_takes_no_stream() -> None:
    async with pair() as (near, far):
        running = await near.open()
        await running.opened()
        far.leave()
        late = await near.open()
        with pytest.raises(PeerError):
            await late.opened()
        await running.write(b"still")
        assert await running.read() == b"still"


class Raw:
    """A client of a server end that says in HTTP/2 what a test wants."""

    def __init__(self, pipe: TlsPipe) -> None:
        self.pipe = pipe
        self.http = h2.connection.H2Connection(
            h2.config.H2Configuration(
                header_encoding=None, validate_outbound_headers=False,
                normalize_outbound_headers=False,
            )
        )  # fmt: skip
        self.http.initiate_connection()

    def send(self, data: bytes = b"") -> None:
        self.pipe.put(self.http.data_to_send() + data)

    async def events(self) -> list[h2.events.Event]:
        """Until the connection ends, or nothing more comes."""
        found: list[h2.events.Event] = []
        with contextlib.suppress(TimeoutError, PeerError, Exception):
            async with asyncio.timeout(0.4):
                while True:
                    found += self.http.receive_data(await self.pipe.receive())
        return found


CONNECT = [(":method", "CONNECT"), (":authority", "tng.internal")]


async def against_server(do: Callable[[Raw], None]) -> tuple[list[h2.events.Event], int]:
    served = 0

    async def count(stream: MultiplexStream) -> None:
        nonlocal served
        served += 1
        await echo(stream)

    async with pipes(MULTIPLEX) as (one, two):
        far = Multiplex(two, handler=count)
        raw = Raw(one)
        do(raw)
        with contextlib.suppress(PeerError):
            raw.send()
        events = await raw.events()
        await far.close()
    return events, served


@pytest.mark.parametrize("method", ["GET", "connect", "", "POST"])
async def test_only_connect_is_served(method: str) -> None:
    def other(raw: Raw) -> None:
        raw.http.send_headers(1, [(":method", method), *CONNECT[1:]])

    events, served = await against_server(other)
    answers = [event for event in events if isinstance(event, h2.events.ResponseReceived)]
    assert [dict(answer.headers or ())[b":status"] for answer in answers] == [b"400"]
    assert served == 0


async def test_no_method_at_all() -> None:
    def none(raw: Raw) -> None:
        raw.http.send_headers(1, CONNECT[1:])

    _events, served = await against_server(none)
    assert served == 0


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\x00\x04\x01\x04\x00\x00\x00\x01\xff\xff\xff\xff",  # HPACK that is none
        b"\x00\x00\x08\x00\x00\x00\x00\x00\x05whatever",  # DATA of a stream that is not open
        b"\x01\x00\x01\x00\x00\x00\x00\x00\x01" + bytes(65537),  # a frame that is too long
        b"\x00\x00\x04\x08\x00\x00\x00\x00\x00\x00\x00\x00\x00",  # window of nothing
        b"\x00\x00\x0a\x01\x04\x00\x00\x00\x01\x00\x02\xff\xfe\x01x\x00\x01a\x01b",  # not UTF-8
    ],
)
async def test_broken_http_ends_the_connection_and_nothing_else(data: bytes) -> None:
    async def none(_stream: MultiplexStream) -> None:
        raise AssertionError("served")

    async with pipes(MULTIPLEX) as (one, two):
        far = Multiplex(two, handler=none)
        raw = Raw(one)
        raw.send(data)
        await asyncio.wait_for(far.wait_closed(), 5)
        assert not far.usable


async def test_more_streams_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiplex, "MAX_STREAMS", 3)

    def many(raw: Raw) -> None:
        for number in range(1, 11, 2):
            raw.http.send_headers(number, CONNECT)

    _events, served = await against_server(many)
    assert served <= 3


@pytest.mark.parametrize("status", ["503", "", "2", "\u00b2\u00b2"])
async def test_a_server_that_does_not_say_200(status: str) -> None:
    async with pipes(MULTIPLEX) as (one, two):
        near = Multiplex(one)
        stream = await near.open()
        http = h2.connection.H2Connection(
            h2.config.H2Configuration(client_side=False, validate_outbound_headers=False)
        )
        http.initiate_connection()
        answered = False
        while not answered:
            for event in http.receive_data(await two.receive()):
                if isinstance(event, h2.events.RequestReceived):
                    http.send_headers(1, [(":status", status)])
                    answered = True
            two.put(http.data_to_send())
        with pytest.raises(StreamReset, match="refuses"):
            await asyncio.wait_for(stream.opened(), 5)
        await near.close()
