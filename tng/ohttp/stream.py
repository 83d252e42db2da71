"""An ingress's stream over OHTTP: HTTP/1.1 from a client in, one encapsulated exchange per request.

The client's bytes are parsed as strictly as at the proxy, and its response is written anew. What
fails before a response has begun is answered in HTTP; after that the stream breaks, because a cut
response may not look whole.
"""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from typing import cast

from cai.errors import CaiError, PeerError
from tng.config.transport import OhttpClient
from tng.ingress.http1 import ClientConnection, ClientGone, HeadTooLarge, SlowRequest
from tng.ohttp.exchange import Exchange, Keys
from tng.ohttp.outer import OuterRefusal
from tng.ohttp.pipe import Pipe
from tng.peers.destination import BadRequest
from tng.streams import Code, StreamReset


class OhttpStream:
    """The stream that a mode relays.

    Args:
        keys: of the origin.
        settings: what is rewritten and copied outside.
    """

    def __init__(self, keys: Keys, settings: OhttpClient) -> None:
        self._keys = keys
        self._settings = settings
        self._in = Pipe()
        self._out = Pipe()
        self._error: CaiError | None = None
        self._idle = True
        self._leaving = False
        self._running = asyncio.create_task(self._run())
        self._running.add_done_callback(self._over)

    async def opened(self) -> None:
        """The key is proven; each request opens its own upstream."""

    async def read(self) -> bytes:
        """The next bytes of responses.

        Raises:
            PeerError: the exchange broke.
        """
        try:
            return await self._out.read()
        except OSError as error:
            raise self._broken() from error

    async def write(self, data: bytes) -> None:
        """Bytes of requests.

        Raises:
            PeerError: no more are taken.
        """
        try:
            self._in.write(data)
            await self._in.drain()
        except OSError as error:
            raise self._broken() from error

    async def accept(self) -> None:
        """Nothing to tell."""

    async def finish(self) -> None:
        """The client sends no further request; running ones go on."""
        self._in.end()

    def reset(self, code: Code = Code.CANCELLED, text: str = "") -> None:
        """Give up; a running exchange is broken off, so that the engine stops."""
        if not self._running.done() and not self._running.cancelling():
            self._error = self._error or StreamReset(code, text)
            self._running.cancel()

    def leave(self) -> None:
        """Take no further request: between two of them it ends now, else after the running one."""
        self._leaving = True
        if self._idle:
            self._in.end()

    async def closed(self) -> None:
        """Wait until nothing runs any more."""
        await asyncio.gather(self._running, return_exceptions=True)

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self._running.done()

    def _broken(self) -> PeerError:
        if isinstance(self._error, PeerError):
            return self._error
        text = self._error.message if self._error else "the exchange ended"
        return StreamReset(Code.PROTOCOL, text)

    def _over(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or task.exception() is not None:
            self._in.abort()
            self._out.abort()
        else:
            # A client may still be sending what nobody waits for; its answer is on the way.
            self._in.sink()
            self._out.end()

    async def _run(self) -> None:
        # The parser needs of a socket only what a pipe has.
        client = ClientConnection(
            cast("asyncio.StreamReader", self._in), cast("asyncio.StreamWriter", self._out)
        )
        try:
            while (request := await client.next_request()) is not None:
                self._idle = False
                await Exchange(client, request, self._keys, self._settings).run()
                if self._leaving or not client.reusable:
                    return
                self._idle = True
        except CaiError as error:
            self._error = error
            if client.response_started or isinstance(error, ClientGone):
                self._out.abort()
                return
            await client.send_raw(_told(error))


def _told(error: CaiError) -> bytes:
    own = isinstance(error, (BadRequest, HeadTooLarge, SlowRequest))
    status = error.http_status if own else HTTPStatus.BAD_GATEWAY
    if isinstance(error, OuterRefusal) and error.status in (429, 503, 504):
        status = error.status
    body = json.dumps({"error": error.to_json()}, ensure_ascii=False).encode() + b"\n"
    head = (
        f"HTTP/1.1 {int(status)} {HTTPStatus(status).phrase}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
        "connection: close\r\n\r\n"
    )
    return head.encode("ascii") + body
