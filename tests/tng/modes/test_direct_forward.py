"""``direct_forward``: which plain requests an egress answers, and that no other slips through."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.tng.gateways import (
    FakeAgent,
    World,
    egress_config,
    error_of,
    port_of,
    proxy_config,
    read_request,
    running,
    serving,
    talk,
)

pytestmark = pytest.mark.anyio

DIRECT = [{"http_path": "/health"}, {"http_path": "/public/.*"}]


class Engine:
    """A backend that remembers what it was asked."""

    def __init__(self) -> None:
        self.heads: list[bytes] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head, body = await read_request(reader)
        self.heads.append(head)
        answer = head.split(b"\r\n")[0] + b"|" + body
        size = str(len(answer)).encode()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: " + size + b"\r\n\r\n" + answer)
        await writer.drain()


@contextlib.asynccontextmanager
async def egress(
    world: World, directory: Path, **more: object
) -> AsyncIterator[tuple[int, Engine, io.StringIO]]:
    engine, log = Engine(), io.StringIO()
    path = directory / "engine.sock"
    config = egress_config({"unix": str(path)}, direct_forward=DIRECT, **more)
    async with (
        serving(engine, path),
        running(config, FakeAgent(world, world.guest), log=log) as outside,
    ):
        yield port_of(outside, "egress[0]"), engine, log


def get(path: bytes, *more: bytes) -> bytes:
    return b"\r\n".join([b"GET " + path + b" HTTP/1.1", b"host: guest", *more, b"", b""])


CLOSE = b"connection: close"


async def test_a_plain_request_with_such_a_path_is_answered(world: World, tmp_path: Path) -> None:
    async with egress(world, tmp_path) as (port, engine, _log):
        answer = await talk(port, get(b"/health?x=1", CLOSE))
        assert answer.startswith(b"HTTP/1.1 200")
        assert answer.endswith(b"GET /health?x=1 HTTP/1.1|")
        posted = b"POST /public/a HTTP/1.1\r\nhost: h\r\nconnection: close\r\n"
        chunked = b"transfer-encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n"
        assert (await talk(port, posted + chunked)).startswith(b"HTTP/1.1 200")
    assert b"host: guest" in engine.heads[0].lower()


@pytest.mark.parametrize(
    "path",
    [
        b"/v1/chat/completions",
        b"/",
        b"/healthz",
        b"/xhealth",
        b"/a/health",
        b"/health/",
        b"/HEALTH",
        b"/public",
        b"/public/../v1/models",
        b"/public/..",
        b"/public/./a",
        b"/public//v1",
        b"/public/%2e%2e/v1/models",
        b"/public/%2Fv1",
        b"/public/a%5c..%5cv1",
        b"/public/a\\..\\v1",
        b"/public/%00",
        b"/v1/models?/health",
        b"/v1/models#/health",
        b"http://guest/health",
        b"http://169.254.169.254/public/a",
        b"*",
        b"/public/" + b"a" * 5000,
    ],
)
async def test_every_other_path_is_refused(world: World, tmp_path: Path, path: bytes) -> None:
    async with egress(world, tmp_path) as (port, engine, _log):
        answer = await talk(port, get(path))
    assert answer[:12] in (b"HTTP/1.1 403", b"HTTP/1.1 400"), answer
    assert engine.heads == []


async def test_connect_is_refused(world: World, tmp_path: Path) -> None:
    async with egress(world, tmp_path) as (port, engine, _log):
        answer = await talk(port, b"CONNECT /health HTTP/1.1\r\nhost: h\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 4")
    assert engine.heads == []


async def test_each_request_of_a_connection_is_judged(world: World, tmp_path: Path) -> None:
    async with egress(world, tmp_path) as (port, engine, log):
        answers = await talk(
            port, get(b"/health") + get(b"/health") + get(b"/v1/models") + get(b"/health")
        )
    assert answers.count(b"HTTP/1.1 200") == 2
    assert answers.count(b"HTTP/1.1 403") == 1
    assert error_of(answers[answers.index(b"HTTP/1.1 403") :])["code"] == "direct-forward-refused"
    assert len(engine.heads) == 2
    assert "/v1/models" not in log.getvalue()


@pytest.mark.parametrize(
    "request_bytes",
    [
        # Two parsers could see another request inside the first one's body.
        b"POST /health HTTP/1.1\r\nhost: h\r\ncontent-length: 6\r\n"
        b"transfer-encoding: chunked\r\n\r\n0\r\n\r\nGET /v1 HTTP/1.1\r\nhost: h\r\n\r\n",
        b"POST /health HTTP/1.1\r\nhost: h\r\ncontent-length: 0\r\ncontent-length: 40\r\n\r\n"
        b"GET /v1 HTTP/1.1\r\nhost: h\r\n\r\n",
        b"GET /health HTTP/1.1\nhost: h\n\nGET /v1 HTTP/1.1\r\nhost: h\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
        b"GET /health\r\n\r\n",
        b"\x00\x01\x02\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
async def test_malformed_requests_reach_no_backend(
    world: World, tmp_path: Path, request_bytes: bytes
) -> None:
    async with egress(world, tmp_path) as (port, engine, _log):
        answer = await talk(port, request_bytes)
    assert b" 200" not in answer[:15]
    assert engine.heads == []


async def test_an_upgrade_opens_no_tunnel(world: World, tmp_path: Path) -> None:
    async with egress(world, tmp_path) as (port, engine, _log):
        more = (b"connection: upgrade", b"upgrade: websocket")
        await talk(port, get(b"/health", *more), until_close=False)
    assert b"upgrade: websocket" not in engine.heads[0].lower()


async def test_a_silent_client_is_let_go(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tng.egress.direct.TLS_TIMEOUT_S", 0.2)
    async with egress(world, tmp_path) as (port, _engine, _log):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        async with asyncio.timeout(10):
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
        writer.close()


async def test_a_dead_backend_is_told_without_its_address(world: World, tmp_path: Path) -> None:
    config = egress_config({"unix": str(tmp_path / "none.sock")}, direct_forward=DIRECT)
    async with running(config, FakeAgent(world, world.guest)) as outside:
        answer = await talk(port_of(outside, "egress[0]"), get(b"/health"))
    assert answer.startswith(b"HTTP/1.1 502")
    assert b"none.sock" not in answer


async def test_attested_sessions_pass_as_ever_and_it_is_shown(
    world: World, tmp_path: Path
) -> None:
    async with (
        egress(world, tmp_path) as (port, engine, _log),
        running(proxy_config(world.verify())) as inside,
    ):
        host = f"127.0.0.1:{port}"
        asked = f"GET http://{host}/v1/models HTTP/1.1\r\nhost: {host}\r\n".encode()
        answer = await talk(port_of(inside, "ingress[0]"), asked + CLOSE + b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200")
    assert len(engine.heads) == 1


async def test_without_it_a_plain_request_is_refused(world: World, tmp_path: Path) -> None:
    config = egress_config({"unix": str(tmp_path / "none.sock")})
    async with running(config, FakeAgent(world, world.guest)) as outside:
        answer = await talk(port_of(outside, "egress[0]"), get(b"/health"))
    assert answer.startswith(b"HTTP/1.1 400")
    assert json.dumps(DIRECT).encode() not in answer
