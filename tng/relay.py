"""Bytes between a stream and a plain connection, each direction with its own end."""

from __future__ import annotations

import asyncio
import contextlib

from cai.errors import PeerError
from tng.streams import ByteStream, Code

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
    try:
        while data := await stream.read():
            writer.write(data)
            total += len(data)
            await writer.drain()
        with contextlib.suppress(OSError):
            writer.write_eof()
    except OSError as error:
        raise PeerError("the plain side closed the connection") from error
    return total


async def _to_stream(stream: ByteStream, reader: asyncio.StreamReader, first: bytes) -> int:
    total = len(first)
    if first:
        await stream.write(first)
    try:
        while data := await reader.read(CHUNK):
            await stream.write(data)
            total += len(data)
    except OSError as error:
        raise PeerError("the plain side broke the connection") from error
    await stream.finish()
    return total
