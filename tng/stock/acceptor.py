"""The egress's end of RATS-TLS: presents evidence, may demand it, hands streams to the backend."""

from __future__ import annotations

import secrets
from hashlib import sha256

from OpenSSL import SSL

from cai.errors import CaiError
from tng.channel.pipe import TlsPipe
from tng.operation.journal import Journal
from tng.stock.certificate import parse_certificate
from tng.stock.identity import IdentityKeeper
from tng.stock.judge import CertificateJudge
from tng.stock.multiplex import Multiplex, MultiplexStream
from tng.stock.raw import RawStream
from tng.stock.tls import MULTIPLEX, server_context
from tng.streams import Backend, Caller


class StockAcceptor:
    """Sessions with stock clients.

    Args:
        name: of the entry.
        keeper: of the certificate that it presents.
        judge: of the clients' certificates; ``None`` demands none.
        journal: where its lines go.
    """

    def __init__(
        self, name: str, keeper: IdentityKeeper, judge: CertificateJudge | None, journal: Journal
    ) -> None:
        self._name = name
        self._keeper = keeper
        self._judge = judge
        self._journal = journal
        self._context: tuple[object, SSL.Context] | None = None
        self._connections: set[Multiplex] = set()
        self._raw: set[RawStream] = set()

    async def context(self) -> SSL.Context:
        """The TLS context with a certificate that is young enough.

        Raises:
            CaiError: there is none.
        """
        identity = await self._keeper.identity()
        if self._context is None or self._context[0] is not identity:
            self._context = identity, server_context(identity, demand=self._judge is not None)
        return self._context[1]

    async def serve(self, pipe: TlsPipe, backend: Backend, peer: str) -> None:
        """Serve one session to its end.

        Raises:
            CaiError: the client does not prove what it must.
        """
        client_key = ""
        if self._judge is not None:
            client_key = await self._prove(pipe, peer)
        session = secrets.token_hex(8)
        if pipe.tls.protocol == MULTIPLEX:
            await self._multiplexed(pipe, backend, peer, session, client_key)
            return
        stream = RawStream(pipe)
        self._raw.add(stream)
        try:
            await backend.carry(stream, Caller(peer, session, client_key))
        finally:
            stream.reset()
            self._raw.discard(stream)

    @property
    def streams(self) -> int:
        """Streams running now."""
        return len(self._raw) + sum(item.streams for item in self._connections)

    def leave(self) -> None:
        """Take no new streams."""
        for connection in list(self._connections):
            connection.leave()

    async def close(self) -> None:
        """End every session now."""
        for connection in list(self._connections):
            await connection.close()
        for stream in list(self._raw):
            stream.reset()
        if self._judge is not None:
            await self._judge.close()
        await self._keeper.close()

    async def _prove(self, pipe: TlsPipe, peer: str) -> str:
        assert self._judge is not None  # noqa: S101 - by the caller
        der = pipe.tls.peer_certificate()
        try:
            await self._judge.judge(der, f"client {peer}")
        except CaiError:
            pipe.abort()
            raise
        return sha256(parse_certificate(der or b"").spki).hexdigest()

    async def _multiplexed(
        self, pipe: TlsPipe, backend: Backend, peer: str, session: str, client_key: str
    ) -> None:
        async def carry(stream: MultiplexStream) -> None:
            caller = Caller(f"{peer} stream {stream.number}", session, client_key)
            await backend.carry(stream, caller)

        connection = Multiplex(pipe, handler=carry)
        self._connections.add(connection)
        try:
            await connection.wait_closed()
        finally:
            self._connections.discard(connection)
            await connection.close()
