"""RATS-TLS without multiplexing: one TLS connection is one stream, bytes as they are."""

from __future__ import annotations

from cai.errors import CaiError
from tng.channel.pipe import TlsPipe
from tng.channel.tls import SessionClosed
from tng.streams import Code, StreamReset

WRITE_SIZE = 256 * 1024
"""Most plaintext that is encrypted before the socket is waited for, bytes."""


class RawStream:
    """The stream of one connection; half-closes are kept, as close_notify.

    Args:
        pipe: its TLS session, the peer judged.
    """

    def __init__(self, pipe: TlsPipe) -> None:
        self._pipe = pipe
        self._ended = False
        self._finished = False
        self._error: CaiError | None = None

    async def opened(self) -> None:
        """Nothing to wait for: this dialect does not say whether the upstream is connected."""
        if self._error:
            raise self._error

    async def read(self) -> bytes:
        """The next bytes; empty at the end of this direction.

        Raises:
            PeerError: the connection broke.
        """
        while not self._ended:
            if self._error:
                raise self._error
            try:
                data = await self._pipe.receive()
            except SessionClosed:
                self._ended = True
                self._close_if_over()
                return b""
            if data:
                return data
        return b""

    async def write(self, data: bytes) -> None:
        """Send bytes, waiting for the socket.

        Raises:
            PeerError: the connection broke.
        """
        for start in range(0, len(data), WRITE_SIZE):
            if self._error:
                raise self._error
            self._pipe.put(data[start : start + WRITE_SIZE])
            await self._pipe.drain()

    async def accept(self) -> None:
        """Nothing to say: this dialect has no word for it."""

    async def finish(self) -> None:
        """End this direction; the other one goes on."""
        if self._finished:
            return
        self._finished = True
        self._pipe.finish()
        self._close_if_over()

    def reset(self, code: Code = Code.CANCELLED, text: str = "") -> None:
        """Drop the connection, unless it is over."""
        if self._error or (self._finished and self._ended):
            return
        self._error = StreamReset(code, text)
        self._pipe.abort()

    @property
    def over(self) -> bool:
        """Whether both directions have ended."""
        return self._pipe.closed or bool(self._error) or (self._finished and self._ended)

    def _close_if_over(self) -> None:
        if self._finished and self._ended:
            self._pipe.close()


