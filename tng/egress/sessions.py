"""The egress's end of cai/1: every session is proven, then its streams go to the backend."""

from __future__ import annotations

import secrets
import time
from collections import Counter
from hashlib import sha256
from typing import Protocol

from OpenSSL import SSL

from cai.attest.agent_client import Busy, ChannelAgent, ProofRequest, SessionProof
from cai.attest.channel import Role
from tng.channel.handshake import Claim
from tng.channel.link import Link
from tng.channel.pipe import TlsPipe
from tng.channel.session import Owes, Proofs, prove_session
from tng.channel.streams import Channel, Stream
from tng.channel.tls import ChannelKey, server_context
from tng.config.trust import Attest
from tng.operation.journal import Journal
from tng.streams import Backend, Caller, Code, Proven

MAX_OPENING = 384
"""Most sessions of one entry that are not proven yet; a flood of them leaves the others alone."""

MAX_OPENING_PER_SOURCE = 256
"""Most sessions from one address that are not proven yet."""


class ClientJudge(Protocol):
    """Turns the claim of a client into a verdict."""

    async def judge(self, claim: Claim, subject: str) -> Proven:
        """Raises: CaiError: it does not pass."""


class SessionEgress:
    """One egress entry's sessions.

    Args:
        attest: how this end proves itself.
        padding: whether DATA frames are padded.
        journal: where its lines go.
        agent: source of proofs; by default the agent behind ``attest.aa_addr``.
        judge: of the clients; ``None`` demands no proof of them.
    """

    def __init__(
        self,
        attest: Attest,
        *,
        padding: bool,
        journal: Journal,
        agent: ChannelAgent | None = None,
        judge: ClientJudge | None = None,
    ) -> None:
        self._padding = padding
        self._journal = journal
        self._agent = agent or ChannelAgent(attest.socket)
        self._judge = judge
        self._key = ChannelKey()
        self._context = server_context(self._key, demand=judge is not None)
        self._channels: set[Channel] = set()
        self._opening: Counter[str] = Counter()

    @property
    def context(self) -> SSL.Context:
        """The TLS context of these sessions."""
        return self._context

    async def serve(self, pipe: TlsPipe, backend: Backend, peer: str, source: str = "") -> None:
        """Serve one session to its end.

        Args:
            pipe: its TLS session.
            backend: where its streams go.
            peer: for the log.
            source: address of the client.

        Raises:
            CaiError: it could not be proven, or broke.
        """
        started = time.monotonic()
        link = Link(pipe, padding=self._padding)
        proofs = await self._open(link, peer, source)
        elapsed = 1000 * (time.monotonic() - started)
        both = " by both ends" if self._judge is not None else ""
        self._journal.line(f"{peer} session proven{both} in {elapsed:.0f} ms")
        session = secrets.token_hex(8)
        client = sha256(link.tls.peer_spki()).hexdigest() if self._judge is not None else ""

        async def carry(stream: Stream) -> None:
            await backend.carry(stream, Caller(f"{peer} stream {stream.number}", session, client))

        channel = Channel(link, proofs, handler=carry)
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

    async def _open(self, link: Link, peer: str, source: str) -> Proofs:
        if (
            self._opening.total() >= MAX_OPENING
            or self._opening[source] >= MAX_OPENING_PER_SOURCE
        ):
            await link.refuse(Code.BUSY, "too many sessions wait for their proof")
            raise Busy("refused: too many sessions wait for their proof")
        judge = self._judge
        owes = Owes(self._prove, self._key.spki, sha256(self._key.spki).digest(), source)
        self._opening[source] += 1
        try:
            return await prove_session(
                link,
                Role.SERVER,
                owes=owes,
                judge=None if judge is None else lambda claim: judge.judge(claim, f"client {peer}"),
            )
        finally:
            self._opening[source] -= 1
            if not self._opening[source]:
                del self._opening[source]

    async def _prove(self, request: ProofRequest) -> SessionProof:
        return await self._agent.prove(request)
