"""A gateway as a process and as a whole: start, status, drain, exit."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cai.errors import CaiError, ListenerFailed
from tests.tng.gateways import (
    FakeAgent,
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
from tng.config.entries import parse
from tng.operation.journal import Journal
from tng.operation.service import Gateway

STOCK = {"as_addr": "http://127.0.0.1:9/as/", "policy_ids": ["default"]}

UNSAFE = ["unsafe_simulated_root", "gpu.unsafe_without_rim", "gpu.unsafe_without_ocsp"]
"""Nobody gives these tests reference measurements or revocation answers."""


@pytest.mark.anyio
async def test_control_interface_shows_the_last_verdict(
    world: World, agent: FakeAgent, tmp_path: Path
) -> None:
    engine = tmp_path / "engine.sock"
    inner = {**proxy_config(world.verify()), "control_interface": {"restful": {"port": 0}}}
    async with (
        serving(echo_engine, engine),
        running(egress_config({"unix": str(engine)}), agent) as outside,
        running(inner) as inside,
    ):
        control = port_of(inside, "control_interface")
        assert (await talk(control, b"GET /livez HTTP/1.1\r\nhost: a\r\n\r\n")).endswith(b"ok\n")
        assert b"200 OK" in await talk(control, b"GET /readyz HTTP/1.1\r\nhost: a\r\n\r\n")
        peer = f"127.0.0.1:{port_of(outside, 'egress[0]')}"
        request = f"GET http://{peer}/secret HTTP/1.1\r\nhost: {peer}\r\nconnection: close\r\n\r\n"
        await talk(port_of(inside, "ingress[0]"), request.encode())
        answer = await talk(control, b"GET /status HTTP/1.1\r\nhost: a\r\n\r\n")
    status = json.loads(answer.partition(b"\r\n\r\n")[2])
    seen = status["ingress"]["ingress[0]"]["peers"][peer]
    assert seen["connected"] is True
    assert seen["verdict"]["verdict"] == "pass"
    assert seen["verdict"]["simulated"] is True
    assert status["unsafe"] == UNSAFE
    assert b"secret" not in answer


@pytest.mark.anyio
async def test_control_interface_shows_why_a_peer_was_refused(
    world: World, tmp_path: Path
) -> None:
    engine = tmp_path / "engine.sock"
    inner = {**proxy_config(world.verify()), "control_interface": {"restful": {"port": 0}}}
    agent = FakeAgent(world, world.debug_guest)
    async with (
        serving(echo_engine, engine),
        running(egress_config({"unix": str(engine)}), agent) as outside,
        running(inner) as inside,
    ):
        peer = f"127.0.0.1:{port_of(outside, 'egress[0]')}"
        request = f"GET http://{peer}/ HTTP/1.1\r\nhost: {peer}\r\n\r\n"
        await talk(port_of(inside, "ingress[0]"), request.encode())
        control = port_of(inside, "control_interface")
        answer = await talk(control, b"GET /status HTTP/1.1\r\nhost: a\r\n\r\n")
    seen = json.loads(answer.partition(b"\r\n\r\n")[2])["ingress"]["ingress[0]"]["peers"][peer]
    assert seen["connected"] is False
    assert seen["verdict"]["verdict"] == "fail"
    assert "tdx.debug" in seen["error"]["message"]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"POST /livez HTTP/1.1\r\nhost: a\r\n\r\n", b"405"),
        (b"GET /metric HTTP/1.1\r\nhost: a\r\n\r\n", b"404"),
        (b"nonsense\r\n\r\n", b"400"),
    ],
)
async def test_control_interface_refuses(request_bytes: bytes, status: bytes) -> None:
    config = {**proxy_config(STOCK), "control_interface": {"restful": {"port": 0}}}
    async with running(config) as inside:
        answer = await talk(port_of(inside, "control_interface"), request_bytes)
    assert answer.startswith(b"HTTP/1.1 " + status)


@pytest.mark.anyio
async def test_a_taken_port_fails_the_start_and_leaves_nothing_open() -> None:
    with socket.socket() as taken, socket.socket() as probe:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
        probe.close()
        config = {
            "add_ingress": [
                proxy_config(STOCK, proxy_listen={"host": "127.0.0.1", "port": port})[
                    "add_ingress"
                ][0]  # type: ignore[index]
                for port in (free, taken.getsockname()[1])
            ]
        }
        gateway = Gateway(parse(config, where="c"), Journal())
        with pytest.raises(ListenerFailed) as caught:
            await gateway.start()
        assert caught.value.exit_status == 8
        with pytest.raises(OSError, match=r"refused|Connect"):
            await asyncio.open_connection("127.0.0.1", free)


@pytest.mark.anyio
@pytest.mark.parametrize("missing", ["policy", "collateral", "unsafe_simulated_root"])
async def test_missing_files_fail_the_start(
    world: World, tmp_path: Path, missing: str
) -> None:
    config = proxy_config(world.verify(**{missing: str(tmp_path / "none")}))
    with pytest.raises(CaiError) as caught:
        Gateway(parse(config, where="c"), Journal())
    assert caught.value.exit_status in (2, 3)


@pytest.mark.anyio
async def test_drain_lets_running_requests_end(
    world: World, agent: FakeAgent, tmp_path: Path
) -> None:
    arrived, finish = asyncio.Event(), asyncio.Event()

    async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        arrived.set()
        await finish.wait()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\ndone")

    socket_path = tmp_path / "engine.sock"
    async with (
        serving(engine, socket_path),
        running(egress_config({"unix": str(socket_path)}), agent) as outside,
    ):
        gateway = Gateway(parse(proxy_config(world.verify()), where="c"), Journal())
        listen = await gateway.start()
        proxy = port_of(listen, "ingress[0]")
        peer = f"127.0.0.1:{port_of(outside, 'egress[0]')}"
        request = f"GET http://{peer}/ HTTP/1.1\r\nhost: {peer}\r\nconnection: close\r\n\r\n"
        answer = asyncio.create_task(talk(proxy, request.encode()))
        await asyncio.wait_for(arrived.wait(), 15)
        draining = asyncio.create_task(gateway.drain())
        await asyncio.sleep(0.05)
        with pytest.raises(OSError, match=r"refused|Connect"):
            await asyncio.open_connection("127.0.0.1", proxy)
        assert not draining.done()
        finish.set()
        assert (await answer).endswith(b"done")
        await asyncio.wait_for(draining, 15)


@pytest.mark.anyio
async def test_idle_clients_do_not_hold_a_drain_up() -> None:
    gateway = Gateway(parse(proxy_config(STOCK), where="c"), Journal())
    port = port_of(await gateway.start(), "ingress[0]")
    _reader, writer = await asyncio.open_connection("127.0.0.1", port)
    await asyncio.sleep(0.05)
    started = time.monotonic()
    await gateway.drain()
    assert time.monotonic() - started < 5
    writer.close()


@pytest.mark.anyio
async def test_an_egress_that_restarts_is_found_again(
    world: World, agent: FakeAgent, tmp_path: Path
) -> None:
    engine = tmp_path / "engine.sock"
    async with serving(echo_engine, engine), running(proxy_config(world.verify())) as inside:
        proxy = port_of(inside, "ingress[0]")
        config = egress_config({"unix": str(engine)})
        async with running(config, agent) as outside:
            port = port_of(outside, "egress[0]")
            request = (
                f"GET http://127.0.0.1:{port}/ HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\n"
                "connection: close\r\n\r\n"
            ).encode()
            assert (await talk(proxy, request)).startswith(b"HTTP/1.1 200")
        assert (await talk(proxy, request)).startswith(b"HTTP/1.1 502")
        config["add_egress"][0]["mapping"]["in"]["port"] = port  # type: ignore[index]
        async with running(config, agent):
            assert (await talk(proxy, request)).startswith(b"HTTP/1.1 200")
    assert len(agent.calls) == 2


# The program


def launch(*arguments: str, **options: object) -> subprocess.Popen[str]:
    code = "from tng.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, "launch", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "NO_COLOR": "1"},
        **options,  # type: ignore[call-overload]
    )


def one_liner(port: int) -> str:
    return json.dumps(
        proxy_config(STOCK, proxy_listen={"host": "127.0.0.1", "port": port})
    )


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_launch_until_a_signal(number: signal.Signals, status: int) -> None:
    process = launch("--json", "--config-content", one_liner(0))
    assert process.stdout
    try:
        ready = json.loads(process.stdout.readline())
        port = port_of(ready["listen"], "ingress[0]")
        assert ready["ready"] is True
        with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
            client.sendall(b"GET http://127.0.0.1:9/ HTTP/1.1\r\nhost: 127.0.0.1:9\r\n\r\n")
            answer = client.recv(65536)
        assert answer.startswith(b"HTTP/1.1 502 ")
        process.send_signal(number)
        started = time.monotonic()
        assert process.wait(20) == status
        assert time.monotonic() - started < 15
    finally:
        process.kill()
        process.communicate()


def finished(*arguments: str) -> tuple[int, str, str]:
    process = launch(*arguments)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ((), 2, "exactly one"),
        (("--config-content", "{}", "--config-file", "x"), 2, "exactly one"),
        (("--config-content", "{}"), 2, "nothing to do"),
        (("--config-content", "{"), 2, "not JSON"),
        (("--config-file", "/nonexistent/tng.json"), 3, "does not exist"),
        (("--config-content", '{"add_ingress":[{"hook":{},"no_ra":true}]}'), 2, "tng exec"),
        (("--nonsense",), 2, "nonsense"),
    ],
)
def test_launch_refuses(arguments: tuple[str, ...], status: int, words: str) -> None:
    returned, out, err = finished(*arguments)
    assert returned == status
    assert words in err
    assert "Traceback" not in err
    assert out == ""


def test_launch_on_a_taken_port_ends_with_8() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        returned, out, err = finished(
            "--json", "--config-content", one_liner(taken.getsockname()[1])
        )
    assert returned == 8
    assert "cannot listen" in err
    assert json.loads(out)["error"]["code"] == "listener"


def test_a_simulated_root_is_warned_about(world: World) -> None:
    process = launch("--json", "--config-content", json.dumps(proxy_config(world.verify())))
    assert process.stdout
    try:
        ready = json.loads(process.stdout.readline())
        assert ready["unsafe"] == UNSAFE
        process.send_signal(signal.SIGTERM)
        _out, err = process.communicate(timeout=20)
        assert "unsafe_simulated_root" in err
    finally:
        process.kill()
        process.communicate()
