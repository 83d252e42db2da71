"""Bytes in memory between two tasks, bounded, with the parts of a socket that h11's callers use."""

from __future__ import annotations

import asyncio

LIMIT = 256 * 1024
"""Bytes that may wait before the writer has to, bytes."""


class Pipe:
    """One direction. The writer's end resembles ``StreamWriter``, the reader's ``StreamReader``."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._ended = False
        self._broken = False
        self._sunk = False
        self._changed = asyncio.Event()

    @property
    def transport(self) -> Pipe:
        """What is aborted: the pipe itself."""
        return self

    def write(self, data: bytes) -> None:
        """Append bytes.

        Raises:
            BrokenPipeError: nobody reads any more.
        """
        if self._sunk:
            return
        if self._broken or self._ended:
            raise BrokenPipeError("the pipe is closed")
        self._buffer += data
        self._changed.set()

    async def drain(self) -> None:
        """Wait until there is room.

        Raises:
            BrokenPipeError: nobody reads any more.
        """
        while len(self._buffer) > LIMIT and not self._broken and not self._sunk:
            await self._wait()
        if self._broken:
            raise BrokenPipeError("the pipe is closed")

    async def read(self, size: int = LIMIT) -> bytes:
        """Some bytes; empty at the end.

        Raises:
            ConnectionResetError: the pipe was aborted.
        """
        while not self._buffer and not self._ended and not self._broken:
            await self._wait()
        if self._broken:
            raise ConnectionResetError("the pipe was aborted")
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        self._changed.set()
        return data

    def end(self) -> None:
        """No more bytes follow."""
        self._ended = True
        self._changed.set()

    def sink(self) -> None:
        """Take whatever still comes, and keep nothing of it: nobody will read it."""
        self._sunk = True
        self._buffer.clear()
        self._changed.set()

    def abort(self) -> None:
        """End both ends at once; what waits is lost."""
        self._broken = True
        self._changed.set()

    async def _wait(self) -> None:
        # One reader and one writer: clearing here loses no change, since both look first.
        self._changed.clear()
        await self._changed.wait()
