"""The control interface of a running pair: readiness, metrics, TNG's own paths."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

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
from tng.operation.control import stock_status

CONTROL = {"control_interface": {"restful": {"port": 0}}}


async def ask(port: int, path: str) -> tuple[int, str]:
    answer = await talk(port, f"GET {path} HTTP/1.1\r\nhost: a\r\n\r\n".encode())
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split(b" ")[1]), body.decode()


async def request(proxy: int, peer: str, path: str = "/secret") -> bytes:
    text = f"GET http://{peer}{path} HTTP/1.1\r\nhost: {peer}\r\nconnection: close\r\n\r\n"
    return await talk(proxy, text.encode())


@pytest.mark.anyio
async def test_metrics_of_a_pair(world: World, agent: FakeAgent, tmp_path: Path) -> None:
    engine = tmp_path / "engine.sock"
    inner = {**proxy_config(world.verify()), **CONTROL}
    outer = {**egress_config({"unix": str(engine)}), **CONTROL}
    async with (
        serving(echo_engine, engine),
        running(outer, agent) as outside,
        running(inner) as inside,
    ):
        peer = f"127.0.0.1:{port_of(outside, 'egress[0]')}"
        for _ in range(2):
            assert b"200 OK" in await request(port_of(inside, "ingress[0]"), peer)
        assert b" 502 " in await request(port_of(inside, "ingress[0]"), "127.0.0.1:9")
        _, near = await ask(port_of(inside, "control_interface"), "/metrics")
        _, far = await ask(port_of(outside, "control_interface"), "/metrics")
    for line in (
        'tng_connections_total{entry="ingress[0]"} 3',
        'tng_connections_active{entry="ingress[0]"} 0',
        'tng_streams_total{entry="ingress[0]"} 2',
        'tng_streams_active{entry="ingress[0]"} 0',
        'tng_handshake_seconds_count{entry="ingress[0]"} 1',
        'tng_attestation_seconds_count{entry="ingress[0]"} 1',
        'tng_requests_total{entry="ingress[0]",status="200"} 2',
        'tng_requests_total{entry="ingress[0]",status="502"} 1',
        'tng_refusals_total{entry="ingress[0]",reason="peer-unreachable"} 1',
    ):
        assert line in near.splitlines()
    assert 'tng_evidence_age_seconds{entry="ingress[0]"} 0.' in near
    assert 'tng_streams_total{entry="egress[0]"} 2' in far.splitlines()
    assert 'tng_attestation_seconds_count{entry="egress[0]"} 1' in far.splitlines()
    sent = next(line for line in near.splitlines() if 'direction="out"' in line)
    assert sent.rpartition(" ")[2] == next(
        line for line in far.splitlines() if 'direction="in"' in line
    ).rpartition(" ")[2]
    for text in (near, far):
        assert "secret" not in text


@pytest.mark.anyio
async def test_an_egress_is_ready_only_with_backend_and_evidence(
    world: World, agent: FakeAgent, tmp_path: Path
) -> None:
    engine = tmp_path / "engine.sock"
    outer = {**egress_config({"unix": str(engine)}), **CONTROL}
    async with running(outer, agent) as outside:
        control = port_of(outside, "control_interface")
        assert await ask(control, "/readyz") == (503, "not ok\n")
        _, verbose = await ask(control, "/readyz?verbose")
        assert "egress[0]: upstream" in verbose
        assert (await ask(control, "/livez"))[0] == 200
        assert "tng_ready 0" in (await ask(control, "/metrics"))[1].splitlines()
    async with serving(echo_engine, engine), running(outer, agent) as outside:
        control = port_of(outside, "control_interface")
        assert await ask(control, "/readyz") == (200, "ok\n")
        calls = len(agent.calls)
        assert calls >= 1
        # A probe from outside does not cost a quote each.
        await ask(control, "/readyz")
        assert len(agent.calls) == calls


@pytest.mark.anyio
async def test_an_egress_whose_agent_does_not_prove_is_not_ready(tmp_path: Path) -> None:
    engine = tmp_path / "engine.sock"
    outer = {**egress_config({"unix": str(engine)}), **CONTROL}
    async with serving(echo_engine, engine), running(outer) as outside:
        status, told = await ask(port_of(outside, "control_interface"), "/readyz?verbose")
    assert status == 503
    assert "egress[0] evidence" in told


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/status/", ["ingress"]),
        ("/status/ingress", ["0"]),
        ("/status/ingress/", ["0"]),
        ("/status/ingress/0", ["rats_tls"]),
        ("/status/ingress/1", None),
        ("/status/ingress/-1", None),
        ("/status/ingress/0/ohttp", None),
        ("/status/egress/0", None),
        ("/status/ingress/0/ohttp/keys/more", None),
        ("/statusx", None),
        ("/tng/v1/healthcheck", None),
    ],
)
async def test_stock_paths(world: World, path: str, expected: Any) -> None:
    async with running({**proxy_config(world.verify()), **CONTROL}) as inside:
        status, body = await ask(port_of(inside, "control_interface"), path)
    if expected is None:
        assert (status, json.loads(body)) == (404, {"error": "not found"})
    else:
        assert (status, json.loads(body)) == (200, expected)


def test_stock_paths_of_ohttp() -> None:
    keys = {"key_manager_type": "self_generated", "local_keys": []}
    status: dict[str, object] = {"ingress": {}, "egress": {"egress[0]": {"ohttp": {"keys": keys}}}}
    assert stock_status(status, "") == ["egress"]
    assert stock_status(status, "egress/0") == ["ohttp"]
    assert stock_status(status, "egress/0/ohttp") == ["keys"]
    assert stock_status(status, "egress/0/ohttp/keys") == keys
    assert stock_status(status, "egress/0/ohttp/other") is None
    assert stock_status(status, "egress/\u0660/ohttp/keys") is None


@pytest.mark.anyio
async def test_a_stopping_gateway_is_not_ready(world: World) -> None:
    import io

    from tng.config.entries import parse
    from tng.operation.journal import Journal
    from tng.operation.service import Gateway

    gateway = Gateway(parse(proxy_config(world.verify()), where="test"), Journal(io.StringIO()))
    await gateway.start()
    assert await gateway.missing() == ()
    await asyncio.gather(gateway.drain())
    assert await gateway.missing() == ("the gateway is stopping",)
