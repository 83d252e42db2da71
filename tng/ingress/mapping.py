"""Ingress `mapping`: a local port that leads, attested, to one fixed peer.

Whatever the client speaks is carried as it is. Without a proven channel a client that speaks
HTTP is told why; any other gets a closed connection, and never a byte of anything else.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time

from cai.errors import CaiError, PeerError
from tng.config.addresses import TcpUpstream
from tng.operation.journal import Journal, endpoint_text
from tng.peers.destination import Destination
from tng.relay import relay
from tng.streams import Code, Peers

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
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, target: TcpUpstream
    ) -> None:
        """Serve one client connection to its end."""
        if self._clients >= MAX_CLIENTS:
            writer.close()
            return
        self._clients += 1
        destination = Destination(target.host.lower(), target.port)
        client = endpoint_text(writer.get_extra_info("peername"))
        what = f"{self._name} {client} to {destination}"
        started = time.monotonic()
        try:
            sent, received = await self._carry(reader, writer, destination)
            elapsed = 1000 * (time.monotonic() - started)
            self._journal.line(f"{what} done, {received} B out, {sent} B in, {elapsed:.0f} ms")
        except CaiError as error:
            self._journal.line(f"{what} ended: {error.machine_code}: {error.message}")
        finally:
            self._clients -= 1
            writer.close()

    async def _carry(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        destination: Destination,
    ) -> tuple[int, int]:
        try:
            stream, _proven = await self._peers.open(destination)
        except CaiError as error:
            await _explain(reader, writer, error)
            raise
        try:
            try:
                await stream.opened()
            except PeerError as error:
                await _explain(reader, writer, error)
                raise
            return await relay(stream, reader, writer)
        finally:
            stream.reset(Code.CANCELLED)


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
