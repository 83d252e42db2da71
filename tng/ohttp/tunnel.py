"""How a request and its response travel at an egress: encapsulated, or in clear where it is let."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence

import h11

from cai.errors import FormatError
from tng.ingress.http1 import ClientConnection
from tng.ohttp import fields
from tng.ohttp.bhttp import (
    Content,
    End,
    Event,
    MessageReader,
    RequestHead,
    encode_content,
    encode_end,
    encode_response,
)
from tng.ohttp.chunked import RequestReceiver, Sealer
from tng.ohttp.messages import RESPONSE_TYPE
from tng.ohttp.request import OuterBody, RequestStream


class TunnelStream(RequestStream):
    """An encapsulated request.

    Args:
        client: the outer connection.
        body: what follows the encapsulated key.
        receiver: opens it.
        address: of the client, for the backend; empty tells it nothing.
        outer: header fields of the outer request.
        headers: of the outer response.
        passed: inner response fields that are copied outside; ``None`` means all that may be.
    """

    def __init__(
        self,
        client: ClientConnection,
        body: OuterBody,
        receiver: RequestReceiver,
        *,
        address: str,
        outer: Iterable[fields.Field],
        headers: Sequence[fields.Field],
        passed: Sequence[str] | None,
    ) -> None:
        super().__init__(client, address=address, outer=outer)
        self._body = body
        self._receiver = receiver
        self._headers = headers
        self._passed = passed
        self._sealer: Sealer | None = None
        self._lead = b""
        self._pending = bytearray()

    async def events(self) -> AsyncIterator[Event]:
        """What is inside; the end only once the last chunk has proven that nothing is missing."""
        reader, opener = MessageReader(request=True), self._receiver.opener
        while data := await self._body.some():
            for plain in opener.feed(data):
                for event in reader.feed(plain):
                    if not isinstance(event, End):
                        yield event
        for event in reader.feed(opener.finish()):
            if not isinstance(event, End):
                yield event
        if not reader.done:
            raise FormatError("binary HTTP: the message is cut off")
        yield End()

    async def begin(self, status: int, listed: Sequence[fields.Field]) -> None:
        """Send the head of the response on, sealed."""
        nonce, sealer = self._receiver.response()
        headers = [
            (b"content-type", RESPONSE_TYPE),
            (b"cache-control", b"no-store"),
            # nginx would collect the response otherwise.
            (b"x-accel-buffering", b"no"),
            *self._headers,
            *fields.outside(listed, self._passed),
        ]
        self._sealer = sealer
        self._lead = nonce
        self._pending += encode_response(status, listed)
        await self._client.send(h11.Response(status_code=200, headers=headers, reason=b"OK"))

    async def content(self, data: bytes) -> None:
        """Keep some of its body until all that came with it is known."""
        self._pending += encode_content(data)

    async def flush(self) -> None:
        """Send what is kept, sealed."""
        if self._sealer is not None and self._pending:
            await self._send(self._sealer.chunk(self._taken()))

    async def end(self) -> None:
        """Send the last chunk, without which nobody takes it for whole."""
        assert self._sealer is not None  # noqa: S101 - h11 gives the head first
        last = self._sealer.chunk(self._taken() + encode_end()) + self._sealer.final()
        await self._send(last)
        await self._client.send(h11.EndOfMessage())

    def _taken(self) -> bytes:
        data = bytes(self._pending)
        self._pending.clear()
        return data

    async def _send(self, data: bytes) -> None:
        # The response's nonce stands before its first chunk.
        lead, self._lead = self._lead, b""
        await self._client.send(h11.Data(data=lead + data))


class ClearStream(RequestStream):
    """A plain request whose path is let through (``direct_forward``).

    Args:
        client: the connection.
        request: its head.
        body: what follows.
        address: of the client, for the backend; empty tells it nothing.
    """

    def __init__(
        self, client: ClientConnection, request: h11.Request, body: OuterBody, *, address: str
    ) -> None:
        super().__init__(client, address=address, outer=())
        self._request_head = request
        self._body = body

    async def events(self) -> AsyncIterator[Event]:
        """The request as it came."""
        request = self._request_head
        yield RequestHead(request.method, request.target, tuple(request.headers))
        while data := await self._body.some():
            yield Content(data)
        yield End()

    async def begin(self, status: int, listed: Sequence[fields.Field]) -> None:
        """Send the head of the response on."""
        await self._client.send(h11.Response(status_code=status, headers=list(listed)))

    async def content(self, data: bytes) -> None:
        """Send some of its body on."""
        await self._client.send(h11.Data(data=data))

    async def flush(self) -> None:
        """Nothing is kept."""

    async def end(self) -> None:
        """End it."""
        await self._client.send(h11.EndOfMessage())
