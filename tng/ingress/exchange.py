"""One plain request over one stream, and its response as it comes.

Responses are passed on event by event, so that streamed tokens are not held back; the end of either
side is the end of both.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus

import h11

from cai.errors import PeerError
from tng.ingress.http1 import MAX_HEAD, ClientConnection, end_to_end, told
from tng.peers.destination import BadRequest
from tng.streams import ByteStream, StreamReset

RESPONSE_TIMEOUT_S = 3600.0
"""Longest pause before and inside a response, seconds; a model may think for long, and a stream
may be idle for half an hour and more."""


class Exchange:
    """One request and its response over a stream.

    Args:
        client: who asks.
        stream: to the upstream; the exchange takes all of it.
        host: value of ``Host`` for the upstream.
        mark: a response header that only this gateway may set, or ``None``.
    """

    def __init__(
        self,
        client: ClientConnection,
        stream: ByteStream,
        *,
        host: bytes,
        mark: tuple[bytes, bytes] | None = None,
    ) -> None:
        self._client = client
        self._stream = stream
        self._host = host
        self._mark = mark
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD)

    async def run(self, request: h11.Request, path: bytes) -> int:
        """Send the request, pass the response on; its status.

        Raises:
            PeerError: the peer gives no whole response.
            ClientGone: the client left.
            BadRequest, SlowRequest: the client's body is malformed or stalls.
        """
        upload = asyncio.create_task(self._upload(request, path))
        download = asyncio.create_task(self._download())
        try:
            await asyncio.wait({upload, download}, return_when=asyncio.FIRST_COMPLETED)
            if upload.done() and not download.done() and (error := upload.exception()):
                # A peer may answer early and stop reading; then its answer counts.
                if not isinstance(error, StreamReset):
                    raise error
                await asyncio.wait({download})
            return await download
        finally:
            for task in (upload, download):
                task.cancel()
            await asyncio.gather(upload, download, return_exceptions=True)

    async def _upload(self, request: h11.Request, path: bytes) -> None:
        headers = [
            (b"host", self._host),
            *((name, value) for name, value in end_to_end(request.headers) if name != b"host"),
            # One stream is one upstream connection; the end of either is the end of both.
            (b"connection", b"close"),
        ]
        await self._send(h11.Request(method=request.method, target=path, headers=headers))
        async for event in self._client.body():
            await self._send(event)
        await self._client.until_gone()

    async def _send(self, event: h11.Event) -> None:
        try:
            data = self._http.send(event)
        except h11.LocalProtocolError as error:
            raise BadRequest(f"the request cannot be sent on: {told(error)}") from error
        if data:
            await self._stream.write(data)

    async def _download(self) -> int:
        status = 0
        while True:
            event = await self._event()
            if isinstance(event, h11.InformationalResponse):
                if event.status_code == HTTPStatus.SWITCHING_PROTOCOLS:
                    raise PeerError("the upstream switched protocols without being asked")
                await self._client.send(event)
            elif isinstance(event, h11.Response):
                status = event.status_code
                await self._client.send(self._marked(event))
            elif isinstance(event, (h11.Data, h11.EndOfMessage)):
                await self._client.send(event)
                if isinstance(event, h11.EndOfMessage):
                    return status
            else:
                raise PeerError("the upstream closed without a response")

    async def _event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        try:
            while (event := self._http.next_event()) is h11.NEED_DATA:
                async with asyncio.timeout(RESPONSE_TIMEOUT_S):
                    self._http.receive_data(await self._stream.read())
        except h11.RemoteProtocolError as error:
            raise PeerError(f"the upstream's answer is no HTTP response: {told(error)}") from error
        except TimeoutError as error:
            raise PeerError(
                f"the upstream was silent for {RESPONSE_TIMEOUT_S:g} s"
            ) from error
        return event

    def _marked(self, response: h11.Response) -> h11.Response:
        try:
            kept = end_to_end(response.headers)
        except BadRequest as error:
            raise PeerError(f"the upstream's response: {error.message}") from error
        headers = kept
        if self._mark is not None:
            headers = [(name, value) for name, value in kept if name != self._mark[0]]
            headers.append(self._mark)
        return h11.Response(
            status_code=response.status_code, headers=headers, reason=response.reason
        )
