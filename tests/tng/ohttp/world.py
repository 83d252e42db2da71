"""A pair of our gateways over OHTTP, with a stand-in agent and service, and somebody in between."""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.tng.gateways import Handler, port_of, running, serving
from tests.tng.stock_peers import StockAgent, StockService

LOCAL = "127.0.0.1"


@dataclass
class Pair:
    """Addresses of a running pair, and what both ends wrote to their logs."""

    agent: StockAgent
    service: StockService
    ingress: int = 0
    egress: int = 0
    log: io.StringIO = field(default_factory=io.StringIO)
    seen: list[tuple[bytes, bytes]] = field(default_factory=list)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A backend that answers with its request's head and body."""
    head, body = await read_any(reader)
    answer = head + b"|" + body
    writer.write(
        b"HTTP/1.1 200 OK\r\nx-inner: yes\r\ncontent-length: "
        + str(len(answer)).encode() + b"\r\n\r\n" + answer
    )  # fmt: skip
    await writer.drain()


async def read_any(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Head and body of a request, however its body is framed."""
    head = await reader.readuntil(b"\r\n\r\n")
    body = b""
    lines = head.lower().split(b"\r\n")
    if b"transfer-encoding: chunked" in lines:
        while size := int(await reader.readuntil(b"\r\n"), 16):
            body += await reader.readexactly(size)
            await reader.readexactly(2)
        await reader.readuntil(b"\r\n")
    for line in lines:
        if line.startswith(b"content-length:"):
            body = await reader.readexactly(int(line.partition(b":")[2]))
    return head, body


@contextlib.asynccontextmanager
async def pair(
    directory: Path,
    handler: Handler = echo,
    *,
    client: dict[str, Any] | None = None,
    server: dict[str, Any] | None = None,
    between: Callable[[int], contextlib.AbstractAsyncContextManager[int]] | None = None,
    service: StockService | None = None,
    mutual: bool = False,
    passport: bool = False,
    proxy: bool = False,
    egress: dict[str, Any] | None = None,
    host: str = LOCAL,
) -> AsyncIterator[Pair]:
    """A backend, our egress, maybe somebody between, our ingress."""
    agent, served = StockAgent(directory / "aa.sock"), service or StockService()
    made = Pair(agent, served)
    async with contextlib.AsyncExitStack() as stack:
        backend = await stack.enter_async_context(serving(handler))
        await stack.enter_async_context(agent.running())
        await stack.enter_async_context(served.running())
        attest: dict[str, Any] = {"aa_addr": f"unix://{agent.socket}"}
        verify: dict[str, Any] = {"as_addr": served.address, "policy_ids": ["default"]}
        if passport:
            attest |= {"model": "passport", "as_addr": served.address, "policy_ids": ["default"]}
            verify |= {"model": "passport"}
        far = {
            "mapping": {
                "in": {"host": LOCAL, "port": 0}, "out": {"host": LOCAL, "port": backend},
            },
            "attest": attest, "ohttp": server or {}, **(egress or {}),
        }  # fmt: skip
        near: dict[str, Any] = {"verify": verify, "ohttp": client or {}}
        if mutual:
            far["verify"], near["attest"] = verify, attest
        outer = await stack.enter_async_context(running({"add_egress": [far]}, None, made.log))
        made.egress = port_of(outer, "egress[0]")
        target = made.egress
        if between is not None:
            target = await stack.enter_async_context(between(made.egress))
        if proxy:
            near["http_proxy"] = {"proxy_listen": {"host": LOCAL, "port": 0}}
        else:
            near["mapping"] = {
                "in": {"host": LOCAL, "port": 0}, "out": {"host": host, "port": target},
            }  # fmt: skip
        inner = await stack.enter_async_context(running({"add_ingress": [near]}, None, made.log))
        made.ingress = port_of(inner, "ingress[0]")
        yield made


def meddler(
    change: Callable[[bytes, bytes], Awaitable[tuple[bytes, bytes]]],
) -> Callable[[int], contextlib.AbstractAsyncContextManager[int]]:
    """Somebody between the gateways who sees each outer exchange whole.

    Args:
        change: takes request and response, as they came, and gives what is passed on.
    """

    def between(port: int) -> contextlib.AbstractAsyncContextManager[int]:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while True:
                head, body = await read_raw(reader)
                request, _ = await change(head + body, b"")
                answer = await ask_once(port, request)
                _, answer = await change(head + body, answer)
                writer.write(answer)
                await writer.drain()
                writer.close()
                return

        return serving(serve)

    return between


async def read_raw(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """A request's bytes as they are, chunk framing included."""
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    if b"transfer-encoding: chunked" in lines:
        return head, await reader.readuntil(b"\r\n0\r\n\r\n")
    for line in lines:
        if line.startswith(b"content-length:"):
            return head, await reader.readexactly(int(line.partition(b":")[2]))
    return head, b""


async def ask_once(port: int, request: bytes) -> bytes:
    """Send bytes; the answer until the other end closes."""
    reader, writer = await asyncio.open_connection(LOCAL, port)
    request = request.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n", 1)
    try:
        writer.write(request)
        await writer.drain()
        async with asyncio.timeout(15):
            return await reader.read()
    finally:
        writer.close()


def post(path: str, body: bytes, *headers: str) -> bytes:
    """A request of a client, after which it closes."""
    lines = [
        f"POST {path} HTTP/1.1", "host: model", f"content-length: {len(body)}",
        "connection: close", *headers,
    ]  # fmt: skip
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def status_of(answer: bytes) -> int:
    """Status of an answer; 0 for none."""
    return int(answer.split(b" ")[1]) if answer.startswith(b"HTTP/1.1 ") else 0


def outer(api: str, body: bytes, *, method: str = "POST", kind: str = "application/json") -> bytes:
    """An outer request for an API."""
    head = f"{method} / HTTP/1.1\r\nhost: e\r\ncontent-type: {kind}\r\n"
    head += f"x-tng-ohttp-api: {api}\r\n" if api else ""
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
