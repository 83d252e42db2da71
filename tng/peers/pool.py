"""The attested peers of one ingress entry: dialling, judging, and one shared channel for each.

A channel belongs to (entry, destination, policy, expectation): every entry has its own ``Peers``,
whose judge holds policy and expectation, and the pool is keyed by destination (decisions §7).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from typing import Protocol

from OpenSSL import SSL

from cai.attest.agent_client import ChannelAgent
from cai.attest.channel import Role
from cai.attest.verdict import Verdict
from cai.errors import CaiError, PeerError, PeerUnreachable, Refused
from tng.channel.handshake import Claim
from tng.channel.link import Link, dial
from tng.channel.pipe import TlsPipe
from tng.channel.session import Owes, prove_session
from tng.channel.streams import Channel, Stream
from tng.channel.tls import ChannelKey, client_context
from tng.config.filters import Filter
from tng.operation.journal import Journal
from tng.peers.destination import Destination, resolve, server_name
from tng.streams import Proven

MAX_PEERS = 256
"""Most destinations of one entry with a channel or a remembered verdict."""


@dataclass
class PeerState:
    """What is known of one destination.

    Attributes:
        channel: to open streams on, if there is one.
        proven: verdict behind that channel.
        dialling: the attempt in progress, shared by every request that waits for it.
        verdict: the last verdict, passed or not.
        error: why the last attempt failed.
        at: when that was.
    """

    channel: Channel | None = None
    proven: Proven | None = None
    dialling: asyncio.Task[tuple[Channel, Proven]] | None = None
    verdict: Verdict | None = None
    error: CaiError | None = None
    at: datetime = field(default_factory=lambda: datetime.now(UTC))

    def passed(self, proven: Proven) -> None:
        """Keep what a proof gave."""
        self.proven, self.verdict = proven, proven.verdict
        self.error, self.at = None, datetime.now(UTC)

    def failed(self, error: CaiError) -> None:
        """Keep why there is no proof."""
        self.error, self.at = error, datetime.now(UTC)
        if isinstance(error, Refused) and error.verdict is not None:
            self.verdict = error.verdict

    def to_json(self) -> dict[str, object]:
        """The state as the control interface shows it."""
        return {
            "connected": self.channel is not None and self.channel.usable,
            "streams": self.channel.streams if self.channel else 0,
            "verdict": self.verdict.to_json() if self.verdict else None,
            "error": self.error.to_json() if self.error else None,
            "at": self.at.isoformat(timespec="seconds"),
        }


class SessionJudge(Protocol):
    """Turns the claim of a session into a verdict."""

    kind: str

    @property
    def unsafe(self) -> tuple[str, ...]:
        """The ``unsafe_…`` settings in force."""

    async def judge(self, claim: Claim, subject: str) -> Proven:
        """Raises: CaiError: it does not pass."""


class SessionPeers:
    """Channels to the peers of one entry.

    Args:
        name: of the entry.
        judge: of the proofs.
        filters: its destination filters.
        padding: whether DATA frames are padded.
        journal: where its lines go.
        own: gives the addresses that this process listens on.
        agent: proves this end to a peer that demands it; ``None`` proves nothing.
    """

    def __init__(
        self,
        name: str,
        judge: SessionJudge,
        *,
        filters: Sequence[Filter],
        padding: bool,
        journal: Journal,
        own: Callable[[], Iterable[tuple[str, int]]],
        agent: ChannelAgent | None = None,
    ) -> None:
        self._name = name
        self._judge = judge
        self._filters = filters
        self._padding = padding
        self._journal = journal
        self._own = own
        self._key = ChannelKey() if agent is not None else None
        self._owes = None
        if agent is not None and self._key is not None:
            spki = self._key.spki
            self._owes = Owes(agent.prove, spki, sha256(spki).digest())
        self._context = client_context(self._key)
        self._peers: dict[Destination, PeerState] = {}
        self._retired: set[Channel] = set()

    @property
    def unsafe(self) -> tuple[str, ...]:
        """The ``unsafe_…`` settings in force."""
        return self._judge.unsafe

    @property
    def context(self) -> SSL.Context:
        """The TLS context of these sessions."""
        return self._context

    async def open(self, destination: Destination) -> tuple[Stream, Proven]:
        """A stream to a proven peer.

        Raises:
            DestinationRefused: the address may not be gone to.
            PeerUnreachable, PeerWithoutEvidence, EvidenceRefused, CaiError: no proven channel.
        """
        for attempt in (1, 2):
            channel, proven = await self._channel(destination, None)
            try:
                return await channel.open(), proven
            except PeerError:
                # The channel ended between being found and being used: one new one.
                if attempt == 2:
                    raise
        raise AssertionError("unreachable")

    def has(self, destination: Destination) -> bool:
        """Whether a channel stands, or is being made."""
        state = self._peers.get(destination)
        if state is None:
            return False
        return state.dialling is not None or bool(state.channel and state.channel.usable)

    async def adopt(self, destination: Destination, pipe: TlsPipe) -> tuple[Stream, Proven]:
        """A stream over a session that was made elsewhere, once its peer has proven itself.

        Raises:
            PeerWithoutEvidence, EvidenceRefused, CaiError: no proven channel.
        """
        channel, proven = await self._channel(destination, pipe)
        return await channel.open(), proven

    def status(self) -> dict[str, object]:
        """What the control interface shows."""
        return {
            "verify": self._judge.kind,
            "unsafe": list(self.unsafe),
            "peers": {str(where): state.to_json() for where, state in self._peers.items()},
        }

    def leave(self) -> None:
        """Take no new streams on any channel."""
        for channel in self._channels():
            channel.leave()

    async def close(self) -> None:
        """End every channel and attempt now."""
        for state in self._peers.values():
            if state.dialling:
                state.dialling.cancel()
        for channel in self._channels():
            await channel.close()

    def _channels(self) -> list[Channel]:
        current = [state.channel for state in self._peers.values() if state.channel]
        return [*current, *self._retired]

    async def _channel(
        self, destination: Destination, pipe: TlsPipe | None
    ) -> tuple[Channel, Proven]:
        state = self._state(destination)
        if state.channel and state.proven and state.channel.usable:
            if pipe is not None:
                pipe.close()
            return state.channel, state.proven
        if state.dialling is None:
            state.dialling = asyncio.create_task(self._attempt(destination, state, pipe))
        elif pipe is not None:
            pipe.close()
        # Shielded: a request that gives up must not take the attempt from the others.
        return await asyncio.shield(state.dialling)

    def _state(self, destination: Destination) -> PeerState:
        state = self._peers.get(destination)
        if state is None:
            self._make_room()
            state = self._peers[destination] = PeerState()
        return state

    def _make_room(self) -> None:
        for destination, state in list(self._peers.items()):
            if len(self._peers) < MAX_PEERS:
                return
            if state.dialling is None and not (state.channel and state.channel.streams):
                del self._peers[destination]
                if state.channel:
                    state.channel.leave()
                    self._retire(state.channel)
        if len(self._peers) >= MAX_PEERS:
            raise PeerUnreachable(f"{MAX_PEERS} peers are in use already")

    async def _attempt(
        self, destination: Destination, state: PeerState, pipe: TlsPipe | None
    ) -> tuple[Channel, Proven]:
        try:
            channel, proven = await self._dial(destination, state, pipe)
        except CaiError as error:
            state.failed(error)
            raise
        else:
            if state.channel:
                self._retire(state.channel)
            state.channel = channel
            return channel, proven
        finally:
            state.dialling = None

    def _retire(self, channel: Channel) -> None:
        """Keep a replaced channel until its streams have ended."""
        self._retired.add(channel)
        task = asyncio.create_task(channel.wait_closed())
        task.add_done_callback(lambda _task: self._retired.discard(channel))
        if not channel.busy:
            channel.leave()

    async def _dial(
        self, destination: Destination, state: PeerState, pipe: TlsPipe | None
    ) -> tuple[Channel, Proven]:
        link = Link(pipe, padding=self._padding) if pipe else await self._link(destination)
        again = ""

        async def judge(claim: Claim) -> Proven:
            nonlocal again
            try:
                proven = await self._judge.judge(claim, f"guest at {destination}")
            except CaiError as error:
                state.failed(error)
                if again:
                    self._journal.line(f"{self._name} {destination} not{again}: {error.message}")
                raise
            state.passed(proven)
            mark = ", SIMULATED" if proven.verdict.simulated else ""
            checks = len(proven.verdict.checks)
            self._journal.line(f"{self._name} {destination} proven{again}: {checks} checks{mark}")
            again = " again"
            return proven

        proofs = await prove_session(link, Role.CLIENT, owes=self._owes, judge=judge)
        assert proofs.proven is not None  # noqa: S101 - the judge has spoken
        return Channel(link, proofs), proofs.proven

    async def _link(self, destination: Destination) -> Link:
        addresses = await resolve(destination, self._filters, self._own())
        name = server_name(destination)
        unreachable: PeerUnreachable | None = None
        for address in addresses:
            try:
                pipe = await dial(address, destination.port, self._context, server_name=name)
                return Link(pipe, padding=self._padding)
            except PeerUnreachable as error:
                # A name may stand for both address families while the peer listens on one.
                unreachable = unreachable or error
        raise unreachable or PeerUnreachable(f"the name {destination.host} has no address")
