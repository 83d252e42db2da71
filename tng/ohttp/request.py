"""One request at an egress, as the byte stream that a backend serves.

The backend reads HTTP/1.1 that was written anew here, and writes HTTP/1.1 that is read here: the
framing of neither end reaches the other (request smuggling). Each part of a response is sent on as
it comes, so that streamed tokens are not held back.
"""

from __future__ import annotations

import asyncio
import json
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterable, Sequence

import h11

from cai.errors import CaiError, FormatError, PeerError
from tng.ingress.http1 import MAX_HEAD, ClientConnection, ClientGone, told
from tng.ohttp import fields
from tng.ohttp.bhttp import Content, End, Event, RequestHead
from tng.streams import Code, StreamReset

_WITH_BODY = frozenset({b"POST", b"PUT", b"PATCH"})


class OuterBody:
    """The body of an outer request, read in pieces of any size.

    Args:
        client: whose request it is.
    """

    def __init__(self, client: ClientConnection) -> None:
        self._events = client.body()
        self._buffer = bytearray()
        self.ended = False

    async def exactly(self, size: int) -> bytes:
        """So many bytes.

        Raises:
            FormatError: the body is shorter.
            CaiError: the client stalls, leaves or breaks HTTP.
        """
        while len(self._buffer) < size:
            data = await self._more()
            if not data and self.ended:
                raise FormatError("the encapsulated request is cut off")
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data

    async def some(self) -> bytes:
        """What is there next; empty at the end.

        Raises:
            CaiError: the client stalls, leaves or breaks HTTP.
        """
        while not self._buffer and not self.ended:
            await self._more()
        data = bytes(self._buffer)
        self._buffer.clear()
        return data

    async def _more(self) -> bytes:
        async for event in self._events:
            if isinstance(event, h11.EndOfMessage):
                break
            self._buffer += event.data
            return bytes(event.data)
        self.ended = True
        return b""


class RequestStream(ABC):
    """One request and its response; subclasses say how both travel.

    Args:
        client: the outer connection.
        address: of the client, for the backend; empty tells it nothing.
        outer: header fields of the outer request, to which a load balancer adds.
    """

    def __init__(
        self, client: ClientConnection, *, address: str, outer: Iterable[fields.Field]
    ) -> None:
        self._client = client
        self._address = address
        self._outer = tuple(outer)
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD)
        self._events = self.events()
        self._asked = False
        self._finished = asyncio.Event()
        self.started = False
        self.fault: CaiError | None = None

    @abstractmethod
    def events(self) -> AsyncIterator[Event]:
        """The request; its end only once it is known to be whole.

        Raises:
            CaiError: it is malformed, tampered with, or its client left.
        """

    @abstractmethod
    async def begin(self, status: int, listed: Sequence[fields.Field]) -> None:
        """Send the head of the response on; raises ClientGone."""

    @abstractmethod
    async def content(self, data: bytes) -> None:
        """Send some of its body on; raises ClientGone."""

    @abstractmethod
    async def flush(self) -> None:
        """Send on what was kept to travel together; raises ClientGone."""

    @abstractmethod
    async def end(self) -> None:
        """Say that it is whole; raises ClientGone."""

    @property
    def finished(self) -> bool:
        """Whether the whole response is out."""
        return self._finished.is_set()

    async def wait_finished(self) -> None:
        """Wait until the whole response is out."""
        await self._finished.wait()

    async def opened(self) -> None:
        """Nothing to wait for: this end is the far one."""
        return

    async def accept(self) -> None:
        """Nothing to tell: the response will."""
        return

    async def read(self) -> bytes:
        """The request as HTTP/1.1; once it is whole, waits for the response's end.

        Raises:
            StreamReset: it is malformed, tampered with, or its client left; ``fault`` says what.
        """
        try:
            while not self._asked:
                data = await self._request()
                if data:
                    return data
            await self._until_over()
        except CaiError as error:
            self.fault = self.fault or error
            gone = isinstance(error, ClientGone)
            raise StreamReset(
                Code.CANCELLED if gone else Code.PROTOCOL, error.message
            ) from error
        return b""

    async def write(self, data: bytes) -> None:
        """The backend's response.

        Raises:
            PeerError: it is no HTTP response, or the client left.
        """
        if not self.finished:
            await self._response(data)

    async def finish(self) -> None:
        """The backend has no more."""
        if not self.finished and self._asked_anything:
            await self._response(b"")

    def reset(self, code: Code = Code.CANCELLED, text: str = "") -> None:
        """The backend gives up."""
        if not self.finished:
            self.fault = self.fault or StreamReset(code, text)

    async def refuse(self, status: int, error: CaiError) -> None:
        """Answer inside, where nobody between can change it.

        Raises:
            ClientGone: the client takes nothing any more.
        """
        body = json.dumps({"error": error.to_json()}, ensure_ascii=False).encode() + b"\n"
        length = str(len(body)).encode("ascii")
        told_fields = [(b"content-type", b"application/json"), (b"content-length", length)]
        await self._begin(status, told_fields)
        await self.content(body)
        await self._end()

    @property
    def _asked_anything(self) -> bool:
        return self._http.our_state is not h11.IDLE

    async def _request(self) -> bytes:
        event = await anext(self._events)
        if isinstance(event, RequestHead):
            # What follows says how the body is framed; a request without one is sent when it is
            # known to be whole.
            following = await anext(self._events)
            return self._head(event, following) + self._content(following)
        return self._content(event)

    def _head(self, head: RequestHead, following: Event) -> bytes:
        listed = fields.inner(head.fields)
        names = {name for name, _value in listed}
        if b"host" not in names:
            raise FormatError("the request names no host")
        listed = fields.forwarded(listed, self._outer, self._address)
        if b"content-length" not in names:
            if isinstance(following, Content):
                listed.append((b"transfer-encoding", b"chunked"))
            elif head.method in _WITH_BODY:
                listed.append((b"content-length", b"0"))
        listed.append((b"connection", b"close"))
        return self._written(
            lambda: h11.Request(method=head.method, target=head.path, headers=listed)
        )

    def _content(self, event: Event) -> bytes:
        if isinstance(event, Content):
            return self._written(lambda: h11.Data(data=event.data))
        if isinstance(event, End):
            self._asked = True
            return self._written(h11.EndOfMessage)
        raise FormatError("binary HTTP: a second head")

    def _written(self, make: Callable[[], h11.Event]) -> bytes:
        try:
            return self._http.send(make()) or b""
        except h11.LocalProtocolError as error:
            raise FormatError(f"the request cannot be sent on: {told(error)}") from error

    async def _until_over(self) -> None:
        gone = asyncio.ensure_future(self._client.until_gone())
        over = asyncio.ensure_future(self._finished.wait())
        try:
            await asyncio.wait({gone, over}, return_when=asyncio.FIRST_COMPLETED)
            if gone.done() and not over.done():
                gone.result()
        finally:
            gone.cancel()
            over.cancel()
            await asyncio.gather(gone, over, return_exceptions=True)

    async def _response(self, data: bytes) -> None:
        try:
            self._http.receive_data(data)
            while True:
                event = self._http.next_event()
                if event is h11.NEED_DATA or event is h11.PAUSED:
                    await self.flush()
                    return
                if await self._pass_on(event):
                    return
        except h11.RemoteProtocolError as error:
            failed = PeerError(f"the backend's answer is no HTTP response: {told(error)}")
            self.fault = self.fault or failed
            raise failed from error

    async def _pass_on(self, event: object) -> bool:
        """Send one event on; whether it was the last."""
        if isinstance(event, h11.InformationalResponse):
            if event.status_code == 101:
                raise self._failed("the backend switched protocols without being asked")
        elif isinstance(event, h11.Response):
            try:
                kept = fields.inner(event.headers)
            except FormatError as error:
                raise self._failed(f"the backend's response: {error.message}") from error
            await self._begin(event.status_code, kept)
        elif isinstance(event, h11.Data):
            await self.content(bytes(event.data))
        elif isinstance(event, h11.EndOfMessage):
            await self._end()
            return True
        else:
            raise self._failed("the backend closed without a response")
        return False

    def _failed(self, text: str) -> PeerError:
        error = PeerError(text)
        self.fault = self.fault or error
        return error

    async def _begin(self, status: int, listed: Sequence[fields.Field]) -> None:
        self.started = True
        await self.begin(status, listed)

    async def _end(self) -> None:
        await self.end()
        self._finished.set()
