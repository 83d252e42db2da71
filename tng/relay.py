"""Bytes between a stream and a plain connection, each direction with its own end."""

from __future__ import annotations

import asyncio
import contextlib

from cai.errors import CaiError, PeerError
from tng.streams import ByteStream, Code, DirectStream

MAX_UNSENT = 64 * 1024
"""Most bytes that the plain side has not taken yet with which more are added without waiting."""

CHUNK = 64 * 1024 - 32
"""Most bytes that are read from the plain side at once: four full frames of cai/1."""


async def relay(
    stream: ByteStream,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    first: bytes = b"",
) -> tuple[int, int]:
    """Relay both directions until both have ended; half-closes are kept.

    Args:
        stream: the attested side.
        reader: plain side in.
        writer: plain side out.
        first: bytes already read from the plain side.

    Returns:
        Bytes from the stream, and bytes to the stream.

    Raises:
        PeerError: one direction broke; the stream is reset then.
    """
    inward = asyncio.create_task(_to_plain(stream, writer))
    outward = asyncio.create_task(_to_stream(stream, reader, first))
    try:
        await asyncio.wait({inward, outward}, return_when=asyncio.FIRST_EXCEPTION)
        for task in (inward, outward):
            if task.done() and (error := task.exception()):
                raise error
        return inward.result(), outward.result()
    except PeerError:
        stream.reset(Code.CANCELLED)
        raise
    finally:
        for task in (inward, outward):
            task.cancel()
        await asyncio.gather(inward, outward, return_exceptions=True)


async def _to_plain(stream: ByteStream, writer: asyncio.StreamWriter) -> int:
    total = 0
    transport = writer.transport

    def sink(data: bytes) -> bool:
        nonlocal total
        if transport.is_closing() or transport.get_write_buffer_size() > MAX_UNSENT:
            return False
        transport.write(data)
        total += len(data)
        return True

    direct = stream if isinstance(stream, DirectStream) else None
    try:
        if direct is not None:
            direct.deliver_to(sink)
        while data := await stream.read():
            writer.write(data)
            total += len(data)
            await writer.drain()
        with contextlib.suppress(OSError):
            writer.write_eof()
    except OSError as error:
        raise PeerError("the plain side closed the connection") from error
    finally:
        if direct is not None:
            direct.deliver_to(None)
    return total


async def _to_stream(stream: ByteStream, reader: asyncio.StreamReader, first: bytes) -> int:
    if first:
        await stream.write(first)
    source = _Source(stream, reader)
    try:
        while data := await source.read():
            await stream.write(data)
    except OSError as error:
        raise PeerError("the plain side broke the connection") from error
    finally:
        source.close()
    await stream.finish()
    return len(first) + source.total


class _Source:
    """The plain side's bytes: straight into the stream where it takes them, else by ``read``."""

    def __init__(self, stream: ByteStream, reader: asyncio.StreamReader) -> None:
        self.total = 0
        self._reader = reader
        self._feed = reader.feed_data
        self._stream = stream if isinstance(stream, DirectStream) else None
        # Bytes go straight only while none wait in the reader and none are being written.
        self._straight = False
        self._emptied = False
        if self._stream is not None:
            # The protocol of asyncio's streams looks this method up for each piece of data.
            reader.feed_data = self._arrived  # type: ignore[method-assign,assignment]

    async def read(self) -> bytes:
        """What waits; empty at the end."""
        self._straight = self._emptied and self._stream is not None
        data = await self._reader.read(CHUNK)
        self._straight = False
        # A short read leaves nothing behind; what is fed from now on makes this untrue again.
        self._emptied = len(data) < CHUNK
        self.total += len(data)
        return data

    def _arrived(self, data: bytes) -> None:
        if self._straight and self._stream is not None:
            with contextlib.suppress(CaiError):
                if self._stream.write_now(data):
                    self.total += len(data)
                    return
            # From here on everything waits its turn behind this piece.
            self._straight = False
        self._emptied = False
        self._feed(data)

    def close(self) -> None:
        """Bytes only wait from now on."""
        self._straight = False
        self._stream = None
