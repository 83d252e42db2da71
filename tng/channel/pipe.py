"""A TLS session over a socket: ciphertext on the asyncio side, plaintext on the other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from cai.errors import PeerError
from tng.channel.tls import SessionClosed, TlsSession

READ_SIZE = 64 * 1024
"""Most ciphertext that is read at once, bytes."""


class TlsPipe:
    """One end of a TLS session and its socket.

    Args:
        reader: ciphertext in.
        writer: ciphertext out.
        tls: the session.
    """

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, tls: TlsSession
    ) -> None:
        self.tls = tls
        self._reader = reader
        self._writer = writer
        self._early = b""
        self._closed = False
        self._take: Callable[[bytes], None] | None = None
        self._direct = False

    @property
    def closed(self) -> bool:
        """Whether nothing can be sent any more."""
        return self._closed or self._writer.is_closing()

    @property
    def unsent(self) -> int:
        """Ciphertext that the socket has not taken yet, bytes."""
        return self._writer.transport.get_write_buffer_size()

    async def shake(self, first: bytes) -> None:
        """Run the TLS handshake; ``first`` is what has been read already.

        Raises:
            PeerWithoutEvidence: the peer's TLS is not what this end demands.
            PeerError: the connection ended.
        """
        try:
            data = first
            while True:
                if data:
                    self._early += self.tls.receive(data)
                self.flush()
                if self.tls.established:
                    return
                data = await self._read()
        finally:
            # The alert that says why must leave, also when receive() raised.
            if not self._writer.is_closing():
                self.flush()

    async def receive(self) -> bytes:
        """The next plaintext; may be empty, which is not the end.

        Raises:
            PeerError: the session has ended.
        """
        if self._early:
            early, self._early = self._early, b""
            return early
        if self.tls.ended:
            raise SessionClosed("the peer closed the session")
        plaintext = self.tls.receive(await self._read())
        # A key update asks for an answer that only TLS knows of.
        self.flush()
        return plaintext

    def hand_over(self, take: Callable[[bytes], None]) -> None:
        """Give plaintext to ``take`` as it arrives, without a task in between.

        ``receive`` has to be waited in all the same: it returns what came before, and raises at the
        end of the session or what ``take`` raised.
        """
        feed = self._reader.feed_data

        def arrived(data: bytes) -> None:
            if not self._direct:
                feed(data)
                return
            try:
                plaintext = self.tls.receive(data)
                self.flush()
                if plaintext:
                    take(plaintext)
                if self.tls.ended:
                    raise SessionClosed("the peer closed the session")
            except Exception as error:
                # Whoever waits in receive() has it; what still comes is for nobody.
                self._direct = False
                self._reader.set_exception(error)

        self._take = take
        # The protocol of asyncio's streams looks this method up for each piece of data.
        self._reader.feed_data = arrived  # type: ignore[method-assign,assignment]

    def put(self, data: bytes) -> None:
        """Encrypt and hand to the socket, without waiting.

        Raises:
            PeerError: the session has ended.
        """
        if self.closed:
            raise PeerError("the session has ended")
        self.tls.send(data)
        self.flush()

    async def drain(self) -> None:
        """Wait until the socket takes more.

        Raises:
            PeerError: the connection broke.
        """
        try:
            await self._writer.drain()
        except OSError as error:
            raise PeerError("the connection broke") from error

    def finish(self) -> None:
        """End this direction with close_notify; the other one goes on."""
        if not self.closed:
            self.tls.close()
            self.flush()

    def close(self) -> None:
        """Close politely: close_notify, then the socket."""
        if self._closed:
            return
        self._closed = True
        self.tls.close()
        if not self._writer.is_closing():
            self.flush()
            self._writer.close()

    def abort(self) -> None:
        """Drop the socket at once."""
        self._closed = True
        self._writer.transport.abort()

    def flush(self) -> None:
        """Hand what TLS wants to say to the socket."""
        ciphertext = self.tls.outgoing()
        if ciphertext:
            self._writer.write(ciphertext)

    async def _read(self) -> bytes:
        try:
            data = await self._reader.read(READ_SIZE)
        except OSError as error:
            raise PeerError("the connection broke") from error
        if not data:
            raise PeerError("the peer closed the connection")
        # A short read has emptied the reader; what was read is used up before the next wait.
        self._direct = self._take is not None and len(data) < READ_SIZE
        return data
