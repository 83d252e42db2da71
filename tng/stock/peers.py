"""The stock peers of one ingress entry: dialling, judging their certificates, pooling."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Protocol

from cai.attest.verdict import Verdict, not_asked
from cai.errors import CaiError, PeerError, PeerUnreachable, Refused
from tng.channel.link import dial
from tng.channel.pipe import TlsPipe
from tng.config.filters import Filter
from tng.config.transport import RatsTls
from tng.operation.journal import Journal
from tng.peers.destination import Destination, resolve, server_name
from tng.stock.certificate import Identity
from tng.stock.identity import IdentityKeeper
from tng.stock.judge import CertificateJudge
from tng.stock.multiplex import Multiplex
from tng.stock.raw import RawStream
from tng.stock.tls import MULTIPLEX, RAW, client_context
from tng.streams import ByteStream, Proven

MAX_PEERS = 256
"""Most destinations of one entry with a remembered verdict."""

MAX_POOL = 16
"""Most multiplexed connections to one peer unless told otherwise."""

STREAMS_EACH = 100
"""Streams in one multiplexed connection before another is made, unless told otherwise."""


class Judge(Protocol):
    """Turns a peer's certificate into a verdict."""

    async def judge(self, der: bytes | None, subject: str) -> Proven:
        """Raises: CaiError: it does not pass."""

    async def close(self) -> None:
        """Close its connections."""


class NoJudge:
    """``no_ra``, or an ingress without ``verify``: whoever answers is taken."""

    async def judge(self, der: bytes | None, subject: str) -> Proven:
        """A verdict in which nothing was asked."""
        del der
        verdict = Verdict(subject, (not_asked("stock.certificate"),), unsafe=("unsafe_no_ra",))
        return Proven(verdict, float("inf"))

    async def close(self) -> None:
        """Nothing to close."""


@dataclass
class _State:
    verdict: Verdict | None = None
    error: CaiError | None = None
    at: datetime = field(default_factory=lambda: datetime.now(UTC))
    pool: list[tuple[Multiplex, Proven, float]] = field(default_factory=list)
    dialling: asyncio.Lock = field(default_factory=asyncio.Lock)


class StockPeers:
    """Sessions with stock peers.

    Args:
        name: of the entry.
        judge: of their certificates.
        keeper: of this end's own certificate, when it proves itself.
        transport: multiplexing and its limits.
        filters: destination filters of the entry.
        journal: where its lines go.
        own: gives the addresses that this process listens on.
    """

    def __init__(
        self,
        name: str,
        judge: CertificateJudge | NoJudge,
        keeper: IdentityKeeper | None,
        *,
        transport: RatsTls,
        filters: Sequence[Filter],
        journal: Journal,
        own: Callable[[], Iterable[tuple[str, int]]],
        unsafe: tuple[str, ...] = (),
    ) -> None:
        self._name = name
        self._judge: Judge = judge
        self._keeper = keeper
        self._transport = transport
        self._filters = filters
        self._journal = journal
        self._own = own
        self._unsafe = unsafe
        self._peers: dict[Destination, _State] = {}
        self._running: set[RawStream] = set()
        self._leaving = False

    @property
    def unsafe(self) -> tuple[str, ...]:
        """The ``unsafe_…`` settings in force."""
        return self._unsafe

    @property
    def protocols(self) -> tuple[bytes, ...]:
        """ALPN names to offer: exactly one, as stock peers do."""
        return (MULTIPLEX,) if self._transport.multiplex else (RAW,)

    async def open(self, destination: Destination) -> tuple[ByteStream, Proven]:
        """A stream to a proven peer.

        Raises:
            DestinationRefused: the address may not be gone to.
            PeerUnreachable, PeerWithoutEvidence, EvidenceRefused, CaiError: no proven session.
        """
        if self._transport.multiplex:
            return await self._pooled(destination)
        pipe = await self._dial(destination)
        proven = await self.prove(destination, pipe)
        return self.stream(pipe), proven

    async def adopt(self, destination: Destination, pipe: TlsPipe) -> tuple[ByteStream, Proven]:
        """A stream over a connection that was made elsewhere, once its peer has been judged.

        Raises:
            EvidenceRefused, CaiError: the peer does not pass.
        """
        proven = await self.prove(destination, pipe)
        if pipe.tls.protocol != MULTIPLEX:
            return self.stream(pipe), proven
        connection = Multiplex(pipe)
        state = self._state(destination)
        state.pool.append((connection, proven, _now() + proven.max_age_s))
        return await connection.open(), proven

    def has(self, destination: Destination) -> bool:
        """Whether a tunnel to this peer takes another stream."""
        state = self._peers.get(destination)
        return state is not None and self._room(state) is not None

    async def identity(self) -> Identity | None:
        """What this end presents when it is asked.

        Raises:
            CaiError: it cannot be made.
        """
        return await self._keeper.identity() if self._keeper else None

    def stream(self, pipe: TlsPipe) -> RawStream:
        """The stream of a connection whose peer has been judged."""
        self._running = {stream for stream in self._running if not stream.over}
        stream = RawStream(pipe)
        self._running.add(stream)
        return stream

    async def prove(self, destination: Destination, pipe: TlsPipe) -> Proven:
        """Judge the certificate that a peer presented; the pipe is dropped when it fails.

        Raises:
            CaiError: it does not pass.
        """
        state = self._state(destination)
        try:
            proven = await self._judge.judge(pipe.tls.peer_certificate(), f"guest at {destination}")
        except BaseException as error:
            pipe.abort()
            if isinstance(error, CaiError):
                state.error, state.at = error, datetime.now(UTC)
            if isinstance(error, Refused) and error.verdict is not None:
                state.verdict = error.verdict
            raise
        state.verdict, state.error, state.at = proven.verdict, None, datetime.now(UTC)
        return proven

    def status(self) -> dict[str, object]:
        """What the control interface shows."""
        return {
            "dialect": "h2" if self._transport.multiplex else "rats-tls",
            "unsafe": list(self.unsafe),
            "peers": {
                str(where): {
                    "connected": any(item[0].usable for item in state.pool),
                    "streams": sum(item[0].streams for item in state.pool),
                    "verdict": state.verdict.to_json() if state.verdict else None,
                    "error": state.error.to_json() if state.error else None,
                    "at": state.at.isoformat(timespec="seconds"),
                }
                for where, state in self._peers.items()
            },
        }

    def leave(self) -> None:
        """Take no new streams."""
        self._leaving = True
        for state in self._peers.values():
            for connection, _proven, _until in state.pool:
                connection.leave()

    async def close(self) -> None:
        """End every session now."""
        self._leaving = True
        for state in self._peers.values():
            for connection, _proven, _until in state.pool:
                await connection.close()
        for stream in self._running:
            stream.reset()
        await self._judge.close()
        if self._keeper is not None:
            await self._keeper.close()

    async def _pooled(self, destination: Destination) -> tuple[ByteStream, Proven]:
        state = self._state(destination)
        async with state.dialling:
            found = self._room(state)
            if found is None:
                pipe = await self._dial(destination)
                proven = await self.prove(destination, pipe)
                found = Multiplex(pipe), proven, _now() + proven.max_age_s
                state.pool.append(found)
        connection, proven, _until = found
        return await connection.open(), proven

    def _room(self, state: _State) -> tuple[Multiplex, Proven, float] | None:
        # A tunnel carries no new stream once the verdict behind it is too old.
        for connection, _proven, until in state.pool:
            if until <= _now():
                connection.leave()
        state.pool = [item for item in state.pool if item[0].usable or item[0].streams]
        usable = [item for item in state.pool if item[0].usable]
        if not usable:
            return None
        least = min(usable, key=lambda item: item[0].streams)
        each = self._transport.max_streams or STREAMS_EACH
        most = self._transport.max_connections or MAX_POOL
        if least[0].streams < each or len(usable) >= most:
            return least
        return None

    async def _dial(self, destination: Destination) -> TlsPipe:
        if self._leaving:
            raise PeerUnreachable("the gateway is stopping")
        addresses = await resolve(destination, self._filters, self._own())
        identity = await self._keeper.identity() if self._keeper else None
        context = client_context(identity, self.protocols)
        unreachable: PeerError | None = None
        for address in addresses:
            try:
                return await dial(
                    address, destination.port, context, server_name=server_name(destination),
                    protocols=self.protocols,
                )  # fmt: skip
            except PeerUnreachable as error:
                unreachable = unreachable or error
        raise unreachable or PeerUnreachable(f"the name {destination.host} has no address")

    def _state(self, destination: Destination) -> _State:
        state = self._peers.get(destination)
        if state is None:
            while len(self._peers) >= MAX_PEERS:
                idle = next(
                    (where for where, item in self._peers.items() if not item.pool), None
                )
                if idle is None:
                    raise PeerUnreachable(f"{MAX_PEERS} peers are in use already")
                del self._peers[idle]
            state = self._peers[destination] = _State()
        return state


def _now() -> float:
    return asyncio.get_running_loop().time()
