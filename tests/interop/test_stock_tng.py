"""Every combination of our gateway and the real TNG binaries, over RATS-TLS; prints the table.

The binaries come from the wheel ``tng-sdk`` (``CAI_STOCK_TNG``, default ``build/peers``); a version
that is not there is skipped by name.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.tng.gateways import running
from tests.tng.stock_peers import VERSIONS, StockAgent, StockService, binary, stock_tng

OURS = "ours"
BODY = b"x" * 5000
START_S = 20.0

PAIRS = [(OURS, OURS)] + [
    pair for version in VERSIONS for pair in ((OURS, version), (version, OURS))
]
TABLE: dict[tuple[str, ...], str] = {}


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    yield
    print("\n| ingress | egress | transport | model | attested | result |")  # noqa: T201 - the table is asked for
    for row, result in TABLE.items():
        print(f"| {' | '.join(row)} | {result} |")  # noqa: T201


@pytest.mark.anyio
@pytest.mark.parametrize("mutual", [False, True], ids=["one-way", "mutual"])
@pytest.mark.parametrize("model", ["background_check", "passport"])
@pytest.mark.parametrize("multiplex", [False, True], ids=["raw", "h2"])
@pytest.mark.parametrize(("ingress", "egress"), PAIRS)
async def test_pair(
    ingress: str, egress: str, multiplex: bool, model: str, mutual: bool, tmp_path: Path
) -> None:
    for version in (ingress, egress):
        if version != OURS and binary(version) is None:
            pytest.skip(f"no tng {version} (set CAI_STOCK_TNG)")
    row = (ingress, egress, "h2" if multiplex else "raw", model, "both" if mutual else "egress")
    TABLE[row] = "FAILED"
    async with peers(tmp_path) as (agent, service, backend):
        near, far = configurations(agent, service, backend, multiplex=multiplex, model=model)
        if mutual:
            near["add_ingress"][0]["attest"] = far["add_egress"][0]["attest"]
            far["add_egress"][0]["verify"] = near["add_ingress"][0]["verify"]
        async with gateway(egress, far, tmp_path), gateway(ingress, near, tmp_path):
            port = near["add_ingress"][0]["mapping"]["in"]["port"]
            await reachable(far["add_egress"][0]["mapping"]["in"]["port"])
            await reachable(port)
            for _ in range(2):
                assert await ask(port) == b"ok:" + BODY
    assert agent.calls.count("GetEvidence") >= (2 if mutual else 1)
    TABLE[row] = "ok"


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("service", "seen"),
    [
        (StockService(status="warning"), "as.appraisal.cpu0"),
        (StockService(status="contraindicated"), "as.appraisal.cpu0"),
        (StockService(lifetime_s=-120), "as.token.time"),
        (StockService(policies="other"), "as.policy"),
    ],
    ids=["warning", "contraindicated", "expired", "another policy"],
)
async def test_our_ingress_refuses_a_stock_egress(
    service: StockService, seen: str, tmp_path: Path
) -> None:
    if binary("2.12.0") is None:
        pytest.skip("no tng 2.12.0 (set CAI_STOCK_TNG)")
    async with peers(tmp_path, service) as (agent, served, backend):
        near, far = configurations(agent, served, backend, multiplex=False)
        async with gateway("2.12.0", far, tmp_path), gateway(OURS, near, tmp_path):
            await reachable(far["add_egress"][0]["mapping"]["in"]["port"])
            answer = await ask(near["add_ingress"][0]["mapping"]["in"]["port"], whole=True)
    assert answer.startswith(b"HTTP/1.1 502")
    assert seen.encode() in answer
    assert BODY not in answer


@pytest.mark.anyio
@pytest.mark.parametrize("status", ["warning", "contraindicated"])
async def test_a_stock_ingress_refuses_our_egress(status: str, tmp_path: Path) -> None:
    if binary("2.12.0") is None:
        pytest.skip("no tng 2.12.0 (set CAI_STOCK_TNG)")
    async with peers(tmp_path, StockService(status=status)) as (agent, served, backend):
        near, far = configurations(agent, served, backend, multiplex=False)
        async with gateway(OURS, far, tmp_path), gateway("2.12.0", near, tmp_path):
            port = near["add_ingress"][0]["mapping"]["in"]["port"]
            await reachable(port)
            assert b"ok:" not in await ask(port, whole=True)


@contextlib.asynccontextmanager
async def peers(
    directory: Path, service: StockService | None = None
) -> AsyncIterator[tuple[StockAgent, StockService, int]]:
    agent, served = StockAgent(directory / "aa.sock"), service or StockService()
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    async with agent.running(), served.running():
        try:
            yield agent, served, server.sockets[0].getsockname()[1]
        finally:
            server.close()


def configurations(
    agent: StockAgent,
    service: StockService,
    backend: int,
    *,
    multiplex: bool,
    model: str = "background_check",
) -> tuple[dict[str, Any], dict[str, Any]]:
    attest: dict[str, Any] = {"aa_addr": f"unix://{agent.socket}"}
    verify: dict[str, Any] = {"as_addr": service.address, "policy_ids": ["default"]}
    if model == "passport":
        attest |= {"model": model, "as_addr": service.address, "policy_ids": ["default"]}
        verify |= {"model": model}
    transport = {"rats_tls": {"multiplex": True}} if multiplex else {}
    near, far = free_port(), free_port()
    host = "127.0.0.1"
    inside = {
        "mapping": {"in": {"host": host, "port": near}, "out": {"host": host, "port": far}},
        "verify": verify,
        **transport,
    }
    outside = {
        "mapping": {"in": {"host": host, "port": far}, "out": {"host": host, "port": backend}},
        "attest": attest,
        **transport,
    }
    return {"add_ingress": [inside]}, {"add_egress": [outside]}


@contextlib.asynccontextmanager
async def gateway(version: str, config: dict[str, Any], directory: Path) -> AsyncIterator[None]:
    if version == OURS:
        async with running(config, None, io.StringIO()):
            yield
        return
    with stock_tng(version, config, directory):
        yield


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        await reader.readuntil(b"\r\n\r\n")
        body = b"ok:" + await reader.readexactly(len(BODY))
        head = f"HTTP/1.1 200 OK\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()
    writer.close()


async def ask(port: int, *, whole: bool = False) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /a HTTP/1.1\r\nhost: h\r\ncontent-length: {len(BODY)}\r\n"
    writer.write(head.encode() + b"connection: close\r\n\r\n" + BODY)
    async with asyncio.timeout(START_S):
        with contextlib.suppress(ConnectionError):
            answer = await reader.read()
            writer.close()
            return answer if whole else answer.partition(b"\r\n\r\n")[2]
    return b""


async def reachable(port: int) -> None:
    async with asyncio.timeout(START_S):
        while True:
            with contextlib.suppress(OSError):
                _reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                return
            await asyncio.sleep(0.05)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number: int = probe.getsockname()[1]
        return number
