"""The plain backend: each stream is one connection to the upstream, bytes as they are."""

from __future__ import annotations

import asyncio
import contextlib

from cai.errors import FormatError, PeerError, PeerUnreachable
from tng.config.addresses import TcpUpstream, Upstream
from tng.operation.journal import Journal
from tng.relay import relay
from tng.streams import ByteStream, Caller, Code

UPSTREAM_TIMEOUT_S = 5.0
"""Longest wait for the upstream to accept a connection, seconds."""


class RawBackend:
    """Relays to one fixed upstream, which a client cannot choose.

    Args:
        upstream: of this guest.
        journal: where its lines go.
        unsafe: the ``unsafe_…`` settings of the entry.
    """

    def __init__(self, upstream: Upstream, journal: Journal, unsafe: tuple[str, ...]) -> None:
        self._upstream = upstream
        self._journal = journal
        self._unsafe = unsafe

    @property
    def unsafe(self) -> tuple[str, ...]:
        """The ``unsafe_…`` settings in force."""
        return self._unsafe

    def leave(self) -> None:
        """Take no further request: the sessions see to that."""

    async def carry(self, stream: ByteStream, caller: Caller) -> None:
        """Serve one stream to its end."""
        try:
            reader, writer = await connect_upstream(self._upstream)
        except PeerUnreachable as error:
            # The client learns that there is none, not where it would have been.
            stream.reset(Code.UPSTREAM, "the upstream of this egress does not answer")
            self._journal.line(f"{caller.name}: {error.message}")
            return
        try:
            await stream.accept()
            sent, received = await relay(stream, reader, writer)
            self._journal.line(f"{caller.name} done, {sent} B in, {received} B out")
        except (PeerError, FormatError) as error:
            self._journal.line(f"{caller.name} ended: {error.message}")
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
