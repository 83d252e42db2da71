"""Ingress `mapping`: a local port that leads, attested, to one fixed peer.

Whatever the client speaks is carried as it is. Without a proven channel a client that speaks
HTTP is told why; any other gets a closed connection, and never a byte of anything else.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import replace

from cai.errors import CaiError
from tng.config.addresses import TcpUpstream
from tng.operation.accesslog import Access
from tng.operation.journal import Journal, endpoint_text
from tng.peers.destination import Destination
from tng.relay import relay
from tng.streams import ByteStream, Code, Peers

MAX_CLIENTS = 1024
"""Most client connections of one entry at once."""

EXPLAIN_TIMEOUT_S = 1.0
"""How long a refused client may take to show that it speaks HTTP, seconds."""

_METHODS = (b"GET ", b"POST ", b"PUT ", b"HEAD ", b"DELETE ", b"PATCH ", b"OPTIONS ", b"CONNECT ")


class PortMapping:
    """One ingress `mapping` entry.

    Args:
        name: of the entry.
        peers: its attested peers.
        journal: where its lines go.
    """

    def __init__(self, name: str, peers: Peers, journal: Journal) -> None:
        self._name = name
        self._peers = peers
        self._journal = journal
        self._clients = 0

    async def serve(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        targets: Sequence[TcpUpstream],
    ) -> None:
        """Serve one client connection to its end."""
        if self._clients >= MAX_CLIENTS:
            writer.close()
            return
        self._clients += 1
        destinations = [Destination(target.host.lower(), target.port) for target in targets]
        client = endpoint_text(writer.get_extra_info("peername"))
        access = Access(self._name, "tunnel", client, str(destinations[0]), "cut")
        started = time.monotonic()
        try:
            received, sent = await self._carry(reader, writer, destinations)
            access = replace(access, status="done", sent=sent, received=received)
        except CaiError as error:
            access = replace(
                access, status="failed", error=error.machine_code, message=error.message
            )
        finally:
            elapsed = int(1000 * (time.monotonic() - started))
            self._journal.access(replace(access, elapsed_ms=elapsed))
            self._clients -= 1
            writer.close()

    async def _carry(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        destinations: Sequence[Destination],
    ) -> tuple[int, int]:
        try:
            stream = await self._open(destinations)
        except CaiError as error:
            await _explain(reader, writer, error)
            raise
        try:
            return await relay(stream, reader, writer)
        finally:
            stream.reset(Code.CANCELLED)


    async def _open(self, destinations: Sequence[Destination]) -> ByteStream:
        """The first target that proves itself and has a backend; nothing was sent to another."""
        for place, destination in enumerate(destinations, start=1):
            stream: ByteStream | None = None
            try:
                stream, _proven = await self._peers.open(destination)
                await stream.opened()
            except CaiError as error:
                if stream is not None:
                    stream.reset(Code.CANCELLED)
                if place == len(destinations):
                    raise
                self._journal.line(f"{self._name} passes over {destination}: {error.message}")
            else:
                return stream
        raise AssertionError("a rule has at least one target")


async def _explain(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, error: CaiError
) -> None:
    """Tell a client that speaks HTTP what went wrong."""
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(EXPLAIN_TIMEOUT_S):
            first = await reader.read(4096)
            if not first.startswith(_METHODS):
                return
            body = json.dumps({"error": error.to_json()}, ensure_ascii=False).encode() + b"\n"
            head = (
                "HTTP/1.1 502 Bad Gateway\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            writer.write(head.encode("ascii") + body)
            await writer.drain()
