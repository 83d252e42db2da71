"""``on_mismatch: direct``, and a mapping with several targets."""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

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

pytestmark = pytest.mark.anyio

FILTERS = [{"domain": "guest.example"}]


def get(port: int, body: bytes = b"hi") -> bytes:
    host = f"127.0.0.1:{port}"
    head = f"POST http://{host}/a HTTP/1.1\r\nhost: {host}\r\ncontent-length: {len(body)}\r\n"
    return head.encode() + b"connection: close\r\n\r\n" + body


async def test_what_no_filter_matches_goes_out_in_clear_where_the_entry_says_so(
    world: World,
) -> None:
    proxy = proxy_config(world.verify(), dst_filters=FILTERS, on_mismatch="direct")
    async with serving(echo_engine) as plain, running(proxy) as inside:
        answer = await talk(port_of(inside, "ingress[0]"), get(plain))
    assert answer.endswith(b"|hi")
    assert b"cai-attested: none" in answer.lower()


async def test_else_it_is_refused_and_nobody_is_asked(world: World) -> None:
    asked: list[bytes] = []

    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.read(100))

    proxy = proxy_config(world.verify(), dst_filters=FILTERS)
    async with serving(plain) as port, running(proxy) as inside:
        answer = await talk(port_of(inside, "ingress[0]"), get(port))
    assert answer.startswith(b"HTTP/1.1 403")
    assert error_of(answer)["code"] == "destination-refused"
    assert asked == []


async def test_direct_still_keeps_metadata_and_itself_out_of_reach(world: World) -> None:
    proxy = proxy_config(world.verify(), dst_filters=FILTERS, on_mismatch="direct")
    async with running(proxy) as inside:
        own = port_of(inside, "ingress[0]")
        for host in ("169.254.169.254", f"127.0.0.1:{own}", "100.100.100.200"):
            request = f"GET http://{host}/ HTTP/1.1\r\nhost: {host}\r\n\r\n".encode()
            assert (await talk(own, request)).startswith(b"HTTP/1.1 403"), host


async def test_direct_is_shown_as_unsafe(world: World) -> None:
    from tng.config.entries import parse
    from tng.operation.journal import Journal
    from tng.operation.service import Gateway

    proxy = proxy_config(world.verify(), dst_filters=FILTERS, on_mismatch="direct")
    gateway = Gateway(parse(proxy, where="t"), Journal(io.StringIO()))
    assert "on_mismatch: direct" in gateway.unsafe
    await gateway.close()


async def test_a_matching_destination_is_never_sent_in_clear(world: World) -> None:
    seen: list[bytes] = []

    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.read(4096))

    filters = [{"ip": "127.0.0.1"}]
    proxy = proxy_config(world.verify(), dst_filters=filters, on_mismatch="direct")
    async with serving(plain) as port, running(proxy) as inside:
        answer = await talk(port_of(inside, "ingress[0]"), get(port))
    assert answer.startswith(b"HTTP/1.1 502")
    assert all(b"POST" not in data for data in seen)


@contextlib.asynccontextmanager
async def guests(world: World, directory: Path, count: int) -> AsyncIterator[list[int]]:
    async with contextlib.AsyncExitStack() as stack:
        ports = []
        for number in range(count):
            engine = directory / f"{number}.sock"
            await stack.enter_async_context(serving(echo_engine, engine))
            agent = FakeAgent(world, world.guest)
            egress = egress_config({"unix": str(engine)})
            outside = await stack.enter_async_context(running(egress, agent))
            ports.append(port_of(outside, "egress[0]"))
        yield ports


def mapping(world: World, ports: list[int]) -> dict[str, object]:
    out = [{"host": "127.0.0.1", "port": port} for port in ports]
    inside = {"host": "127.0.0.1", "port": 0}
    return {"add_ingress": [{"mapping": {"in": inside, "out": out}, "verify": world.verify()}]}


ASK = b"POST /a HTTP/1.1\r\nhost: h\r\ncontent-length: 2\r\nconnection: close\r\n\r\nhi"


async def test_the_next_target_serves_where_the_first_is_gone(
    world: World, tmp_path: Path
) -> None:
    log = io.StringIO()
    async with (
        guests(world, tmp_path, 1) as ports,
        running(mapping(world, [9, *ports]), log=log) as inside,
    ):
        answer = await talk(port_of(inside, "ingress[0]"), ASK)
    assert answer.endswith(b"|hi")
    assert "passes over 127.0.0.1:9" in log.getvalue()


async def test_a_target_that_proves_nothing_gets_nothing(world: World, tmp_path: Path) -> None:
    seen: list[bytes] = []

    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.read(4096))

    async with (
        serving(plain) as first,
        guests(world, tmp_path, 1) as ports,
        running(mapping(world, [first, *ports])) as inside,
    ):
        answer = await talk(port_of(inside, "ingress[0]"), ASK)
    assert answer.endswith(b"|hi")
    assert all(b"POST" not in data for data in seen)


async def test_no_target_is_left(world: World) -> None:
    async with running(mapping(world, [9, 10])) as inside:
        answer = await talk(port_of(inside, "ingress[0]"), ASK)
    assert answer.startswith(b"HTTP/1.1 502")
    assert error_of(answer)["code"] == "peer-unreachable"
