"""``on_mismatch: direct``: what no filter matches goes out in clear, because the entry says so.

The addresses are checked as for attested peers: metadata services, link-local ranges and this
gateway itself stay out of reach (decisions §7, Proxy).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Sequence

from cai.attest.verdict import Verdict, not_asked
from cai.errors import CaiError, PeerError, PeerUnreachable
from tng.channel.link import CONNECT_TIMEOUT_S
from tng.config.filters import Filter
from tng.peers.destination import Destination, resolve
from tng.streams import ByteStream, Code, Proven, StreamReset

UNSAFE = "on_mismatch: direct"
"""What status and verdicts show."""

_READ_SIZE = 64 * 1024


class PlainStream:
    """A TCP connection as a stream, unprotected."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._error: CaiError | None = None

    async def opened(self) -> None:
        """Nothing to wait for."""
        if self._error:
            raise self._error

    async def read(self) -> bytes:
        """The next bytes; empty at the end of this direction.

        Raises:
            PeerError: the connection broke.
        """
        if self._error:
            raise self._error
        try:
            return await self._reader.read(_READ_SIZE)
        except OSError as error:
            raise PeerError("the connection broke") from error

    async def write(self, data: bytes) -> None:
        """Send bytes, waiting for the socket.

        Raises:
            PeerError: the connection broke.
        """
        if self._error:
            raise self._error
        try:
            self._writer.write(data)
            await self._writer.drain()
        except OSError as error:
            raise PeerError("the connection broke") from error

    async def accept(self) -> None:
        """Nothing to say."""

    async def finish(self) -> None:
        """End this direction; the other one goes on."""
        with contextlib.suppress(OSError):
            self._writer.write_eof()

    def reset(self, code: Code = Code.CANCELLED, text: str = "") -> None:
        """Drop the connection."""
        if self._error is None:
            self._error = StreamReset(code, text)
            self._writer.transport.abort()


class DirectPeers:
    """Destinations that are gone to in clear.

    Args:
        filters: of the entry; what they mention may be private.
        own: gives the addresses that this process listens on.
    """

    def __init__(
        self, filters: Sequence[Filter], own: Callable[[], Iterable[tuple[str, int]]]
    ) -> None:
        self._filters = filters
        self._own = own

    @property
    def unsafe(self) -> tuple[str, ...]:
        """What status and verdicts show."""
        return (UNSAFE,)

    async def open(self, destination: Destination) -> tuple[ByteStream, Proven]:
        """A connection in clear.

        Raises:
            DestinationRefused: the address may not be gone to.
            PeerUnreachable: nothing answers there.
        """
        addresses = await resolve(destination, self._filters, self._own())
        reason = "no address"
        for address in addresses:
            try:
                async with asyncio.timeout(CONNECT_TIMEOUT_S):
                    reader, writer = await asyncio.open_connection(address, destination.port)
            except (OSError, TimeoutError) as error:
                reason = getattr(error, "strerror", None) or "no answer in time"
                continue
            verdict = Verdict(
                f"{destination} in clear", (not_asked("peer"),), unsafe=(UNSAFE,)
            )
            return PlainStream(reader, writer), Proven(verdict, float("inf"))
        raise PeerUnreachable(f"{destination} cannot be reached: {reason}")

    def status(self) -> dict[str, object]:
        """What the control interface shows."""
        return {"unsafe": list(self.unsafe)}

    def leave(self) -> None:
        """Nothing is kept."""

    async def close(self) -> None:
        """Nothing is kept."""
