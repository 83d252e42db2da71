"""``binding: auto``: a session with peers of ours, key binding with peers that know only TNG's.

Both are offered in one handshake and the peer chooses, or in turn where this end proves itself too.
A guest of ours that does not choose ours is refused by its own claim (``channel.downgrade``), so
nobody in between can take the offer away (decisions §4, Downgrade).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from OpenSSL import SSL

from cai.errors import PeerError, PeerUnreachable, PeerWithoutEvidence
from tng.channel.link import dial
from tng.channel.pipe import TlsPipe
from tng.channel.tls import ALPN
from tng.config.filters import Filter
from tng.config.trust import ServiceVerify
from tng.peers.destination import Destination, resolve, server_name
from tng.peers.judge import also_service
from tng.peers.pool import SessionPeers
from tng.stock.peers import StockPeers
from tng.stock.tls import client_context
from tng.streams import ByteStream, Proven


class AutoPeers:
    """The peers of one entry, in the dialect that each of them chooses.

    Args:
        session: for those that choose ours.
        stock: for the others.
        filters: destination filters of the entry.
        own: gives the addresses that this process listens on.
        service: the attestation service that judges both; asked too when a peer cannot be reached,
            so that somebody who starts with nothing learns of everything that is missing.
    """

    def __init__(
        self,
        session: SessionPeers,
        stock: StockPeers,
        *,
        filters: Sequence[Filter],
        own: Callable[[], Iterable[tuple[str, int]]],
        service: ServiceVerify | None = None,
    ) -> None:
        self._session = session
        self._stock = stock
        self._filters = filters
        self._own = own
        self._service = service

    @property
    def unsafe(self) -> tuple[str, ...]:
        """The ``unsafe_…`` settings in force."""
        return tuple(dict.fromkeys((*self._session.unsafe, *self._stock.unsafe)))

    async def open(self, destination: Destination) -> tuple[ByteStream, Proven]:
        """A stream to a proven peer.

        Raises:
            DestinationRefused: the address may not be gone to.
            PeerUnreachable, PeerWithoutEvidence, EvidenceRefused, CaiError: no proven session.
        """
        if self._session.has(destination):
            return await self._session.open(destination)
        if self._stock.has(destination):
            return await self._stock.open(destination)
        try:
            pipe = await self._dial(destination)
        except PeerError as error:
            if self._service is None:
                raise
            raise await also_service(error, self._service) from error
        if pipe.tls.protocol == ALPN:
            return await self._session.adopt(destination, pipe)
        return await self._stock.adopt(destination, pipe)

    def status(self) -> dict[str, object]:
        """What the control interface shows."""
        session, stock = self._session.status(), self._stock.status()
        peers: dict[str, object] = {}
        for part in (stock, session):
            found = part.get("peers")
            peers.update(found if isinstance(found, dict) else {})
        return {**stock, **session, "dialect": "auto", "peers": peers, "unsafe": list(self.unsafe)}

    def leave(self) -> None:
        """Take no new streams."""
        self._session.leave()
        self._stock.leave()

    async def close(self) -> None:
        """End every session now."""
        await self._session.close()
        await self._stock.close()

    async def _dial(self, destination: Destination) -> TlsPipe:
        addresses = await resolve(destination, self._filters, self._own())
        identity = await self._stock.identity()
        if identity is None:
            both = (ALPN, *self._stock.protocols)
            return await self._reach(destination, addresses, client_context(None, both), both)
        # A key that proves one dialect never appears in the other, so they are offered in turn.
        # Who takes ours away gains nothing: the guest's stock evidence is refused then.
        try:
            return await self._reach(destination, addresses, self._session.context, (ALPN,))
        except PeerWithoutEvidence:
            stock = self._stock.protocols
            context = client_context(identity, stock)
            return await self._reach(destination, addresses, context, stock)

    @staticmethod
    async def _reach(
        destination: Destination,
        addresses: Sequence[str],
        context: SSL.Context,
        protocols: Sequence[bytes],
    ) -> TlsPipe:
        unreachable: PeerError | None = None
        for address in addresses:
            try:
                return await dial(
                    address, destination.port, context,
                    server_name=server_name(destination), protocols=protocols,
                )  # fmt: skip
            except PeerUnreachable as error:
                unreachable = unreachable or error
        raise unreachable or PeerUnreachable(f"the name {destination.host} has no address")
