"""A simulated guest, an agent that proves with it, and gateways on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cai import merkle
from cai.attest.agent_client import ProofRequest, SessionProof
from cai.attest.channel import ChannelEvidence
from cai.attest.evidence import Evidence
from cai.attest.statement import (
    ChannelStatement,
    GpuFacts,
    Purpose,
    ServedModel,
    report_data,
)
from cai.errors import PeerError
from tng.config.entries import Config, parse
from tng.operation.journal import Journal
from tng.operation.service import Gateway

if TYPE_CHECKING:
    from cai.attest.sim import SimulatedGuest

NONCE = bytes(range(32))
LAUNCH = "ab" * 48
MODEL = ServedModel("01" * 32, "02" * 32)
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class World:
    """What a client and a guest share in these tests."""

    directory: Path
    guest: SimulatedGuest
    debug_guest: SimulatedGuest
    devices: tuple
    told: dict[str, str]

    @property
    def anchors(self) -> Path:
        return self.directory / "anchors"

    @property
    def policy(self) -> Path:
        return self.directory / "policy.toml"

    def verify(self, **more: object) -> dict[str, object]:
        return {
            "as_type": "builtin",
            "policy": str(self.policy),
            "collateral": str(self.anchors / "collateral"),
            "unsafe_simulated_root": str(self.anchors),
            **more,
        }


@dataclass
class FakeAgent:
    """Proves as the real agent does, one leaf a tree, or as a test wants it to."""

    world: World
    guest: SimulatedGuest
    calls: list[bytes] = field(default_factory=list)
    others: tuple[bytes, ...] = ()
    changes: dict[str, object] = field(default_factory=dict)
    answer: Callable[[bytes], Awaitable[ChannelEvidence]] | None = None
    requests: list[ProofRequest] = field(default_factory=list)
    ticket: bytes = b""
    good_for_s: float = math.inf

    async def prove(self, request: ProofRequest) -> SessionProof:
        self.calls.append(request.leaf)
        self.requests.append(request)
        if self.answer:
            return SessionProof(await self.answer(request.leaf), self.good_for_s)
        evidence = self.evidence([request.leaf, *self.others])
        return SessionProof(replace(evidence, ticket=self.ticket), self.good_for_s)

    def evidence(self, leaves: list[bytes], index: int = 0) -> ChannelEvidence:
        world = self.world
        gpu = Evidence(b"", world.devices).gpu_digest.hex()
        statement = ChannelStatement(
            launch_digest=LAUNCH,
            service_id="demo",
            owner_key="cd" * 32,
            models=(MODEL,),
            gpu=GpuFacts(gpu, NONCE.hex(), 5),
            guest_facts=world.told,
            ticket_digest="",
            dialects=("cai/1",),
            boot_id="05" * 16,
            epoch=1,
            session_root=merkle.root(leaves).hex(),
            session_size=len(leaves),
        )
        encoded = replace(statement, **self.changes).encode()  # type: ignore[arg-type]
        quote = self.guest.quote(report_data(encoded, Purpose.CHANNEL))
        path = tuple(merkle.inclusion_path(leaves, index))
        return ChannelEvidence(encoded, Evidence(quote, world.devices), index, path)


@contextlib.asynccontextmanager
async def running(
    config: dict[str, object] | Config,
    agent: FakeAgent | None = None,
    log: io.StringIO | None = None,
) -> AsyncIterator[dict[str, list[str]]]:
    """A gateway; yields its real addresses by entry."""
    parsed = config if isinstance(config, Config) else parse(config, where="test")
    gateway = Gateway(parsed, Journal(log or io.StringIO()), agent)  # type: ignore[arg-type]
    try:
        yield await gateway.start()
    finally:
        await gateway.close()


@contextlib.asynccontextmanager
async def serving(handler: Handler, path: Path | None = None) -> AsyncIterator[int]:
    """A plain server of a test, on a Unix socket or on a free port, which it yields."""
    tasks: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        tasks.add(task)
        try:
            await handler(reader, writer)
        except (OSError, PeerError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            tasks.discard(task)
            writer.close()

    if path is None:
        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
    else:
        server = await asyncio.start_unix_server(connected, path)
        port = 0
    try:
        yield port
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def egress_config(upstream: dict[str, object], **more: object) -> dict[str, object]:
    return {
        "add_egress": [
            {
                "mapping": {"in": {"host": "127.0.0.1", "port": 0}, "out": upstream},
                "attest": {"aa_addr": "unix:///nowhere/channel.sock"},
                **more,
            }
        ]
    }


def proxy_config(verify: dict[str, object], **more: object) -> dict[str, object]:
    return {
        "add_ingress": [
            {
                "http_proxy": {"proxy_listen": {"host": "127.0.0.1", "port": 0}, **more},
                "verify": verify,
            }
        ]
    }


def port_of(listen: dict[str, list[str]], name: str) -> int:
    return int(listen[name][0].rpartition(":")[2])


async def talk(port: int, request: bytes, *, until_close: bool = True) -> bytes:
    """Send bytes to a local port and read the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        await writer.drain()
        async with asyncio.timeout(15):
            if until_close:
                return await reader.read()
            return await reader.readuntil(b"\r\n\r\n")
    finally:
        writer.close()


def error_of(answer: bytes) -> dict[str, str]:
    """The error object of an HTTP answer."""
    body = answer.partition(b"\r\n\r\n")[2]
    error = json.loads(body)["error"]
    assert isinstance(error, dict)
    return error


async def read_request(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Head and body of one request at a plain server."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = 0
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            length = int(line.partition(b":")[2])
    return head, await reader.readexactly(length)


def echo(head: bytes, body: bytes) -> bytes:
    """The answer of a small engine: the request's first line and body."""
    answer = head.split(b"\r\n")[0] + b"|" + body
    return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(answer), answer)


async def echo_engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A small engine: answers with the request's first line and body."""
    writer.write(echo(*await read_request(reader)))
    await writer.drain()
