"""The egress's end of cai/1: every session is proven, then its streams go to the backend."""

from __future__ import annotations

import asyncio
import secrets
import time

from cai.attest.agent_client import ChannelAgent
from cai.attest.channel import ChannelEvidence
from cai.errors import CaiError
from tng.channel.link import Link, PlainRequest, accept
from tng.channel.session import give_proof
from tng.channel.streams import Channel, Stream
from tng.channel.tls import ALPN, ChannelKey, server_context
from tng.config.trust import Attest
from tng.operation.journal import Journal, endpoint_text
from tng.streams import Backend, Caller

MAX_SESSIONS = 512
"""Most sessions of one listener at once; the newest is refused beyond them."""


class SessionEgress:
    """One egress entry's sessions.

    Args:
        name: of the entry.
        attest: how this end proves itself.
        padding: whether DATA frames are padded.
        journal: where its lines go.
        agent: source of proofs; by default the agent behind ``attest.aa_addr``.
    """

    def __init__(
        self,
        name: str,
        attest: Attest,
        *,
        padding: bool,
        journal: Journal,
        agent: ChannelAgent | None = None,
    ) -> None:
        self._name = name
        self._padding = padding
        self._journal = journal
        self._agent = agent or ChannelAgent(attest.socket)
        self._key = ChannelKey()
        self._context = server_context(self._key)
        self._channels: set[Channel] = set()
        self._sessions = 0
        self._leaving = False

    async def serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, backend: Backend
    ) -> None:
        """Serve one client connection to its end."""
        peer = f"{self._name} {endpoint_text(writer.get_extra_info('peername'))}"
        if self._sessions >= MAX_SESSIONS or self._leaving:
            writer.close()
            self._journal.line(f"{peer} refused: {MAX_SESSIONS} sessions are open")
            return
        self._sessions += 1
        started = time.monotonic()
        try:
            await self._serve(reader, writer, backend, peer, started)
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
            "sessions": self._sessions,
            "streams": self.streams,
        }

    async def _serve(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        backend: Backend,
        peer: str,
        started: float,
    ) -> None:
        pipe = await accept(reader, writer, lambda _offered: (self._context, (ALPN,)))
        link = Link(pipe, padding=self._padding)
        await give_proof(link, self._key.spki, self._prove)
        elapsed = 1000 * (time.monotonic() - started)
        self._journal.line(f"{peer} session proven in {elapsed:.0f} ms")
        session = secrets.token_hex(8)

        async def carry(stream: Stream) -> None:
            await backend.carry(stream, Caller(f"{peer} stream {stream.number}", session))

        channel = Channel(link, handler=carry)
        self._channels.add(channel)
        try:
            await channel.wait_closed()
        finally:
            self._channels.discard(channel)
            await channel.close()

    async def _prove(self, leaf: bytes) -> ChannelEvidence:
        return await self._agent.prove(leaf)
