"""RATS-TLS with multiplexing: HTTP/2 inside, each stream a CONNECT to ``tng.internal``.

One reading task for a connection, which never waits for writing; streams wait for window, as the
peer's flow control grants it, and give window back as their reader consumes (RFC 9113).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Iterable

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings

from cai.errors import CaiError, PeerError, PeerUnreachable
from tng.channel.pipe import TlsPipe
from tng.streams import Code, StreamReset

AUTHORITY = "tng.internal"
"""What every CONNECT names."""

STREAM_WINDOW = 1024 * 1024
"""Window that each direction of a stream starts with, bytes."""

CONNECTION_WINDOW = 8 * 1024 * 1024
"""Window of a connection, bytes."""

MAX_FRAME = 64 * 1024
"""Largest frame that is accepted, bytes."""

MAX_STREAMS = 256
"""Most streams that a peer may have open at once."""

MAX_HEADER_LIST = 16 * 1024
"""Largest header list, bytes."""

MAX_UNSENT = 1024 * 1024
"""Most unsent bytes when the connection answers without waiting; beyond them it ends."""

DRAIN_S = 300.0
"""How long running streams may go on after the connection takes no new ones, seconds."""

Handler = Callable[["MultiplexStream"], Awaitable[None]]
"""What a server does with a stream that the client opened."""


class MultiplexStream:
    """One CONNECT: bytes in both directions, each of which ends on its own."""

    def __init__(self, connection: Multiplex, number: int) -> None:
        self.number = number
        self._connection = connection
        self._inbox: deque[tuple[bytes, int]] = deque()
        self._ended = False
        self._finished = False
        self._error: CaiError | None = None
        self._answered = asyncio.Event()
        self._readable = asyncio.Event()
        self.writable = asyncio.Event()

    async def opened(self) -> None:
        """Wait for the 200 of the server.

        Raises:
            StreamReset, PeerError: another answer, or the connection ended.
        """
        await self._answered.wait()
        if self._error:
            raise self._error

    async def read(self) -> bytes:
        """The next bytes; empty at the end of this direction.

        Raises:
            StreamReset, PeerError: the stream ended in another way.
        """
        while not self._inbox:
            if self._error:
                raise self._error
            if self._ended:
                return b""
            self._readable.clear()
            await self._readable.wait()
        data, credit = self._inbox.popleft()
        self._connection.consumed(self.number, credit)
        return data

    async def write(self, data: bytes) -> None:
        """Send bytes, waiting for window and for the socket.

        Raises:
            StreamReset, PeerError: the stream or connection ended.
        """
        offset = 0
        while offset < len(data):
            while (room := self._connection.room(self.number)) == 0 and not self._error:
                self.writable.clear()
                await self.writable.wait()
            if self._error:
                raise self._error
            piece = data[offset : offset + room]
            offset += len(piece)
            await self._connection.send_data(self.number, piece)

    async def accept(self) -> None:
        """Tell the client that the upstream is connected (server)."""
        await self._connection.answer(self.number, 200)

    async def finish(self) -> None:
        """End this direction; the other one goes on."""
        if self._finished or self._error:
            return
        self._finished = True
        await self._connection.end(self.number)
        self._forget_if_over()

    def reset(self, code: Code = Code.CANCELLED, text: str = "") -> None:
        """Give the stream up, unless it is over."""
        if self._error or (self._finished and self._ended):
            return
        self.fail(StreamReset(code, text))
        self._connection.reset(self.number)

    def fail(self, error: CaiError) -> None:
        """End both directions with an error (from the connection)."""
        if self._error is None:
            self._error = error
        for event in (self._answered, self._readable, self.writable):
            event.set()

    def take(self, data: bytes, credit: int) -> None:
        """Bytes of the peer (from the connection)."""
        self._inbox.append((data, credit))
        self._readable.set()

    def answered(self, *, accepted: bool) -> None:
        """The server's answer (from the connection)."""
        if not accepted:
            self.fail(StreamReset(Code.UPSTREAM, "the peer refuses the stream"))
        self._answered.set()

    def ended(self) -> None:
        """The peer ended its direction (from the connection)."""
        self._ended = True
        self._answered.set()
        self._readable.set()
        self._forget_if_over()

    def _forget_if_over(self) -> None:
        if self._finished and self._ended:
            self._connection.forget(self.number)


class Multiplex:
    """One HTTP/2 connection over an attested TLS session.

    Args:
        pipe: the session, the peer judged.
        handler: what to do with streams of the client; ``None`` makes this the client's end.
    """

    def __init__(self, pipe: TlsPipe, *, handler: Handler | None = None) -> None:
        self._pipe = pipe
        self._handler = handler
        self._streams: dict[int, MultiplexStream] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._leaving = False
        self._closed = asyncio.Event()
        # Header checks are off: a CONNECT of TNG carries two pseudo-headers only.
        self._http = h2.connection.H2Connection(
            h2.config.H2Configuration(
                client_side=handler is None,
                header_encoding="utf-8",
                validate_inbound_headers=False,
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
            )
        )
        self._http.local_settings = h2.settings.Settings(
            client=handler is None,
            initial_values={
                h2.settings.SettingCodes.ENABLE_PUSH: 0,
                h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
                h2.settings.SettingCodes.MAX_FRAME_SIZE: MAX_FRAME,
                h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: MAX_STREAMS,
                h2.settings.SettingCodes.MAX_HEADER_LIST_SIZE: MAX_HEADER_LIST,
            },
        )
        # The library applies such limits when the peer acknowledges a change; from the start there
        # is none to acknowledge.
        self._http.max_inbound_frame_size = MAX_FRAME
        self._http.decoder.max_header_list_size = MAX_HEADER_LIST
        self._http.initiate_connection()
        self._http.increment_flow_control_window(CONNECTION_WINDOW - 65535)
        self._reading = asyncio.create_task(self._read())

    @property
    def usable(self) -> bool:
        """Whether a stream may be opened."""
        return not self._leaving and not self._closed.is_set() and not self._pipe.closed

    @property
    def streams(self) -> int:
        """Streams running now."""
        return len(self._streams)

    async def open(self) -> MultiplexStream:
        """Open a stream (client).

        Raises:
            PeerUnreachable: the connection takes none.
        """
        if not self.usable:
            raise PeerUnreachable("the connection to the peer has ended")
        try:
            number = self._http.get_next_available_stream_id()
            self._http.send_headers(number, [(":method", "CONNECT"), (":authority", AUTHORITY)])
        except h2.exceptions.H2Error as error:
            raise PeerUnreachable("the connection to the peer takes no stream") from error
        stream = self._streams[number] = MultiplexStream(self, number)
        await self._send()
        return stream

    def leave(self) -> None:
        """Take no new streams; end when the last one has."""
        self._leaving = True
        if not self._streams:
            self._pipe.close()

    async def close(self) -> None:
        """End everything now."""
        self._leaving = True
        self._reading.cancel()
        for task in list(self._tasks):
            task.cancel()
        self._fail(PeerError("the connection was closed"))
        self._pipe.close()
        await asyncio.gather(self._reading, *self._tasks, return_exceptions=True)

    async def wait_closed(self) -> None:
        """Wait until the connection has ended."""
        await self._closed.wait()

    def room(self, number: int) -> int:
        """Bytes that may be sent on a stream now."""
        try:
            window = self._http.local_flow_control_window(number)
        except h2.exceptions.H2Error:
            return 0
        return max(0, min(window, self._http.max_outbound_frame_size))

    async def send_data(self, number: int, data: bytes) -> None:
        """Send one frame of a stream."""
        self._do(lambda: self._http.send_data(number, data))
        await self._send()

    async def answer(self, number: int, status: int) -> None:
        """Answer a CONNECT (server)."""
        self._do(lambda: self._http.send_headers(number, [(":status", str(status))]))
        await self._send()

    async def end(self, number: int) -> None:
        """End this direction of a stream."""
        self._do(lambda: self._http.end_stream(number))
        await self._send()

    def reset(self, number: int) -> None:
        """Reset a stream, without waiting."""
        with contextlib.suppress(PeerError, h2.exceptions.H2Error):
            self._http.reset_stream(number, h2.errors.ErrorCodes.CANCEL)
            self._flush()
        self.forget(number)

    def consumed(self, number: int, credit: int) -> None:
        """Give window back for bytes that the reader has taken."""
        with contextlib.suppress(PeerError, h2.exceptions.H2Error):
            self._http.acknowledge_received_data(credit, number)
            self._flush()

    def forget(self, number: int) -> None:
        """A stream is over."""
        self._streams.pop(number, None)
        if self._leaving and not self._streams:
            self._pipe.close()

    async def _read(self) -> None:
        error: CaiError = PeerError("the peer closed the connection")
        try:
            self._flush()
            while True:
                data = await self._pipe.receive()
                for event in self._http.receive_data(data) if data else ():
                    self._take(event)
                self._flush()
        except CaiError as ended:
            error = ended
        except (h2.exceptions.H2Error, UnicodeDecodeError) as broken:
            error = PeerError(f"the peer breaks HTTP/2: {type(broken).__name__}")
            with contextlib.suppress(PeerError):
                self._flush()
        finally:
            self._fail(error)
            self._pipe.close()
            self._closed.set()

    def _take(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.RequestReceived):
            self._accept(event.stream_id or 0, _header(event.headers, ":method"))
            return
        if isinstance(event, (h2.events.WindowUpdated, h2.events.RemoteSettingsChanged)):
            for stream in list(self._streams.values()):
                stream.writable.set()
            return
        if isinstance(event, h2.events.ConnectionTerminated):
            self._leaving = True
            return
        stream_of = self._streams.get(getattr(event, "stream_id", None) or 0)
        if isinstance(event, h2.events.DataReceived):
            if stream_of is None:
                self.consumed(event.stream_id, event.flow_controlled_length or 0)
            else:
                stream_of.take(event.data or b"", event.flow_controlled_length or 0)
        elif stream_of is None:
            return
        elif isinstance(event, h2.events.ResponseReceived):
            stream_of.answered(accepted=_header(event.headers, ":status") == "200")
        elif isinstance(event, h2.events.StreamEnded):
            stream_of.ended()
        elif isinstance(event, h2.events.StreamReset):
            stream_of.fail(StreamReset(Code.UPSTREAM, "the peer reset the stream"))
            self.forget(stream_of.number)

    def _accept(self, number: int, method: str) -> None:
        if self._handler is None:
            return
        if method != "CONNECT" or self._leaving:
            status = "503" if method == "CONNECT" else "400"
            self._http.send_headers(number, [(":status", status)], end_stream=True)
            return
        stream = self._streams[number] = MultiplexStream(self, number)
        task = asyncio.create_task(self._serve(stream))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, stream: MultiplexStream) -> None:
        assert self._handler is not None  # noqa: S101 - only a server accepts
        try:
            await self._handler(stream)
        finally:
            stream.reset(Code.INTERNAL)

    def _do(self, action: Callable[[], None]) -> None:
        try:
            action()
        except h2.exceptions.H2Error as error:
            raise PeerError("the stream has ended") from error

    async def _send(self) -> None:
        self._flush(bounded=False)
        await self._pipe.drain()

    def _flush(self, *, bounded: bool = True) -> None:
        data = self._http.data_to_send()
        if data:
            self._pipe.put(data)
        if bounded and self._pipe.unsent > MAX_UNSENT:
            self._pipe.abort()
            raise PeerError("the peer does not take what it asks for")

    def _fail(self, error: CaiError) -> None:
        for stream in list(self._streams.values()):
            stream.fail(error)
        self._streams.clear()


def _header(headers: Iterable[tuple[object, object]] | None, name: str) -> str:
    for found, value in headers or ():
        if found == name:
            return str(value)
    return ""
