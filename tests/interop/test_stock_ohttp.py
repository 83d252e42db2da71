"""Every combination of our gateway and the real TNG binaries, over OHTTP; prints the table.

Directly, and through an nginx that sees only HTTP. The binaries come from the wheel ``tng-sdk``
(``CAI_STOCK_TNG``, default ``build/peers``); what is not there is skipped by name.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.interop.test_stock_tng import (
    BODY,
    OURS,
    PAIRS,
    START_S,
    free_port,
    gateway,
    peers,
    reachable,
)
from tests.tng.gateways import running
from tests.tng.ohttp.world import post, read_any
from tests.tng.stock_peers import StockService, binary, stock_tng

LOCAL = "127.0.0.1"
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
@pytest.mark.parametrize(("ingress", "egress"), PAIRS)
async def test_pair(ingress: str, egress: str, model: str, mutual: bool, tmp_path: Path) -> None:
    need(ingress, egress)
    row = (ingress, egress, "ohttp", model, "both" if mutual else "egress")
    TABLE[row] = "FAILED"
    async with peers(tmp_path) as (agent, service, backend):
        near, far = configurations(agent.socket, service, backend, model=model, mutual=mutual)
        async with gateway(egress, far, tmp_path), gateway(ingress, near, tmp_path):
            port = near["add_ingress"][0]["mapping"]["in"]["port"]
            await reachable(far["add_egress"][0]["mapping"]["in"]["port"])
            await reachable(port)
            for _ in range(2):
                assert (await ask(port, BODY)).endswith(b"ok:" + BODY)
    assert agent.calls.count("GetEvidence") >= (2 if mutual else 1)
    TABLE[row] = "ok"


@pytest.mark.anyio
@pytest.mark.parametrize(("ingress", "egress"), PAIRS)
async def test_through_nginx(ingress: str, egress: str, tmp_path: Path) -> None:
    """A load balancer with its defaults: HTTP/1.0 to the egress, bodies collected."""
    need(ingress, egress)
    row = (ingress, egress, "ohttp, nginx", "background_check", "both")
    TABLE[row] = "FAILED"
    async with peers(tmp_path) as (agent, service, backend):
        near, far = configurations(agent.socket, service, backend, mutual=True)
        async with contextlib.AsyncExitStack() as stack:
            outside = far["add_egress"][0]["mapping"]["in"]["port"]
            front = stack.enter_context(nginx(outside, tmp_path))
            near["add_ingress"][0]["mapping"]["out"]["port"] = front
            await stack.enter_async_context(gateway(egress, far, tmp_path))
            await stack.enter_async_context(gateway(ingress, near, tmp_path))
            port = near["add_ingress"][0]["mapping"]["in"]["port"]
            for number in (outside, front, port):
                await reachable(number)
            for _ in range(3):
                assert (await ask(port, BODY)).endswith(b"ok:" + BODY)
    TABLE[row] = "ok"


@pytest.mark.anyio
@pytest.mark.parametrize(("ingress", "egress"), PAIRS)
async def test_tokens_come_one_by_one(ingress: str, egress: str, tmp_path: Path) -> None:
    need(ingress, egress)
    go = asyncio.Event()

    async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            await read_any(reader)
            writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nfirst\r\n")
            await writer.drain()
            await go.wait()
            writer.write(b"6\r\nsecond\r\n0\r\n\r\n")
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(engine, LOCAL, 0)
    async with peers(tmp_path) as (agent, service, _backend):
        backend = server.sockets[0].getsockname()[1]
        near, far = configurations(agent.socket, service, backend)
        async with gateway(egress, far, tmp_path), gateway(ingress, near, tmp_path):
            port = near["add_ingress"][0]["mapping"]["in"]["port"]
            await reachable(far["add_egress"][0]["mapping"]["in"]["port"])
            await reachable(port)
            reader, writer = await asyncio.open_connection(LOCAL, port)
            writer.write(post("/v1/s", b"x"))
            async with asyncio.timeout(START_S):
                await reader.readuntil(b"first")
                go.set()
                assert b"second" in await reader.read()
            writer.close()
    server.close()


@pytest.mark.anyio
@pytest.mark.parametrize("tokens", [StockService(status="warning"), StockService(policies="other")],
                         ids=["warning", "another policy"])  # fmt: skip
@pytest.mark.parametrize(("ingress", "egress"), [(OURS, "2.12.0"), ("2.12.0", OURS)])
async def test_what_is_not_affirmed_is_refused(
    ingress: str, egress: str, tokens: StockService, tmp_path: Path
) -> None:
    need(ingress, egress)
    async with peers(tmp_path, tokens) as (agent, service, backend):
        near, far = configurations(agent.socket, service, backend)
        async with gateway(egress, far, tmp_path), gateway(ingress, near, tmp_path):
            port = near["add_ingress"][0]["mapping"]["in"]["port"]
            await reachable(far["add_egress"][0]["mapping"]["in"]["port"])
            await reachable(port)
            assert b"ok:" not in await ask(port, BODY)


@pytest.mark.anyio
@pytest.mark.parametrize("proves", [False, True], ids=["proves nothing", "not affirmed"])
async def test_our_egress_refuses_a_client_of_tng(proves: bool, tmp_path: Path) -> None:
    need("2.12.0")
    good, bad = StockService(), StockService(status="warning")
    async with peers(tmp_path, good) as (agent, service, backend), bad.running():
        near, far = configurations(agent.socket, service, backend, mutual=proves)
        far["add_egress"][0]["verify"] = {"as_addr": bad.address, "policy_ids": ["default"]}
        async with gateway(OURS, far, tmp_path), gateway("2.12.0", near, tmp_path):
            port = near["add_ingress"][0]["mapping"]["in"]["port"]
            await reachable(port)
            assert b"ok:" not in await ask(port, BODY)


@pytest.mark.anyio
@pytest.mark.parametrize(("ingress", "egress"), [(OURS, "2.12.0"), ("2.12.0", OURS)])
async def test_keys_rotate_under_a_running_client(
    ingress: str, egress: str, tmp_path: Path
) -> None:
    """Stock clients learn of a new key when the old one's time is over; none fails here."""
    need(ingress, egress)
    async with peers(tmp_path) as (agent, service, backend):
        near, far = configurations(agent.socket, service, backend)
        key = {"source": "self_generated", "rotation_interval": 1}
        far["add_egress"][0]["ohttp"] = {"key": key}
        async with gateway(egress, far, tmp_path), gateway(ingress, near, tmp_path):
            port = near["add_ingress"][0]["mapping"]["in"]["port"]
            await reachable(far["add_egress"][0]["mapping"]["in"]["port"])
            await reachable(port)
            until = asyncio.get_running_loop().time() + 4
            failed = done = 0
            while asyncio.get_running_loop().time() < until:
                answer = await ask(port, b"x" * len(BODY))
                done += 1
                failed += b"ok:" not in answer
    assert done > 20
    assert failed == 0


@pytest.mark.anyio
async def test_an_egress_that_starts_again_fails_no_request_of_ours(tmp_path: Path) -> None:
    """Its key is another one then: the client's request meets 422, and is sent again."""
    need("2.12.0")
    async with peers(tmp_path) as (agent, service, backend):
        near, far = configurations(agent.socket, service, backend)
        outside = far["add_egress"][0]["mapping"]["in"]["port"]
        async with running(near, None, io.StringIO()):
            port = near["add_ingress"][0]["mapping"]["in"]["port"]
            for _ in range(2):
                with stock_tng("2.12.0", far, tmp_path):
                    await reachable(outside)
                    assert (await ask(port, BODY)).endswith(b"ok:" + BODY)
    assert agent.calls.count("GetEvidence") == 2


def need(*versions: str) -> None:
    for version in versions:
        if version != OURS and binary(version) is None:
            pytest.skip(f"no tng {version} (set CAI_STOCK_TNG)")


def configurations(
    socket: Path,
    service: StockService,
    backend: int,
    *,
    model: str = "background_check",
    mutual: bool = False,
) -> tuple[dict[str, Any], dict[str, Any]]:
    attest: dict[str, Any] = {"aa_addr": f"unix://{socket}"}
    verify: dict[str, Any] = {"as_addr": service.address, "policy_ids": ["default"]}
    if model == "passport":
        attest |= {"model": model, "as_addr": service.address, "policy_ids": ["default"]}
        verify |= {"model": model}
    near, far = free_port(), free_port()
    inside: dict[str, Any] = {
        "mapping": {"in": {"host": LOCAL, "port": near}, "out": {"host": LOCAL, "port": far}},
        "verify": verify, "ohttp": {},
    }  # fmt: skip
    outside: dict[str, Any] = {
        "mapping": {"in": {"host": LOCAL, "port": far}, "out": {"host": LOCAL, "port": backend}},
        "attest": attest, "ohttp": {},
    }  # fmt: skip
    if mutual:
        inside["attest"], outside["verify"] = attest, verify
    return {"add_ingress": [inside]}, {"add_egress": [outside]}


async def ask(port: int, body: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(LOCAL, port)
    writer.write(post("/v1/a?q=1", body))
    async with asyncio.timeout(START_S):
        with contextlib.suppress(ConnectionError):
            answer = await reader.read()
            writer.close()
            return answer
    return b""


@contextlib.contextmanager
def nginx(upstream: int, directory: Path) -> Iterator[int]:
    """A load balancer on a free port, which it yields."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if program is None:
        pytest.skip("no nginx")
    port, place = free_port(), directory / "nginx"
    place.mkdir()
    temporary = "".join(
        f"{kind}_temp_path {place}/{kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    settings = place / "nginx.conf"
    settings.write_text(
        f"daemon off; master_process off; pid {place}/pid; error_log {place}/error.log;"
        "events {} http { access_log off; " + temporary + "client_max_body_size 64m;"
        f"server {{ listen {LOCAL}:{port};"
        f"location / {{ proxy_pass http://{LOCAL}:{upstream}; }} }} }}"
    )
    process = subprocess.Popen(
        [program, "-p", str(place), "-e", str(place / "error.log"), "-c", str(settings)]
    )
    try:
        yield port
    finally:
        process.terminate()
        process.wait()


