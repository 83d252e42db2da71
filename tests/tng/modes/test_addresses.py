"""IPv6 in every mode, port ranges, names."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cai.errors import SettingError
from tests.tng.gateways import FakeAgent, World, echo_engine, port_of, running, serving
from tng.config.entries import parse

pytestmark = pytest.mark.anyio

SIX = {"host": "::1", "port": 0}
ASK = b"POST /a HTTP/1.1\r\nhost: h\r\ncontent-length: 2\r\nconnection: close\r\n\r\nhi"


@contextlib.asynccontextmanager
async def guest(world: World, directory: Path, **place: object) -> AsyncIterator[int]:
    """An egress; its port."""
    engine = directory / "engine.sock"
    mode = {"in": place or SIX, "out": {"unix": str(engine)}}
    config = {"add_egress": [{"mapping": mode, "attest": {"aa_addr": "unix:///nowhere"}}]}
    async with (
        serving(echo_engine, engine),
        running(config, FakeAgent(world, world.guest)) as outside,
    ):
        yield port_of(outside, "egress[0]")


async def talk(host: str, port: int, *parts: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(host, port)
    async with asyncio.timeout(15):
        for part in parts:
            writer.write(part)
        answer = await reader.read()
    writer.close()
    return answer


async def test_a_mapping_over_ipv6(world: World, tmp_path: Path) -> None:
    async with guest(world, tmp_path) as peer:
        mode = {"in": SIX, "out": {"host": "::1", "port": peer}}
        config = {"add_ingress": [{"mapping": mode, "verify": world.verify()}]}
        async with running(config) as inside:
            assert inside["ingress[0]"][0].startswith("[::1]:")
            answer = await talk("::1", port_of(inside, "ingress[0]"), ASK)
    assert answer.endswith(b"|hi")


async def test_an_http_proxy_over_ipv6(world: World, tmp_path: Path) -> None:
    filters = [{"ip_cidr": "::1/128"}]
    async with guest(world, tmp_path) as peer:
        mode = {"proxy_listen": SIX, "dst_filters": filters}
        config = {"add_ingress": [{"http_proxy": mode, "verify": world.verify()}]}
        async with running(config) as inside:
            port = port_of(inside, "ingress[0]")
            head = f"POST http://[::1]:{peer}/a HTTP/1.1\r\nhost: [::1]:{peer}\r\n".encode()
            asked = head + b"content-length: 2\r\nconnection: close\r\n\r\nhi"
            assert (await talk("::1", port, asked)).endswith(b"|hi")
            connect = f"CONNECT [::1]:{peer} HTTP/1.1\r\nhost: [::1]:{peer}\r\n\r\n".encode()
            assert (await talk("::1", port, connect, ASK)).endswith(b"|hi")
            outside_filter = connect.replace(b"[::1]", b"[::2]")
            assert (await talk("::1", port, outside_filter)).startswith(b"HTTP/1.1 403")


async def test_socks5_over_ipv6(world: World, tmp_path: Path) -> None:
    async with guest(world, tmp_path) as peer:
        config = {"add_ingress": [{"socks5": {"proxy_listen": SIX}, "verify": world.verify()}]}
        async with running(config) as inside:
            address = socket.inet_pton(socket.AF_INET6, "::1") + struct.pack("!H", peer)
            port, hello = port_of(inside, "ingress[0]"), b"\x05\x01\x00"
            answer = await talk("::1", port, hello, b"\x05\x01\x00\x04" + address, ASK)
    assert answer.endswith(b"|hi")


async def test_a_name_with_both_families_is_listened_on_and_led_to(
    world: World, tmp_path: Path
) -> None:
    async with guest(world, tmp_path, host="localhost", port=0) as peer:
        mode = {"in": SIX, "out": {"host": "localhost", "port": peer}}
        config = {"add_ingress": [{"mapping": mode, "verify": world.verify()}]}
        async with running(config) as inside:
            answer = await talk("::1", port_of(inside, "ingress[0]"), ASK)
    assert answer.endswith(b"|hi")


def free_range(count: int) -> int:
    """First of several free ports in a row."""
    for first in range(42000, 60000, count):
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    probe = stack.enter_context(socket.socket())
                    probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return first
    raise AssertionError("no free range")


async def test_each_port_of_a_range_leads_to_its_own(world: World, tmp_path: Path) -> None:
    first = free_range(6)
    async with contextlib.AsyncExitStack() as stack:
        for step in range(3):
            directory = tmp_path / str(step)
            directory.mkdir()
            place = {"host": "127.0.0.1", "port": first + 3 + step}
            await stack.enter_async_context(guest(world, directory, **place))
        rule = {
            "in": {"host": "127.0.0.1", "port": first, "port_end": first + 2},
            "out": {"host": "127.0.0.1", "port": first + 3, "port_end": first + 5},
        }
        config = {"add_ingress": [{"mapping": {"rules": [rule]}, "verify": world.verify()}]}
        inside = await stack.enter_async_context(running(config))
        assert len(inside["ingress[0]"]) == 3
        for step in range(3):
            assert (await talk("127.0.0.1", first + step, ASK)).endswith(b"|hi")


@pytest.mark.parametrize(
    "rule",
    [
        {"in": {"port": 10, "port_end": 12}, "out": {"host": "a", "port": 20, "port_end": 21}},
        {"in": {"port": 10, "port_end": 12}, "out": {"host": "a", "port": 20}},
        {"in": {"port": 10}, "out": {"host": "a", "port": 20, "port_end": 21}},
        {"in": {"port": 12, "port_end": 10}, "out": {"host": "a", "port": 20, "port_end": 18}},
        {"in": {"port": 0, "port_end": 2}, "out": {"host": "a", "port": 20, "port_end": 22}},
        {"in": {"port": 1, "port_end": 65535}, "out": {"host": "a", "port": 1, "port_end": 65535}},
        {"in": {"port": 10, "port_end": 70000}, "out": {"host": "a", "port": 10}},
    ],
)
def test_ranges_that_do_not_fit(rule: dict[str, object]) -> None:
    with pytest.raises(SettingError):
        parse({"add_ingress": [{"mapping": {"rules": [rule]}, "no_ra": True}]}, where="t")


@pytest.mark.parametrize("hosts", [("0.0.0.0", "127.0.0.1"), ("::1", "::1"), ("::", "::1")])
def test_ranges_that_overlap(hosts: tuple[str, str]) -> None:
    rules = [
        {"in": {"host": host, "port": 10 + step, "port_end": 12 + step},
         "out": {"host": "a", "port": 20, "port_end": 22}}
        for step, host in enumerate(hosts)
    ]  # fmt: skip
    with pytest.raises(SettingError, match="two rules"):
        parse({"add_ingress": [{"mapping": {"rules": rules}, "no_ra": True}]}, where="t")


async def test_a_range_of_which_one_port_is_taken_opens_none(world: World) -> None:
    from cai.errors import ListenerFailed

    first = free_range(3)
    with socket.create_server(("127.0.0.1", first + 1)):
        rule = {
            "in": {"host": "127.0.0.1", "port": first, "port_end": first + 2},
            "out": {"host": "127.0.0.1", "port": 20, "port_end": 22},
        }
        config = {"add_ingress": [{"mapping": {"rules": [rule]}, "verify": world.verify()}]}
        with pytest.raises(ListenerFailed):
            async with running(config):
                raise AssertionError("it started")
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", first)
