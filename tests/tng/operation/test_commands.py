"""``tng status`` and ``cai verify http://…`` as programs, against running gateways."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from cai.errors import UsageError
from tests.tng.gateways import (
    FakeAgent,
    World,
    echo_engine,
    egress_config,
    port_of,
    proxy_config,
    running,
    serving,
    talk,
)
from tng.operation.appraise import parse_peer

CONTROL = {"control_interface": {"restful": {"port": 0}}}


async def program(*arguments: str | Path) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", *map(str, arguments),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def verify(world: World, peer: str, *more: str | Path) -> tuple[int, dict[str, Any]]:
    status, out, err = await program(
        "cai", "verify", f"http://{peer}", "--policy", world.policy, "--collateral",
        world.anchors / "collateral", "--unsafe-simulated-root", world.anchors, "--json", *more,
    )  # fmt: skip
    assert "Traceback" not in err
    return status, json.loads(out)


@pytest.mark.anyio
async def test_verify_a_running_peer(world: World, agent: FakeAgent, tmp_path: Path) -> None:
    seen: list[bytes] = []

    async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.read())

    address = tmp_path / "engine.sock"
    async with serving(engine, address), running(egress_config({"unix": str(address)}), agent) as o:
        peer = f"127.0.0.1:{port_of(o, 'egress[0]')}"
        status, told = await verify(world, peer)
        assert (status, told["decision"], told["binding"]) == (0, "pass", "session")
        assert told["simulated"] is True
        assert "unsafe_simulated_root" in told["unsafe"]
        status, told = await verify(world, peer, "--expect", "service=demo")
        assert (status, told["decision"]) == (0, "pass")
        status, told = await verify(world, peer, "--expect", "service=another")
        assert (status, told["decision"]) == (10, "fail")
    # Not one byte reached the backend.
    assert b"".join(seen) == b""


@pytest.mark.anyio
async def test_verify_refuses_a_debug_guest(world: World, tmp_path: Path) -> None:
    address = tmp_path / "engine.sock"
    agent = FakeAgent(world, world.debug_guest)
    async with (
        serving(echo_engine, address),
        running(egress_config({"unix": str(address)}), agent) as outside,
    ):
        status, told = await verify(world, f"127.0.0.1:{port_of(outside, 'egress[0]')}")
    failed = {item["name"] for item in told["checks"] if item["outcome"] == "fail"}
    assert (status, told["decision"]) == (10, "fail")
    assert "tdx.debug" in failed


@pytest.mark.anyio
async def test_verify_where_nothing_proves(world: World) -> None:
    status, told = await verify(world, "127.0.0.1:9")
    assert (status, told["error"]["code"]) == (8, "peer-unreachable")
    async with serving(echo_engine) as plain:
        status, told = await verify(world, f"127.0.0.1:{plain}")
    assert (status, told["error"]["code"]) == (8, "peer-no-evidence")


@pytest.mark.anyio
@pytest.mark.parametrize(
    "arguments",
    [
        ["ftp://a:1", "--as-addr", "http://127.0.0.1:9/as/"],
        ["http://a", "--as-addr", "http://127.0.0.1:9/as/"],
        ["http://a:1"],
        ["http://a:1", "--policy", "p", "--as-addr", "http://127.0.0.1:9/as/"],
        ["http://a:1", "--as-addr", "http://127.0.0.1:9/as/", "--collateral", "c"],
        ["http://a:1", "--policy", "p", "--at", "2027-01-01T00:00:00Z"],
        ["http://a:1", "--policy", "p", "--expect", "color=blue"],
        ["http://a:1", "--policy", "/nonexistent/policy.toml"],
        ["--policy", "p", "--evidence", "e", "--expect", "service=a"],
        [],
    ],
)
async def test_verify_that_cannot_be_meant(arguments: list[str]) -> None:
    status, _out, err = await program("cai", "verify", *arguments)
    assert status == 2
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "url", ["http://", "http://a", "a:1", "http://a:0", "http://u@a:1", "http://a:1/path", "tcp://a:1"]
)
def test_what_is_no_peer(url: str) -> None:
    with pytest.raises(UsageError):
        parse_peer(url)


def test_peers() -> None:
    assert str(parse_peer("http://Guest.example:8080/")) == "guest.example:8080"
    assert str(parse_peer("https://[::1]:80")) == "[::1]:80"


@pytest.mark.anyio
async def test_status_of_a_running_gateway(
    world: World, agent: FakeAgent, tmp_path: Path
) -> None:
    address = tmp_path / "engine.sock"
    async with (
        serving(echo_engine, address),
        running(egress_config({"unix": str(address)}), agent) as outside,
        running({**proxy_config(world.verify()), **CONTROL}) as inside,
    ):
        url = f"http://127.0.0.1:{port_of(inside, 'control_interface')}"
        peer = f"127.0.0.1:{port_of(outside, 'egress[0]')}"
        for where in (peer, "127.0.0.1:9"):
            request = f"GET http://{where}/ HTTP/1.1\r\nhost: {where}\r\nconnection: close\r\n\r\n"
            await talk(port_of(inside, "ingress[0]"), request.encode())
        status, out, _ = await program("tng", "status", "--url", url, "--json")
        told = json.loads(out)
        assert (status, told["ready"], told["missing"]) == (0, True, [])
        peers = told["ingress"]["ingress[0]"]["peers"]
        assert peers[peer]["verdict"]["verdict"] == "pass"
        assert peers["127.0.0.1:9"]["error"]["code"] == "peer-unreachable"
        status, out, err = await program("tng", "status", "--url", url)
        assert status == 0
        assert "SIMULATED" in out
        assert "loosened: unsafe_simulated_root" in err


@pytest.mark.anyio
async def test_status_of_a_gateway_that_is_not_ready(agent: FakeAgent, tmp_path: Path) -> None:
    outer = {**egress_config({"unix": str(tmp_path / "no.sock")}), **CONTROL}
    async with running(outer, agent) as outside:
        url = f"http://127.0.0.1:{port_of(outside, 'control_interface')}"
        status, out, _err = await program("tng", "status", "--url", url, "--json")
    assert status == 10
    assert json.loads(out)["ready"] is False
    assert any("egress[0]: upstream" in reason for reason in json.loads(out)["missing"])


@pytest.mark.anyio
async def test_status_where_no_gateway_is() -> None:
    assert (await program("tng", "status", "--url", "http://127.0.0.1:9"))[0] == 8
    assert (await program("tng", "status", "--url", "127.0.0.1:9"))[0] == 2
    async with serving(echo_engine) as other:
        assert (await program("tng", "status", "--url", f"http://127.0.0.1:{other}"))[0] == 8
