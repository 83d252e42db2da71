"""One HTTP connection, bounded where uvicorn has no bounds: how many, and how slowly they speak."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 20
"""How long a client may take from the first byte, or from connecting, to the end of a head,
seconds."""


def bounded_connections(most: int) -> type[H11Protocol]:
    """The protocol class of a listener with at most ``most`` connections."""

    class Bounded(_Bounded):
        limit = most

    return Bounded


class _Bounded(H11Protocol):
    limit = 0
    _head: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limit:
            # Not even an answer: whoever opens thousands of connections does not read it.
            transport.abort()
            return
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        if self.conn.their_state is h11.IDLE:
            self._expect_head()
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._forget_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_head()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        if self._head is None:
            self._head = self.loop.call_later(HEAD_SECONDS, self._too_slow)

    def _forget_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _too_slow(self) -> None:
        self._head = None
        transport: Any = self.transport
        if not transport.is_closing():
            transport.abort()
