"""Egress `mapping`: attested TLS in, one fixed plain upstream of the same guest out.

The upstream is the egress's own setting; a client cannot choose it. It must be a Unix socket or
loopback, unless the entry says ``unsafe_remote_upstream`` (decisions §7).
"""

from __future__ import annotations

import asyncio
import contextlib
import time

from cai.attest.agent_client import ChannelAgent
from cai.attest.channel import ChannelEvidence
from cai.errors import CaiError, FormatError, PeerError, PeerUnreachable
from tng.addresses import TcpUpstream, Upstream
from tng.channel import Channel, Stream
from tng.config import EgressMapping
from tng.frames import Code
from tng.journal import Journal, endpoint_text
from tng.link import PlainRequest, accept
from tng.relay import relay
from tng.session import give_proof
from tng.tls import ChannelKey, server_context

UPSTREAM_TIMEOUT_S = 5.0
"""Longest wait for the upstream to accept a connection, seconds."""

MAX_SESSIONS = 512
"""Most sessions of one listener at once; the newest is refused beyond them."""


class MappingEgress:
    """One egress entry: proves every session, then connects its streams to the upstream.

    Args:
        settings: the entry.
        journal: where its lines go.
        agent: source of proofs; by default the agent behind ``attest.aa_addr``.
    """

    def __init__(
        self, settings: EgressMapping, journal: Journal, agent: ChannelAgent | None = None
    ) -> None:
        self._settings = settings
        self._journal = journal
        self._agent = agent or ChannelAgent(settings.attest.socket)
        self._key = ChannelKey()
        self._context = server_context(self._key)
        self._channels: set[Channel] = set()
        self._sessions = 0
        self._leaving = False

    async def serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, upstream: Upstream
    ) -> None:
        """Serve one client connection to its end."""
        peer = f"{self._settings.name} {endpoint_text(writer.get_extra_info('peername'))}"
        if self._sessions >= MAX_SESSIONS or self._leaving:
            writer.close()
            self._journal.line(f"{peer} refused: {MAX_SESSIONS} sessions are open")
            return
        self._sessions += 1
        started = time.monotonic()
        try:
            await self._serve(reader, writer, upstream, peer, started)
        except PlainRequest as error:
            self._journal.line(f"{peer} refused: {error.message}; told it so")
        except CaiError as error:
            self._journal.line(f"{peer} ended: {error.message}")
        finally:
            self._sessions -= 1
            writer.close()

    def leave(self) -> None:
        """Take no new sessions and streams."""
        self._leaving = True
        for channel in list(self._channels):
            channel.leave()

    @property
    def streams(self) -> int:
        """Streams running now."""
        return sum(channel.streams for channel in self._channels)

    async def close(self) -> None:
        """End every session now."""
        for channel in list(self._channels):
            await channel.close()

    def status(self) -> dict[str, object]:
        """What the control interface shows."""
        return {
            "mode": "mapping",
            "sessions": self._sessions,
            "streams": self.streams,
            "unsafe": list(self._settings.unsafe),
        }

    async def _serve(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        upstream: Upstream,
        peer: str,
        started: float,
    ) -> None:
        link = await accept(reader, writer, self._context, padding=self._settings.padding)
        await give_proof(link, self._key.spki, self._prove)
        elapsed = 1000 * (time.monotonic() - started)
        self._journal.line(f"{peer} session proven in {elapsed:.0f} ms")
        channel = Channel(link, handler=lambda stream: self._carry(stream, upstream, peer))
        self._channels.add(channel)
        try:
            await channel.wait_closed()
        finally:
            self._channels.discard(channel)
            await channel.close()

    async def _prove(self, leaf: bytes) -> ChannelEvidence:
        return await self._agent.prove(leaf)

    async def _carry(self, stream: Stream, upstream: Upstream, peer: str) -> None:
        try:
            reader, writer = await connect_upstream(upstream)
        except PeerUnreachable as error:
            # The client learns that there is none, not where it would have been.
            stream.reset(Code.UPSTREAM, "the upstream of this egress does not answer")
            self._journal.line(f"{peer} stream {stream.number}: {error.message}")
            return
        try:
            await stream.accept()
            sent, received = await relay(stream, reader, writer)
            self._journal.line(
                f"{peer} stream {stream.number} done, {sent} B in, {received} B out"
            )
        except (PeerError, FormatError) as error:
            self._journal.line(f"{peer} stream {stream.number} ended: {error.message}")
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


async def connect_upstream(
    upstream: Upstream,
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to the upstream.

    Raises:
        PeerUnreachable: it does not accept a connection in time.
    """
    try:
        async with asyncio.timeout(UPSTREAM_TIMEOUT_S):
            if isinstance(upstream, TcpUpstream):
                return await asyncio.open_connection(upstream.host, upstream.port)
            return await asyncio.open_unix_connection(str(upstream.path))
    except (OSError, TimeoutError) as error:
        raise PeerUnreachable(f"upstream {upstream} does not answer: {error}") from error
