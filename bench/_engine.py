"""An HTTP server that costs little: 256 bytes for any path, 64 MiB for /bulk, tokens for /stream.

``python -m bench._engine`` prints its loopback port and serves until it is ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import time

BULK = 64 * 1024 * 1024
"""Bytes of the answer to /bulk."""

SMALL = 256
"""Bytes of any other answer."""

TOKENS = 300
"""Pieces of the answer to /stream."""

TOKEN_SIZE = 64
"""Bytes of each: when it was sent, nanoseconds of the monotonic clock, and spaces."""

TOKEN_PAUSE_S = 0.002
"""Between two of them, seconds."""


async def stream(writer: asyncio.StreamWriter) -> None:
    """The answer to /stream."""
    writer.write(f"HTTP/1.1 200 OK\r\ncontent-length: {TOKENS * TOKEN_SIZE}\r\n\r\n".encode())
    for _ in range(TOKENS):
        await asyncio.sleep(TOKEN_PAUSE_S)
        writer.write(str(time.monotonic_ns()).encode().ljust(TOKEN_SIZE))


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Serve one connection until the client leaves."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            if b"/stream" in head.split(b"\r\n")[0]:
                await stream(writer)
                continue
            size = BULK if b"/bulk" in head.split(b"\r\n")[0] else SMALL
            writer.write(f"HTTP/1.1 200 OK\r\ncontent-length: {size}\r\n\r\n".encode())
            for start in range(0, size, 1 << 18):
                writer.write(b"x" * min(1 << 18, size - start))
                await writer.drain()
    writer.close()


async def serve() -> None:
    """Listen on a free port and say which."""
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve())
