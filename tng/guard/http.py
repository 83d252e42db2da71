"""HTTP/1.1 at the guard: requests out of a stream, answers into it, bounded in size and time.

A task of its own reads the stream, so that a client who leaves is noticed while its answer is being
made, and no read is ever cut in half.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass

import h11

from cai.errors import CaiError, PeerError
from tng.guard.refusals import GuardRefused
from tng.ingress.http1 import ClientGone, demand_strict_head, told
from tng.streams import ByteStream

KEEP_ALIVE_S = 120.0
"""How long a stream may wait between requests, seconds."""

HEAD_TIMEOUT_S = 10.0
"""Longest time from the first byte of a head to its last, seconds."""

WRITE_TIMEOUT_S = 1800.0
"""How long a client may take nothing of its answer, seconds."""

LINGER_S = 10.0
"""Longest wait for a client to end its side after the last answer, seconds."""

AHEAD = 256 * 1024
"""Most bytes that are read ahead of what is asked for."""


@dataclass(frozen=True, slots=True)
class Incoming:
    """The head of a request.

    Attributes:
        method: upper case.
        path: without the query, which no inference route reads.
        headers: by lower-case name; of a name that is given twice both values.
    """

    method: str
    path: str
    headers: dict[str, tuple[str, ...]]

    def header(self, name: str) -> str | None:
        """The one value of a header.

        Raises:
            GuardRefused: it is given more than once.
        """
        values = self.headers.get(name, ())
        if len(values) > 1:
            raise GuardRefused(400, "bad_request", f"the header {name} is given twice")
        return values[0] if values else None


class StreamServer:
    """The HTTP end of one stream.

    Args:
        stream: accepted.
        head_bytes: longest head of a request, bytes.
    """

    def __init__(self, stream: ByteStream, *, head_bytes: int) -> None:
        self._stream = stream
        self._head_bytes = head_bytes
        self._buffer = b""
        self._ended = False
        self._error: CaiError | None = None
        self._arrived = asyncio.Event()
        self._wanted = asyncio.Event()
        self._wanted.set()
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=head_bytes)
        self._pump = asyncio.create_task(self._read_on())
        self.response_started = False

    async def next_request(self) -> Incoming | None:
        """The next head; ``None`` when the client has no more.

        Raises:
            GuardRefused: the client is to be told, and the stream ends.
            ClientGone: the stream broke.
        """
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=self._head_bytes)
        self.response_started = False
        try:
            async with asyncio.timeout(KEEP_ALIVE_S):
                while not (head := self._buffer.removeprefix(b"\r\n")):
                    if not await self._more():
                        return None
        except TimeoutError:
            return None
        self._buffer = head
        end = await self._head_end()
        if end is None:
            return None
        raw, self._buffer = self._buffer[:end], self._buffer[end:]
        try:
            demand_strict_head(raw)
        except CaiError as error:
            raise GuardRefused(400, "bad_request", error.message) from error
        return self._parse(raw)

    async def body(self, limit: int, timeout_s: float) -> bytes:
        """The whole body.

        Args:
            limit: longest, bytes.
            timeout_s: longest time that it may take to arrive.

        Raises:
            GuardRefused: malformed, too long, or too slow.
            ClientGone: the client left inside it.
        """
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    event = self._http.next_event()
                    if event is h11.NEED_DATA:
                        if not self._buffer and not await self._more():
                            raise ClientGone("the client left inside its request")
                        data, self._buffer = self._buffer, b""
                        self._http.receive_data(data)
                    elif isinstance(event, h11.Data):
                        size += len(event.data)
                        if size > limit:
                            raise too_long(limit)
                        parts.append(bytes(event.data))
                    elif isinstance(event, h11.EndOfMessage):
                        self._buffer = self._http.trailing_data[0] + self._buffer
                        return b"".join(parts)
                    else:
                        raise GuardRefused(400, "bad_request", "the body is malformed")
        except h11.RemoteProtocolError as error:
            raise GuardRefused(400, "bad_request", f"the body: {told(error)}") from error
        except TimeoutError as error:
            raise GuardRefused(
                408, "slow_request", f"the body took longer than {timeout_s:g} s"
            ) from error

    async def until_gone(self) -> None:
        """Wait until the client leaves.

        Raises:
            ClientGone: always, unless it is cancelled.
        """
        while not self._ended and self._error is None:
            self._arrived.clear()
            await self._arrived.wait()
        raise ClientGone("the client left before the end of its answer")

    async def send(self, *events: h11.Event) -> None:
        """Send events of the answer.

        Raises:
            ClientGone: the client takes nothing any more.
            PeerError: the events do not fit, as a broken backend makes them.
        """
        data = b""
        try:
            for event in events:
                if isinstance(event, h11.Response):
                    self.response_started = True
                data += self._http.send(event) or b""
        except h11.LocalProtocolError as error:
            raise PeerError(f"the backend's answer cannot be sent on: {told(error)}") from error
        if data:
            try:
                async with asyncio.timeout(WRITE_TIMEOUT_S):
                    await self._stream.write(data)
            except (PeerError, TimeoutError) as error:
                raise ClientGone("the client left inside its answer") from error

    @property
    def waits_for_continue(self) -> bool:
        """Whether the client sends its body only after it was told to go on."""
        return self._http.they_are_waiting_for_100_continue

    @property
    def reusable(self) -> bool:
        """Whether another request may follow."""
        return self._http.our_state is h11.DONE and self._http.their_state is h11.DONE

    async def finish(self) -> None:
        """End the answers, and wait for the client to end too: a reset could overtake them."""
        with contextlib.suppress(CaiError, TimeoutError):
            await self._stream.finish()
            async with asyncio.timeout(LINGER_S):
                while await self._more():
                    self._buffer = b""

    async def close(self) -> None:
        """Stop reading."""
        self._pump.cancel()
        await asyncio.gather(self._pump, return_exceptions=True)

    async def _head_end(self) -> int | None:
        try:
            async with asyncio.timeout(HEAD_TIMEOUT_S):
                while (end := self._buffer.find(b"\r\n\r\n")) < 0:
                    if len(self._buffer) > self._head_bytes:
                        raise self._large()
                    if b"\n\n" in self._buffer:
                        raise GuardRefused(400, "bad_request", "the head has a bare LF")
                    if not await self._more():
                        return None
        except TimeoutError as error:
            raise GuardRefused(
                408, "slow_request", f"the head took longer than {HEAD_TIMEOUT_S:g} s"
            ) from error
        if end + 4 > self._head_bytes:
            raise self._large()
        return end + 4

    def _large(self) -> GuardRefused:
        return GuardRefused(
            431, "head_too_large", f"the head of a request has at most {self._head_bytes} bytes"
        )

    def _parse(self, raw: bytes) -> Incoming:
        try:
            self._http.receive_data(raw)
            event = self._http.next_event()
        except h11.RemoteProtocolError as error:
            raise GuardRefused(400, "bad_request", f"not HTTP/1.1: {told(error)}") from error
        if not isinstance(event, h11.Request) or event.http_version not in (b"1.0", b"1.1"):
            raise GuardRefused(400, "bad_request", "not an HTTP/1.1 request")
        headers: dict[str, tuple[str, ...]] = {}
        for name, value in event.headers:
            key = name.decode("ascii")
            headers[key] = (*headers.get(key, ()), value.decode("latin-1"))
        target = event.target.decode("ascii", "replace")
        return Incoming(event.method.decode("ascii"), target.partition("?")[0], headers)

    async def _more(self) -> bool:
        if self._error is not None:
            raise ClientGone("the client's stream broke") from self._error
        if self._ended:
            return False
        before = len(self._buffer)
        self._wanted.set()
        while len(self._buffer) == before and not self._ended and self._error is None:
            self._arrived.clear()
            await self._arrived.wait()
        if self._error is not None:
            raise ClientGone("the client's stream broke") from self._error
        return len(self._buffer) > before

    async def _read_on(self) -> None:
        try:
            while True:
                await self._wanted.wait()
                data = await self._stream.read()
                if not data:
                    self._ended = True
                    return
                self._buffer += data
                if len(self._buffer) >= AHEAD:
                    self._wanted.clear()
                self._arrived.set()
        except CaiError as error:
            self._error = error
        finally:
            self._arrived.set()


def too_long(limit: int) -> GuardRefused:
    """The refusal of a body beyond its limit."""
    return GuardRefused(413, "body_too_large", f"the body of a request has at most {limit} bytes")
