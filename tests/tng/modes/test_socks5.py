"""The SOCKS5 way in: what it answers, and that nothing goes anywhere unproven."""

from __future__ import annotations

import asyncio
import contextlib
import io
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.tng.gateways import (
    FakeAgent,
    World,
    echo_engine,
    egress_config,
    port_of,
    running,
    serving,
)

pytestmark = pytest.mark.anyio

HELLO = b"\x05\x01\x00"
ASK = b"POST /a HTTP/1.1\r\nhost: h\r\ncontent-length: 2\r\n\r\nhi"


def config(verify: dict[str, object], **more: object) -> dict[str, object]:
    mode = {"proxy_listen": {"host": "127.0.0.1", "port": 0}, **more}
    return {"add_ingress": [{"socks5": mode, "verify": verify}]}


def connect(host: bytes, port: int, kind: int = 3) -> bytes:
    address = bytes([len(host)]) + host if kind == 3 else host
    return bytes([5, 1, 0, kind]) + address + struct.pack(">H", port)


@contextlib.asynccontextmanager
async def pair(
    world: World, directory: Path, **more: object
) -> AsyncIterator[tuple[int, int, io.StringIO]]:
    """A SOCKS5 ingress and an egress; yields both ports and the log."""
    engine, log = directory / "engine.sock", io.StringIO()
    agent = FakeAgent(world, world.guest)
    async with (
        serving(echo_engine, engine),
        running(egress_config({"unix": str(engine)}), agent) as outside,
        running(config(world.verify(), **more), log=log) as inside,
    ):
        yield port_of(inside, "ingress[0]"), port_of(outside, "egress[0]"), log


async def talk(port: int, *parts: bytes) -> list[bytes]:
    """Send each part and read what comes before the next."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answers = []
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
            async with asyncio.timeout(15):
                answers.append(await reader.read(4096))
    except ConnectionError:
        answers.append(b"")
    finally:
        writer.close()
    return answers


@pytest.mark.parametrize("kind", [1, 3])
async def test_a_request_reaches_a_proven_guest(world: World, tmp_path: Path, kind: int) -> None:
    async with pair(world, tmp_path) as (port, peer, log):
        host = b"\x7f\x00\x00\x01" if kind == 1 else b"127.0.0.1"
        answers = await talk(port, HELLO, connect(host, peer, kind), ASK)
    assert answers[0] == b"\x05\x00"
    assert answers[1][:2] == b"\x05\x00"
    assert answers[2].endswith(b"|hi")
    assert "proven" in log.getvalue()


async def test_a_login_is_checked(world: World, tmp_path: Path) -> None:
    login = {"username": "u", "password": "p\u00e4ss"}
    good = b"\x01\x01u\x05p\xc3\xa4ss"
    async with pair(world, tmp_path, auth=login) as (port, peer, log):
        answers = await talk(port, b"\x05\x02\x00\x02", good, connect(b"127.0.0.1", peer), ASK)
        assert answers[1] == b"\x01\x00"
        assert answers[3].endswith(b"|hi")
        for wrong in (b"\x01\x01u\x01x", b"\x01\x01x\x05p\xc3\xa4ss", b"\x01\x00\x00"):
            answers = await talk(port, b"\x05\x02\x00\x02", wrong)
            assert answers[1] == b"\x01\x01"
        assert (await talk(port, HELLO))[0] == b"\x05\xff"
    assert "p\u00e4ss" not in log.getvalue()


@pytest.mark.parametrize(
    ("request_bytes", "code"),
    [
        (b"\x05\x02\x00\x01\x7f\x00\x00\x01\x00\x50", 7),  # BIND
        (b"\x05\x03\x00\x01\x7f\x00\x00\x01\x00\x50", 7),  # UDP ASSOCIATE
        (b"\x05\x01\x00\x02\x00\x00", 8),  # no such address type
        (connect(b"", 80), 1),
        (connect(b"a b", 80), 1),
        (connect(b"127.1", 80), 1),
        (connect(b"0x7f000001", 80), 1),
        (connect(b"[::1]x", 80), 1),
        (connect(b"a:80", 80), 1),
        (connect(b"user@a", 80), 1),
        (connect(b"a", 0), 1),
        (connect(b"\xa9\xfe\xa9\xfe", 80, 1), 2),  # link-local
        (connect(b"169.254.169.254", 80), 2),  # metadata
        (connect(b"100.100.100.200", 80), 2),
        (connect(b"\x00\x00\x00\x00", 80, 1), 2),
        (connect(b"\xfe\x80" + bytes(13) + b"\x01", 80, 4), 2),
        (connect(bytes(10) + b"\xff\xff\xa9\xfe\xa9\xfe", 80, 4), 2),
    ],
)
async def test_what_is_refused(
    world: World, tmp_path: Path, request_bytes: bytes, code: int
) -> None:
    async with running(config(world.verify())) as inside:
        answers = await talk(port_of(inside, "ingress[0]"), HELLO, request_bytes)
    assert answers[1][:2] == bytes([5, code])


@pytest.mark.parametrize(
    "greeting", [b"\x04\x01\x00\x50\x7f\x00\x00\x01\x00", b"GET / HTTP/1.1\r\n\r\n", b"\x05\x00"]
)
async def test_other_greetings_get_nothing(world: World, greeting: bytes) -> None:
    async with running(config(world.verify())) as inside:
        (answer,) = await talk(port_of(inside, "ingress[0]"), greeting)
    assert answer in (b"", b"\x05\xff")


async def test_the_proxy_does_not_go_to_itself(world: World) -> None:
    async with running(config(world.verify())) as inside:
        port = port_of(inside, "ingress[0]")
        answers = await talk(port, HELLO, connect(b"127.0.0.1", port))
    assert answers[1][1] == 2


async def test_what_no_filter_matches_is_refused(world: World, tmp_path: Path) -> None:
    filters = [{"domain": "guest.example"}]
    async with pair(world, tmp_path, dst_filters=filters) as (port, peer, log):
        answers = await talk(port, HELLO, connect(b"127.0.0.1", peer))
    assert answers[1][1] == 2
    assert "destination-refused" in log.getvalue()


async def test_an_unproven_peer_is_not_connected(world: World, tmp_path: Path) -> None:
    seen: list[bytes] = []

    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.read(4096))

    async with serving(plain) as peer, running(config(world.verify())) as inside:
        port = port_of(inside, "ingress[0]")
        answers = await talk(port, HELLO, connect(b"127.0.0.1", peer))
    assert answers[1][1] in (4, 5)
    assert all(b"POST" not in data for data in seen)


async def test_a_client_that_says_nothing_is_let_go(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tng.ingress.socks5.HANDSHAKE_TIMEOUT_S", 0.2)
    async with running(config(world.verify())) as inside:
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", port_of(inside, "ingress[0]")
        )
        async with asyncio.timeout(10):
            assert await reader.read() == b""
        writer.close()
