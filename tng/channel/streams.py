"""Streams over a proven session: many requests share one channel (spec-channel §7).

A channel has one reading task, which never waits for writing, so two ends can never wait for each
other. Each stream's bytes wait in a bounded inbox; credit goes back as the reader consumes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable

from cai.errors import CaiError, FormatError, PeerError, PeerUnreachable
from tng.channel.frames import (
    MAX_DATA,
    MAX_STREAM,
    Frame,
    FrameType,
    credit,
    parse_credit,
    parse_reason,
    reason,
)
from tng.channel.link import Link
from tng.channel.renewal import Renewal
from tng.channel.session import Proofs
from tng.streams import Code, StreamReset

STREAM_WINDOW = 256 * 1024
"""Credit that each direction of a stream starts with, bytes."""

MAX_BURST = 8 * MAX_DATA
"""Most bytes of one stream that are sent before another one has its turn."""

MAX_STREAMS = 256
"""Most streams open at once in a session."""

IDLE_S = 300.0
"""How long a session without a stream is kept, seconds."""

LOOK_S = 1.0
"""How often a session looks at its age, seconds."""

_MAX_CREDIT_TOTAL = 2**31 - 1

StreamHandler = Callable[["Stream"], Awaitable[None]]
"""What a server does with a stream that the client opened."""


class Stream:
    """One stream of a channel: bytes in both directions, each of which ends on its own.

    Args:
        channel: that it belongs to.
        number: its number.
    """

    def __init__(self, channel: Channel, number: int) -> None:
        self.number = number
        self._channel = channel
        self._inbox: deque[bytes] = deque()
        self._inbox_size = 0
        self._consumed = 0
        self._credit = STREAM_WINDOW
        self._peer_finished = False
        self._finished = False
        self._error: CaiError | None = None
        self._sink: Callable[[bytes], bool] | None = None
        self._opened = asyncio.Event()
        self._readable = asyncio.Event()
        self._writable = asyncio.Event()

    async def opened(self) -> None:
        """Wait until the server's upstream is connected.

        Raises:
            StreamReset, PeerError: it is not, or the session ended.
        """
        await self._opened.wait()
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
            if self._peer_finished:
                return b""
            self._readable.clear()
            await self._readable.wait()
        # All that waits at once: one write to the plain side instead of one for each frame.
        data = self._inbox.popleft() if len(self._inbox) == 1 else b"".join(self._inbox)
        self._inbox.clear()
        self._inbox_size = 0
        self._consume(len(data))
        return data

    def deliver_to(self, sink: Callable[[bytes], bool] | None) -> None:
        """Offer bytes to ``sink`` as they arrive; what it does not take waits for ``read``."""
        self._sink = sink

    def write_now(self, data: bytes) -> bool:
        """Send bytes if nothing has to be waited for; else send none of them."""
        ready = not self._error and not self._finished and not self._channel.congested
        if not ready or len(data) > min(self._credit, MAX_BURST):
            return False
        self._credit -= len(data)
        self._channel.send_soon(*self._data_frames(data, 0, len(data)))
        return True

    async def write(self, data: bytes) -> None:
        """Send bytes, waiting for credit and for the socket.

        Raises:
            StreamReset, PeerError: the stream or session ended.
        """
        offset = 0
        while offset < len(data):
            while self._credit == 0 and not self._error:
                self._writable.clear()
                await self._writable.wait()
            if self._error:
                raise self._error
            end = min(len(data), offset + self._credit, offset + MAX_BURST)
            self._credit -= end - offset
            frames = self._data_frames(data, offset, end)
            offset = end
            await self._channel.send(*frames)

    async def accept(self) -> None:
        """Tell the client that the upstream is connected (server)."""
        await self._channel.send(Frame(FrameType.OPENED, self.number))

    async def finish(self) -> None:
        """End this direction; the other one goes on."""
        if self._finished or self._error:
            return
        self._finished = True
        await self._channel.send(Frame(FrameType.FIN, self.number))
        self._forget_if_over()

    def reset(self, code: Code = Code.CANCELLED, text: str = "") -> None:
        """Give the stream up, unless it is over."""
        if self._error or (self._finished and self._peer_finished):
            return
        self.fail(StreamReset(code, text))
        with contextlib.suppress(PeerError):
            self._channel.send_soon(Frame(FrameType.RESET, self.number, reason(code, text)))
        self._channel.forget(self)

    def fail(self, error: CaiError) -> None:
        """End both directions with an error (from the channel)."""
        if self._error is None:
            self._error = error
        for event in (self._opened, self._readable, self._writable):
            event.set()

    def take(self, frame: Frame) -> None:
        """Take one frame of the peer (from the channel).

        Raises:
            FormatError: it breaks the rules of spec-channel §7.
        """
        if frame.type is FrameType.DATA:
            if self._peer_finished:
                raise FormatError("DATA after FIN")
            if self._inbox_size + self._consumed + len(frame.payload) > STREAM_WINDOW:
                raise FormatError("DATA beyond the credit")
            if self._sink is not None and not self._inbox and self._sink(frame.payload):
                self._consume(len(frame.payload))
                return
            self._inbox.append(frame.payload)
            self._inbox_size += len(frame.payload)
            self._readable.set()
        elif frame.type is FrameType.CREDIT:
            self._credit += parse_credit(frame.payload)
            if self._credit > _MAX_CREDIT_TOTAL:
                raise FormatError("credit beyond its limit")
            self._writable.set()
        elif frame.type is FrameType.FIN:
            self._peer_finished = True
            self._opened.set()
            self._readable.set()
            self._forget_if_over()
        elif frame.type is FrameType.OPENED:
            self._opened.set()
        elif frame.type is FrameType.RESET:
            self.fail(StreamReset(*parse_reason(frame.payload)))
            self._channel.forget(self)

    def _data_frames(self, data: bytes, start: int, end: int) -> list[Frame]:
        return [
            Frame(FrameType.DATA, self.number, data[at : min(at + MAX_DATA, end)])
            for at in range(start, end, MAX_DATA)
        ]

    def _consume(self, size: int) -> None:
        self._consumed += size
        if self._consumed >= STREAM_WINDOW // 2 and not self._peer_finished and not self._error:
            amount, self._consumed = self._consumed, 0
            self._channel.send_soon(Frame(FrameType.CREDIT, self.number, credit(amount)))

    def _forget_if_over(self) -> None:
        if self._finished and self._peer_finished:
            self._channel.forget(self)


class Channel:
    """A proven session that carries streams.

    Args:
        link: with every proof done.
        proofs: those proofs; the session is proven again before they are too old.
        handler: what to do with streams of the client; ``None`` makes this the client's end.
    """

    def __init__(
        self,
        link: Link,
        proofs: Proofs,
        *,
        handler: StreamHandler | None = None,
    ) -> None:
        self._link = link
        self._handler = handler
        self._streams: dict[int, Stream] = {}
        self._last_number = 0
        self._leaving = False
        self._error: CaiError | None = None
        self._handlers: set[asyncio.Task[None]] = set()
        self._renewal = Renewal(link, proofs, self.leave)
        self._idle_since = asyncio.get_running_loop().time()
        self._reader = asyncio.create_task(self._read())
        self._keeper = asyncio.create_task(self._keep())

    @property
    def usable(self) -> bool:
        """Whether a stream may be opened now."""
        return (
            self._error is None
            and not self._leaving
            and len(self._streams) < MAX_STREAMS
            and self._last_number < MAX_STREAM
            and asyncio.get_running_loop().time() < self._renewal.expires
        )

    @property
    def busy(self) -> bool:
        """Whether the only thing against a new stream is the number of open ones."""
        return self._error is None and not self._leaving and len(self._streams) >= MAX_STREAMS

    @property
    def streams(self) -> int:
        """Number of open streams."""
        return len(self._streams)

    async def open(self) -> Stream:
        """Open a stream (client).

        Raises:
            PeerUnreachable: the session is over, leaving, too old or full; nothing was sent.
        """
        if not self.usable:
            raise PeerUnreachable("the channel takes no new stream")
        self._last_number += 1
        stream = Stream(self, self._last_number)
        self._streams[stream.number] = stream
        try:
            await self.send(Frame(FrameType.OPEN, stream.number))
        except BaseException:
            # The frame may have left already: the server must not keep what nobody reads.
            stream.reset()
            raise
        return stream

    async def send(self, *frames: Frame) -> None:
        """Send frames of a stream.

        Raises:
            PeerError: the session has ended.
        """
        if self._error:
            raise self._error
        await self._link.send(*frames)

    def send_soon(self, *frames: Frame) -> None:
        """Send frames of a stream without waiting; a session that ended takes none."""
        if self._error is None:
            self._link.send_soon(*frames)

    @property
    def congested(self) -> bool:
        """Whether a sender should wait for the socket."""
        return self._link.congested

    def forget(self, stream: Stream) -> None:
        """Drop a stream that is over."""
        self._streams.pop(stream.number, None)
        if not self._streams:
            self._idle_since = asyncio.get_running_loop().time()

    def leave(self) -> None:
        """Take no new streams; running ones go on until the session ends."""
        if self._leaving or self._error:
            return
        self._leaving = True
        with contextlib.suppress(PeerError):
            self._link.send_soon(Frame(FrameType.GOAWAY))

    async def close(self) -> None:
        """End the session and every stream now."""
        self._end(PeerError("the channel was closed"))
        tasks = [self._reader, self._keeper, *self._handlers, *self._renewal.tasks]
        for task in tasks:
            if task is not asyncio.current_task():
                task.cancel()
        await asyncio.gather(
            *(task for task in tasks if task is not asyncio.current_task()),
            return_exceptions=True,
        )

    async def wait_closed(self) -> None:
        """Wait until the session has ended."""
        await asyncio.wait([self._reader])
        if self._handlers:
            await asyncio.wait(set(self._handlers))

    async def _read(self) -> None:
        self._link.hand_over(self._dispatch)
        try:
            while True:
                self._dispatch(await self._link.next_frame())
        except FormatError as error:
            await self._link.refuse(Code.PROTOCOL, error.message)
            self._end(error)
        except CaiError as error:
            self._end(error)
        finally:
            self._end(PeerError("the channel was closed"))
            self._keeper.cancel()
            for task in (*self._handlers, *self._renewal.tasks):
                task.cancel()

    async def _keep(self) -> None:
        """Has the session proven again in time; ends it when it is too old or idle."""
        loop = asyncio.get_running_loop()
        while True:
            now = loop.time()
            if now >= self._renewal.expires:
                self.leave()
            if not self._leaving:
                with contextlib.suppress(PeerError):
                    self._renewal.look(now)
            if self._leaving and not self._streams:
                break
            if now >= self._renewal.ends:
                break
            if not self._streams and now >= self._idle_since + IDLE_S:
                break
            await asyncio.sleep(LOOK_S)
        self._reader.cancel()

    def _dispatch(self, frame: Frame) -> None:
        if frame.type is FrameType.GOAWAY:
            self._leaving = True
        elif frame.type is FrameType.REFUSE:
            _code, text = parse_reason(frame.payload)
            raise PeerError(f"the peer ended the session: {text}")
        elif frame.type in (FrameType.PROVE, FrameType.ACK, FrameType.EVIDENCE):
            self._renewal.take(frame)
        elif frame.type is FrameType.OPEN:
            self._on_open(frame.stream)
        elif not frame.type.on_stream:
            raise FormatError(f"{frame.type.name} frame in a running session")
        elif stream := self._streams.get(frame.stream):
            if frame.type is FrameType.OPENED and self._handler is not None:
                raise FormatError("OPENED from a client")
            stream.take(frame)
        elif frame.stream > self._last_number:
            raise FormatError(f"{frame.type.name} frame on stream {frame.stream}, never opened")
        # Else the stream is over here, and the peer did not know yet.

    def _on_open(self, number: int) -> None:
        if self._handler is None or number <= self._last_number:
            raise FormatError(f"OPEN of stream {number}")
        self._last_number = number
        stream = Stream(self, number)
        too_old = asyncio.get_running_loop().time() >= self._renewal.expires
        if self._leaving or too_old or len(self._streams) >= MAX_STREAMS:
            stream.reset(
                Code.SHUTTING_DOWN if self._leaving or too_old else Code.BUSY, "no new streams"
            )
            return
        self._streams[number] = stream
        task = asyncio.create_task(self._handle(self._handler, stream))
        self._handlers.add(task)
        task.add_done_callback(self._handlers.discard)

    async def _handle(self, handler: StreamHandler, stream: Stream) -> None:
        try:
            await handler(stream)
        except CaiError:
            stream.reset(Code.INTERNAL)
        finally:
            stream.reset()

    def _end(self, error: CaiError) -> None:
        if self._error is not None:
            return
        self._error = error
        self._link.close()
        for stream in list(self._streams.values()):
            stream.fail(PeerError(f"the channel ended: {error.message}"))
        self._streams.clear()
