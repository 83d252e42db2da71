"""An ingress and an egress over loopback: what passes, and how it passes."""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.tng.gateways import (
    MODEL,
    FakeAgent,
    Handler,
    World,
    echo_engine,
    egress_config,
    port_of,
    proxy_config,
    read_request,
    running,
    serving,
    talk,
)

pytestmark = pytest.mark.anyio


@dataclass
class Pair:
    """A running pair: the proxy's port and the peer as clients name it."""

    proxy: int
    egress: int
    log: io.StringIO

    @property
    def peer(self) -> bytes:
        return f"127.0.0.1:{self.egress}".encode()

    def get(self, path: str = "/v1/models", *, close: bool = True) -> bytes:
        head = f"GET http://127.0.0.1:{self.egress}{path} HTTP/1.1\r\n".encode()
        ending = b"connection: close\r\n" if close else b""
        return head + b"host: " + self.peer + b"\r\n" + ending + b"\r\n"


@contextlib.asynccontextmanager
async def pair(
    world: World, agent: FakeAgent, engine: Handler, tmp_path: Path, **verify: object
) -> AsyncIterator[Pair]:
    log = io.StringIO()
    socket = tmp_path / "engine.sock"
    async with (
        serving(engine, socket),
        running(egress_config({"unix": str(socket)}), agent, log) as outside,
        running(proxy_config(world.verify(**verify)), log=log) as inside,
    ):
        yield Pair(port_of(inside, "ingress[0]"), port_of(outside, "egress[0]"), log)


async def test_a_request_passes_and_the_answer_says_how(
    world: World, agent: FakeAgent, tmp_path: Path
) -> None:
    async with pair(world, agent, echo_engine, tmp_path) as gateways:
        answer = await talk(gateways.proxy, gateways.get("/v1/models?x=1"))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert b"cai-attested: session; SIMULATED" in head
    assert body == b"GET /v1/models?x=1 HTTP/1.1|"


async def test_a_name_of_two_families_reaches_the_one_that_listens(
    world: World, agent: FakeAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def getaddrinfo(_loop: object, _host: str, port: int, **_kw: object) -> list[tuple]:
        return [(10, 1, 6, "", ("::1", port, 0, 0)), (2, 1, 6, "", ("127.0.0.1", port))]

    async with pair(world, agent, echo_engine, tmp_path) as gateways:
        monkeypatch.setattr(asyncio.base_events.BaseEventLoop, "getaddrinfo", getaddrinfo)
        request = gateways.get().replace(b"127.0.0.1", b"localhost")
        answer = await talk(gateways.proxy, request)
    assert answer.startswith(b"HTTP/1.1 200")


async def test_the_log_has_no_content(world: World, agent: FakeAgent, tmp_path: Path) -> None:
    request = (
        b"POST http://PEER/secret-path HTTP/1.1\r\nhost: PEER\r\nauthorization: Bearer tok\r\n"
    )
    async with pair(world, agent, echo_engine, tmp_path) as gateways:
        request = request.replace(b"PEER", gateways.peer)
        await talk(
            gateways.proxy,
            request + b"content-length: 6\r\nconnection: close\r\n\r\nprompt",
        )
        log = gateways.log.getvalue()
    assert "POST 127.0.0.1" in log
    assert "-> 200" in log
    for word in ("secret-path", "tok", "prompt"):
        assert word not in log


async def test_what_the_engine_gets(world: World, agent: FakeAgent, tmp_path: Path) -> None:
    heads: list[bytes] = []

    async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head, body = await read_request(reader)
        heads.append(head + body)
        writer.write(
            b"HTTP/1.1 200 OK\r\ncai-attested: forged\r\nkeep-alive: 5\r\n"
            b"connection: x-inner\r\nx-inner: 1\r\ncontent-length: 0\r\n\r\n"
        )

    async with pair(world, agent, engine, tmp_path) as gateways:
        answer = await talk(
            gateways.proxy,
            b"POST http://" + gateways.peer + b"/a HTTP/1.1\r\nhost: " + gateways.peer
            + b"\r\nproxy-connection: keep-alive\r\nproxy-authorization: Basic x\r\n"
            b"connection: close, x-hop\r\nx-hop: 1\r\nx-end: 2\r\ncontent-length: 2\r\n\r\nhi",
        )  # fmt: skip
    head = heads[0].lower()
    assert head.startswith(b"post /a http/1.1\r\nhost: 127.0.0.1:")
    assert b"x-end: 2" in head
    assert head.endswith(b"hi")
    for gone in (b"proxy-connection", b"proxy-authorization", b"x-hop", b"keep-alive"):
        assert gone not in head
    assert b"forged" not in answer
    assert b"x-inner" not in answer


async def test_one_channel_serves_fifty_concurrent_requests(
    world: World, agent: FakeAgent, tmp_path: Path
) -> None:
    arrived = 0
    everybody = asyncio.Event()

    async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal arrived
        arrived += 1
        if arrived == 50:
            everybody.set()
        # Nobody is answered before all have come: only concurrent streams get through.
        await asyncio.wait_for(everybody.wait(), 20)
        await echo_engine(reader, writer)

    async with pair(world, agent, engine, tmp_path) as gateways:
        answers = await asyncio.gather(
            *(talk(gateways.proxy, gateways.get(f"/{number}")) for number in range(50))
        )
    for number, answer in enumerate(answers):
        assert answer.endswith(f"GET /{number} HTTP/1.1|".encode())
    assert len(agent.calls) == 1


async def test_keep_alive_serves_requests_in_turn(
    world: World, agent: FakeAgent, tmp_path: Path
) -> None:
    async with pair(world, agent, echo_engine, tmp_path) as gateways:
        two = gateways.get("/1", close=False) + gateways.get("/2")
        answer = await talk(gateways.proxy, two)
    assert answer.count(b"HTTP/1.1 200") == 2
    assert answer.index(b"GET /1 ") < answer.index(b"GET /2 ")
    assert len(agent.calls) == 1


async def test_a_streamed_response_is_not_held_back(
    world: World, agent: FakeAgent, tmp_path: Path
) -> None:
    client_has_first = asyncio.Event()

    async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
            b"transfer-encoding: chunked\r\n\r\n9\r\ndata: 1\n\n\r\n"
        )
        await asyncio.wait_for(client_has_first.wait(), 20)
        writer.write(b"9\r\ndata: 2\n\n\r\n0\r\n\r\n")

    async with pair(world, agent, engine, tmp_path) as gateways:
        reader, writer = await asyncio.open_connection("127.0.0.1", gateways.proxy)
        writer.write(gateways.get())
        async with asyncio.timeout(20):
            await reader.readuntil(b"data: 1\n\n")
            client_has_first.set()
            rest = await reader.read()
        writer.close()
    assert b"data: 2\n\n" in rest
    assert rest.endswith(b"0\r\n\r\n")


async def test_bodies_larger_than_every_window(
    world: World, agent: FakeAgent, tmp_path: Path
) -> None:
    body = bytes(range(256)) * 12288  # 3 MiB

    async with pair(world, agent, echo_engine, tmp_path) as gateways:
        answer = await talk(
            gateways.proxy,
            b"POST http://" + gateways.peer + b"/ HTTP/1.1\r\nhost: " + gateways.peer
            + b"\r\nconnection: close\r\ncontent-length: " + str(len(body)).encode()
            + b"\r\n\r\n" + body,
        )  # fmt: skip
    assert answer.endswith(b"POST / HTTP/1.1|" + body)


async def test_a_stalled_reader_stalls_no_other_stream(
    world: World, agent: FakeAgent, tmp_path: Path
) -> None:
    async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head, _body = await read_request(reader)
        if head.startswith(b"GET /big "):
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 33554432\r\n\r\n")
            for _chunk in range(512):
                writer.write(bytes(65536))
                await writer.drain()
        else:
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")

    async with pair(world, agent, engine, tmp_path) as gateways:
        reader, writer = await asyncio.open_connection("127.0.0.1", gateways.proxy)
        writer.write(gateways.get("/big"))
        await reader.readexactly(100)
        # Nothing more of /big is read for now.
        answer = await talk(gateways.proxy, gateways.get("/small"))
        assert answer.endswith(b"ok")
        async with asyncio.timeout(60):
            rest = await reader.read(-1)
        writer.close()
    assert len(rest) > 33554432 - 1000
    assert len(agent.calls) == 1


async def test_a_client_that_leaves_frees_the_engine(
    world: World, agent: FakeAgent, tmp_path: Path
) -> None:
    arrived, left = asyncio.Event(), asyncio.Event()

    async def engine(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        arrived.set()
        await reader.read()
        left.set()

    async with pair(world, agent, engine, tmp_path) as gateways:
        _reader, writer = await asyncio.open_connection("127.0.0.1", gateways.proxy)
        writer.write(gateways.get())
        await asyncio.wait_for(arrived.wait(), 15)
        writer.close()
        await asyncio.wait_for(left.wait(), 15)


async def test_chunked_upload_and_expect_continue(
    world: World, agent: FakeAgent, tmp_path: Path
) -> None:
    async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await reader.readuntil(b"0\r\n\r\n")
        assert b"hello" in body
        writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")

    async with pair(world, agent, engine, tmp_path) as gateways:
        reader, writer = await asyncio.open_connection("127.0.0.1", gateways.proxy)
        writer.write(
            b"POST http://" + gateways.peer + b"/ HTTP/1.1\r\nhost: " + gateways.peer
            + b"\r\nexpect: 100-continue\r\nconnection: close\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )  # fmt: skip
        async with asyncio.timeout(15):
            assert b"100" in await reader.readuntil(b"\r\n\r\n")
            writer.write(b"5\r\nhello\r\n0\r\n\r\n")
            assert b"204" in await reader.read()
        writer.close()


async def test_connect_tunnels_bytes_and_half_closes(
    world: World, agent: FakeAgent, tmp_path: Path
) -> None:
    async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        said = await reader.read()  # until the client's half-close
        writer.write(b"you said " + said)

    async with pair(world, agent, engine, tmp_path) as gateways:
        reader, writer = await asyncio.open_connection("127.0.0.1", gateways.proxy)
        # The client does not wait for the 200 before it talks.
        connect = b"CONNECT PEER HTTP/1.1\r\nhost: PEER\r\n\r\n"
        writer.write(connect.replace(b"PEER", gateways.peer) + b"hel")
        async with asyncio.timeout(15):
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 ")
            assert b"cai-attested: session; SIMULATED" in head
            writer.write(b"lo")
            writer.write_eof()
            assert await reader.read() == b"you said hello"
        writer.close()


async def test_mapping_ingress_carries_any_protocol(
    world: World, agent: FakeAgent, tmp_path: Path
) -> None:
    async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 hello\n")
        writer.write(b"got " + await reader.readline())

    socket = tmp_path / "engine.sock"
    async with (
        serving(engine, socket),
        running(egress_config({"unix": str(socket)}), agent) as outside,
    ):
        config = {
            "add_ingress": [
                {
                    "mapping": {
                        "in": {"host": "127.0.0.1", "port": 0},
                        "out": {"host": "127.0.0.1", "port": port_of(outside, "egress[0]")},
                    },
                    "verify": world.verify(),
                    "padding": "off",
                }
            ]
        }
        async with running(config) as inside:
            answer = await talk(port_of(inside, "ingress[0]"), b"EHLO\n")
    assert answer == b"220 hello\ngot EHLO\n"


async def test_tcp_upstream_on_loopback(world: World, agent: FakeAgent) -> None:
    async with (
        serving(echo_engine) as engine,
        running(egress_config({"host": "127.0.0.1", "port": engine}), agent) as outside,
        running(proxy_config(world.verify())) as inside,
    ):
        peer = f"127.0.0.1:{port_of(outside, 'egress[0]')}"
        request = f"GET http://{peer}/ HTTP/1.1\r\nhost: {peer}\r\nconnection: close\r\n\r\n"
        answer = await talk(port_of(inside, "ingress[0]"), request.encode())
    assert answer.endswith(b"GET / HTTP/1.1|")


async def test_an_expectation_that_holds(world: World, agent: FakeAgent, tmp_path: Path) -> None:
    expect = {"model_root": MODEL.root, "service": "demo", "launch": "ab" * 48}
    async with pair(world, agent, echo_engine, tmp_path, expect=expect) as gateways:
        answer = await talk(gateways.proxy, gateways.get())
    assert answer.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("padding", ["bucket", "off"])
async def test_the_ends_need_not_agree_on_padding(
    world: World, agent: FakeAgent, tmp_path: Path, padding: str
) -> None:
    socket = tmp_path / "engine.sock"
    async with (
        serving(echo_engine, socket),
        running(egress_config({"unix": str(socket)}, padding=padding), agent) as outside,
        running(proxy_config(world.verify())) as inside,
    ):
        peer = f"127.0.0.1:{port_of(outside, 'egress[0]')}"
        request = f"GET http://{peer}/ HTTP/1.1\r\nhost: {peer}\r\nconnection: close\r\n\r\n"
        answer = await talk(port_of(inside, "ingress[0]"), request.encode())
    assert answer.endswith(b"GET / HTTP/1.1|")


async def test_a_channel_past_its_age_is_replaced(
    world: World, agent: FakeAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pair(world, agent, echo_engine, tmp_path) as gateways:
        await talk(gateways.proxy, gateways.get())
        loop = asyncio.get_running_loop()
        real = loop.time
        monkeypatch.setattr(loop, "time", lambda: real() + 16 * 60)
        answer = await talk(gateways.proxy, gateways.get())
    assert answer.startswith(b"HTTP/1.1 200")
    assert len(agent.calls) == 2


async def test_old_gpu_evidence_shortens_the_session(
    world: World, agent: FakeAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tng.peers import judge

    ages: list[float] = []
    real = judge.max_age
    monkeypatch.setattr(
        judge, "max_age", lambda evidence: ages.append(real(evidence)) or ages[-1]
    )
    gpu = agent.evidence([bytes(32)])
    from cai.attest.statement import ChannelStatement, GpuFacts

    said = ChannelStatement.decode(gpu.statement).gpu
    agent.changes = {"gpu": GpuFacts(said.digest, said.nonce, 880)}
    async with pair(world, agent, echo_engine, tmp_path) as gateways:
        answer = await talk(gateways.proxy, gateways.get())
    assert answer.startswith(b"HTTP/1.1 200")
    assert ages == [20]
