"""The egress's end of cai/1: every session is proven, then its streams go to the backend."""

from __future__ import annotations

import secrets
import time

from OpenSSL import SSL

from cai.attest.agent_client import ChannelAgent
from cai.attest.channel import ChannelEvidence
from tng.channel.link import Link
from tng.channel.pipe import TlsPipe
from tng.channel.session import give_proof
from tng.channel.streams import Channel, Stream
from tng.channel.tls import ChannelKey, server_context
from tng.config.trust import Attest
from tng.operation.journal import Journal
from tng.streams import Backend, Caller


class SessionEgress:
    """One egress entry's sessions.

    Args:
        attest: how this end proves itself.
        padding: whether DATA frames are padded.
        journal: where its lines go.
        agent: source of proofs; by default the agent behind ``attest.aa_addr``.
    """

    def __init__(
        self,
        attest: Attest,
        *,
        padding: bool,
        journal: Journal,
        agent: ChannelAgent | None = None,
    ) -> None:
        self._padding = padding
        self._journal = journal
        self._agent = agent or ChannelAgent(attest.socket)
        self._key = ChannelKey()
        self._context = server_context(self._key)
        self._channels: set[Channel] = set()

    @property
    def context(self) -> SSL.Context:
        """The TLS context of these sessions."""
        return self._context

    async def serve(self, pipe: TlsPipe, backend: Backend, peer: str) -> None:
        """Serve one session to its end.

        Raises:
            CaiError: it could not be proven, or broke.
        """
        started = time.monotonic()
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

    def leave(self) -> None:
        """Take no new sessions and streams."""
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

    async def _prove(self, leaf: bytes) -> ChannelEvidence:
        return await self._agent.prove(leaf)
