"""What no mode goes to: itself, its control interface, link-local and metadata addresses."""

from __future__ import annotations

import asyncio
import io
import socket
import struct

import pytest

from cai.errors import SettingError
from tests.tng.gateways import FakeAgent, World, port_of, running

pytestmark = pytest.mark.anyio

LOCAL = {"host": "127.0.0.1", "port": 0}
MODES = ("http_proxy", "connect", "socks5", "mapping")
FORBIDDEN = (
    "169.254.169.254:80",
    "169.254.1.1:80",
    "100.100.100.200:80",
    "[fe80::1]:80",
    "[fd00:ec2::254]:80",
    "[::ffff:169.254.169.254]:80",
    "[64:ff9b::a9fe:a9fe]:80",
    "0.0.0.0:80",
    "[::]:80",
    "[ff02::1]:80",
    "224.0.0.1:80",
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def config(world: World, mode: str, target: str, **more: object) -> dict[str, object]:
    """A gateway of one mode, with a control interface."""
    host, _, port = target.rpartition(":")
    bodies: dict[str, dict[str, object]] = {
        "http_proxy": {"proxy_listen": LOCAL},
        "socks5": {"proxy_listen": LOCAL},
        "mapping": {"in": LOCAL, "out": {"host": host.strip("[]"), "port": int(port or 1)}},
    }
    name = "http_proxy" if mode == "connect" else mode
    return {
        "control_interface": {"restful": LOCAL},
        "add_ingress": [{name: {**bodies[name], **more}, "verify": world.verify()}],
    }


async def ask(mode: str, port: int, target: str) -> bytes:
    """Ask for a destination in the way of a mode; the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    async with asyncio.timeout(15):
        if mode == "socks5":
            host, _, number = target.rpartition(":")
            host = host.strip("[]")
            address = (
                b"\x04" + socket.inet_pton(socket.AF_INET6, host)
                if ":" in host
                else b"\x03" + bytes([len(host)]) + host.encode()
            )
            asked = b"\x05\x01\x00\x05\x01\x00" + address + struct.pack("!H", int(number))
        elif mode == "connect":
            asked = f"CONNECT {target} HTTP/1.1\r\nhost: {target}\r\n\r\n".encode()
        elif mode == "http_proxy":
            asked = f"GET http://{target}/ HTTP/1.1\r\nhost: {target}\r\n\r\n".encode()
        else:
            asked = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
        writer.write(asked)
        answer = await reader.read()
        writer.close()
        return answer


def refused(mode: str, answer: bytes) -> bool:
    if mode == "socks5":
        return answer[:4] == b"\x05\x00\x05\x02"
    status = answer[:12]
    return b"destination-refused" in answer and status in (b"HTTP/1.1 403", b"HTTP/1.1 502")


@pytest.mark.parametrize("mode", MODES)
async def test_link_local_and_metadata(world: World, mode: str) -> None:
    for target in FORBIDDEN:
        async with running(config(world, mode, target)) as inside:
            answer = await ask(mode, port_of(inside, "ingress[0]"), target)
        assert refused(mode, answer), (target, answer)


@pytest.mark.parametrize("mode", ["http_proxy", "connect", "socks5"])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]"])
@pytest.mark.parametrize("whose", ["ingress[0]", "control_interface"])
async def test_itself_and_its_control_interface(
    world: World, mode: str, host: str, whose: str
) -> None:
    log = io.StringIO()
    async with running(config(world, mode, "a:1"), log=log) as inside:
        target = f"{host}:{port_of(inside, whose)}"
        answer = await ask(mode, port_of(inside, "ingress[0]"), target)
    assert refused(mode, answer), answer
    assert b"ready" not in answer


@pytest.mark.parametrize("mode", ["http_proxy", "connect", "socks5"])
@pytest.mark.parametrize("whose", ["ingress[0]", "control_interface"])
async def test_not_by_on_mismatch_direct_either(world: World, mode: str, whose: str) -> None:
    more = {"dst_filters": [{"domain": "guest.example"}], "on_mismatch": "direct"}
    async with running(config(world, mode, "a:1", **more)) as inside:
        target = f"127.0.0.1:{port_of(inside, whose)}"
        answer = await ask(mode, port_of(inside, "ingress[0]"), target)
    assert refused(mode, answer), answer


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_a_mapping_to_itself_or_to_the_control_interface(world: World, host: str) -> None:
    own, control = free_port(), free_port()
    for target in (own, control):
        made = config(world, "mapping", f"{host}:{target}")
        made["control_interface"] = {"restful": {"host": "127.0.0.1", "port": control}}
        made["add_ingress"][0]["mapping"]["in"]["port"] = own  # type: ignore[index]
        async with running(made):
            answer = await ask("mapping", own, "")
        assert refused("mapping", answer), answer
        made["add_ingress"][0]["mapping"]["in"]["port"] = 0  # type: ignore[index]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
@pytest.mark.parametrize("direct", [False, True])
async def test_an_egress_is_no_backend_of_itself(world: World, host: str, *, direct: bool) -> None:
    own, control = free_port(), free_port()
    wild = "::" if host == "::1" else "127.0.0.1"
    for target in (own, control):
        mode = {"in": {"host": wild, "port": own}, "out": {"host": host, "port": target}}
        entry = {"mapping": mode, "attest": {"aa_addr": "unix:///nowhere"}}
        if direct:
            entry["direct_forward"] = [{"http_path": "/.*"}]  # type: ignore[assignment]
        made = {
            "control_interface": {"restful": {"host": wild, "port": control}},
            "add_egress": [entry],
        }
        with pytest.raises(SettingError, match="itself"):
            async with running(made, FakeAgent(world, world.guest)):
                raise AssertionError("it started")


async def test_an_ingress_may_be_a_backend(world: World) -> None:
    port = free_port()
    inside = {"in": {"host": "127.0.0.1", "port": port}, "out": {"host": "127.0.0.1", "port": 9}}
    outside = {"in": LOCAL, "out": {"host": "127.0.0.1", "port": port}}
    made = {
        "add_ingress": [{"mapping": inside, "verify": world.verify()}],
        "add_egress": [{"mapping": outside, "attest": {"aa_addr": "unix:///nowhere"}}],
    }
    async with running(made, FakeAgent(world, world.guest)) as listen:
        assert port_of(listen, "egress[0]")


async def test_one_entry_does_not_go_to_another(world: World) -> None:
    made = config(world, "http_proxy", "a:1")
    made["add_ingress"].append(  # type: ignore[attr-defined]
        {"socks5": {"proxy_listen": LOCAL}, "verify": world.verify()}
    )
    async with running(made) as inside:
        one, other = port_of(inside, "ingress[0]"), port_of(inside, "ingress[1]")
        assert refused("connect", await ask("connect", one, f"127.0.0.1:{other}"))
        assert refused("socks5", await ask("socks5", other, f"127.0.0.1:{one}"))
