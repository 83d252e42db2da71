"""One egress entry: takes connections and leads each to the dialect that its client offers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from OpenSSL import SSL

from cai.attest.agent_client import Dialect, dialects_of
from cai.errors import CaiError, PeerUnreachable
from tng.channel.link import PlainRequest, accept
from tng.channel.tls import ALPN
from tng.config.trust import Trust
from tng.egress.sessions import SessionEgress
from tng.operation.journal import Journal, endpoint_text
from tng.stock.acceptor import StockAcceptor
from tng.stock.tls import MULTIPLEX, NO_PROTOCOL, RAW
from tng.streams import Backend

MAX_SESSIONS = 512
"""Most sessions of one entry at once; the newest is refused beyond them."""


class EgressListener:
    """Connections of one entry.

    Args:
        name: of the entry.
        trust: who proves what.
        session: the end of our dialect; ``None`` when it is not offered.
        stock: the end of TNG's; ``None`` when it is not offered.
        journal: where its lines go.
    """

    def __init__(
        self,
        name: str,
        trust: Trust,
        session: SessionEgress | None,
        stock: StockAcceptor | None,
        journal: Journal,
    ) -> None:
        self._name = name
        self._trust = trust
        self._session = session
        self._stock = stock
        self._journal = journal
        self._dialects: frozenset[Dialect] | None = None
        self._sessions = 0
        self._leaving = False

    async def serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, backend: Backend
    ) -> None:
        """Serve one connection to its end."""
        peer = f"{self._name} {endpoint_text(writer.get_extra_info('peername'))}"
        if self._sessions >= MAX_SESSIONS or self._leaving:
            writer.close()
            self._journal.line(f"{peer} refused: {MAX_SESSIONS} sessions are open")
            return
        self._sessions += 1
        try:
            pipe = await accept(reader, writer, self._choose)
            if pipe.tls.protocol == ALPN:
                assert self._session is not None  # noqa: S101 - only then was it offered
                name = writer.get_extra_info("peername")
                source = str(name[0]) if isinstance(name, tuple) and name else ""
                await self._session.serve(pipe, backend, peer, source)
            else:
                assert self._stock is not None  # noqa: S101 - only then was it offered
                await self._stock.serve(pipe, backend, peer)
        except PlainRequest as error:
            self._journal.line(f"{peer} refused: {error.message}; told it so")
        except CaiError as error:
            self._journal.line(f"{peer} ended: {error.message}")
        finally:
            self._sessions -= 1
            writer.close()

    def status(self) -> dict[str, object]:
        """What the control interface shows."""
        streams = self._session.streams if self._session else 0
        streams += self._stock.streams if self._stock else 0
        return {"sessions": self._sessions, "streams": streams}

    def leave(self) -> None:
        """Take no new sessions and streams."""
        self._leaving = True
        for part in (self._session, self._stock):
            if part is not None:
                part.leave()

    async def close(self) -> None:
        """End every session now."""
        for part in (self._session, self._stock):
            if part is not None:
                await part.close()

    async def _choose(self, offered: tuple[bytes, ...]) -> tuple[SSL.Context, Sequence[bytes]]:
        served = await self._served()
        session = self._session if Dialect.SESSION in served else None
        stock = self._stock if Dialect.STOCK in served else None
        # Ours wherever the client knows it: it binds the session, stock evidence only a key.
        if session is not None and (ALPN in offered or stock is None):
            return session.context, (ALPN,)
        if stock is not None:
            return await stock.context(), (RAW, MULTIPLEX, NO_PROTOCOL)
        raise PeerUnreachable("the attestation agent serves no dialect of this egress")

    async def _served(self) -> frozenset[Dialect]:
        if self._dialects is None:
            attest = self._trust.attest
            if self._stock is None or attest is None:
                self._dialects = frozenset(Dialect)
            elif self._session is None:
                self._dialects = frozenset({Dialect.STOCK})
            else:
                try:
                    self._dialects = await dialects_of(attest.socket)
                except PeerUnreachable:
                    # Ours tells the client why there is no proof; asked again next time.
                    return frozenset({Dialect.SESSION})
        return self._dialects
