"""One exchange of an ingress: a request is encapsulated as it comes, and its response opened so.

A key that the server serves no more is replaced and the request sent again, once, so that rotating
keys fails no request.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from http import HTTPStatus
from typing import Protocol, TypeVar

import h11

from cai.errors import FormatError, LimitExceeded, PeerError, PeerUnreachable, Tampered
from tng.config.transport import OhttpClient
from tng.ingress.http1 import ClientConnection
from tng.ohttp import fields
from tng.ohttp.bhttp import (
    Content,
    End,
    MessageReader,
    ResponseHead,
    encode_content,
    encode_end,
    encode_request,
)
from tng.ohttp.chunked import Opener, RequestSender
from tng.ohttp.messages import API_TUNNEL, REQUEST_TYPE, RESPONSE_TYPE
from tng.ohttp.outer import OuterClient, OuterConnection, OuterRefusal, Stale, refusal
from tng.ohttp.rewriting import outer_path
from tng.peers.destination import BadRequest

MAX_REPLAY = 16 * 1024 * 1024
"""Most of a request that is kept for a second try under a fresh key, bytes."""

SILENCE_S = 3600.0
"""Longest pause before and inside a response, seconds; a model may think for long."""

UNKNOWN_KEY = HTTPStatus.UNPROCESSABLE_ENTITY
"""How a server says that it does not serve the key, or no more."""

EARLY_S = 1.0
"""How soon a connection must break for a refused key to be the likely reason, seconds."""

IDEMPOTENT = frozenset({b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE"})
"""Methods of requests that may be sent again when a kept connection breaks (RFC 9110 §9.2.2)."""

_Given = TypeVar("_Given")


class Sending(Protocol):
    """A proven key, with what a request under it begins with."""

    @property
    def public(self) -> bytes:
        """The key."""

    def sender(self) -> tuple[RequestSender, bytes]:
        """A new encapsulation, and the metadata that stands before it."""


class Keys(Protocol):
    """The proven keys of one origin."""

    @property
    def client(self) -> OuterClient:
        """Connections to it."""

    async def current(self) -> Sending:
        """The key to use; raises CaiError when there is no proven one."""

    async def replaced(self, old: Sending, path: str) -> Sending:
        """A fresh one, after the origin did not know the old one."""


class Exchange:
    """One request of a client.

    Args:
        client: whose it is.
        request: its head.
        keys: of the origin.
        settings: what is rewritten and copied outside.
    """

    def __init__(
        self, client: ClientConnection, request: h11.Request, keys: Keys, settings: OhttpClient
    ) -> None:
        self._client = client
        self._request = request
        self._keys = keys
        self._settings = settings
        self._events = _Replayable(client)
        self._begun = False

    async def run(self) -> None:
        """Send the request, pass the response on.

        Raises:
            BadRequest, SlowRequest: the client's request cannot be carried, or stalls.
            ClientGone: the client left.
            CaiError: there is no proven key.
            PeerError: the peer gives no whole response.
        """
        request = self._request
        if request.method == b"CONNECT":
            raise BadRequest(
                "OHTTP carries single requests, no tunnels",
                hint="send plain http:// requests, or use the default transport",
            )
        if not request.target.startswith(b"/"):
            raise BadRequest("the request target is no path")
        if any(name == b"upgrade" and b"websocket" in value for name, value in request.headers):
            raise BadRequest("OHTTP carries no WebSocket", hint="use the default transport")
        try:
            listed = fields.inner(request.headers)
        except FormatError as error:
            raise BadRequest(error.message) from error
        path = outer_path(self._settings, request.target)
        key = await self._keys.current()
        if any(name == b"expect" for name, _value in request.headers):
            await self._client.send(h11.InformationalResponse(status_code=100, headers=[]))
        started = asyncio.get_running_loop().time()
        try:
            await self._attempt(key, listed, path, fresh=False)
        except PeerUnreachable as error:
            if isinstance(error, Stale) and request.method in IDEMPOTENT:
                await self._attempt(key, listed, path, fresh=True)
                return
            early = asyncio.get_running_loop().time() - started < EARLY_S
            if self._begun or not early or not self._events.complete:
                raise
            # A server that refuses a key and closes before it has read the whole request takes its
            # own answer away (TCP reset). Another key there says that this is what happened.
            fresh = await self._keys.replaced(key, path)
            if fresh.public == key.public:
                raise
            await self._attempt(fresh, listed, path, fresh=True)
        except OuterRefusal as error:
            if error.status != UNKNOWN_KEY or not self._events.complete:
                raise
            fresh = await self._keys.replaced(key, path)
            await self._attempt(fresh, listed, path, fresh=False)

    async def _attempt(
        self, key: Sending, listed: list[fields.Field], path: str, *, fresh: bool
    ) -> None:
        connection = await self._keys.client.acquire(fresh=fresh)
        sender, metadata = key.sender()
        upload = asyncio.create_task(
            self._upload(connection, sender, metadata + sender.head, listed, path)
        )
        download = asyncio.create_task(self._download(connection, sender))
        try:
            await asyncio.wait({upload, download}, return_when=asyncio.FIRST_COMPLETED)
            if upload.done() and not download.done() and (error := upload.exception()):
                # A peer may answer early and stop reading; then its answer counts.
                if not isinstance(error, PeerError):
                    raise error
                await asyncio.wait({download})
            await download
        finally:
            for task in (upload, download):
                task.cancel()
            # First, and without waiting: it is what stops the engine.
            self._keys.client.release(connection)
            await asyncio.gather(upload, download, return_exceptions=True)

    async def _upload(
        self,
        connection: OuterConnection,
        sender: RequestSender,
        begin: bytes,
        listed: list[fields.Field],
        path: str,
    ) -> None:
        request = self._request
        copied = fields.outside(listed, self._settings.passthrough.request)
        outer = self._keys.client.head(
            "POST", path, API_TUNNEL,
            (b"content-type", REQUEST_TYPE), (b"transfer-encoding", b"chunked"), *copied,
        )  # fmt: skip
        head = encode_request(request.method, request.target, listed)
        await connection.send(outer, h11.Data(data=begin + sender.sealer.chunk(head)))
        async for data in self._events.all():
            await connection.send(h11.Data(data=sender.sealer.chunk(encode_content(data))))
        last = sender.sealer.chunk(encode_end()) + sender.sealer.final()
        await connection.send(h11.Data(data=last), h11.EndOfMessage())

    async def _download(self, connection: OuterConnection, sender: RequestSender) -> None:
        response = await _within(connection.response())
        self._begun = True
        if response.status_code != HTTPStatus.OK:
            raise await refusal(connection, response)
        kind = next((value for name, value in response.headers if name == b"content-type"), b"")
        if kind.partition(b";")[0].strip() != RESPONSE_TYPE:
            raise PeerError("the peer's answer is no encapsulated response")
        reader = MessageReader(request=False)
        try:
            opener, data = await self._opener(connection, sender)
            while data or (data := await _within(connection.data())):
                for plain in opener.feed(data):
                    await self._pass_on(reader, plain)
                data = b""
            await self._pass_on(reader, opener.finish())
        except (FormatError, LimitExceeded, Tampered) as error:
            raise PeerError(f"the peer's response: {error.message}", code="tampered") from error
        if not reader.done:
            raise PeerError("the peer's response was cut off")
        await self._client.send(h11.EndOfMessage())

    @staticmethod
    async def _opener(
        connection: OuterConnection, sender: RequestSender
    ) -> tuple[Opener, bytes]:
        begin = bytearray()
        while len(begin) < sender.nonce_size:
            data = await _within(connection.data())
            if not data:
                raise Tampered("the encapsulated message was cut off")
            begin += data
        size = sender.nonce_size
        return sender.response(bytes(begin[:size])), bytes(begin[size:])

    async def _pass_on(self, reader: MessageReader, plain: bytes) -> None:
        for event in reader.feed(plain):
            if isinstance(event, ResponseHead):
                headers = fields.inner(event.fields)
                await self._client.send(
                    h11.Response(
                        status_code=event.status, headers=headers, reason=_phrase(event.status)
                    )
                )
            elif isinstance(event, Content):
                await self._client.send(h11.Data(data=event.data))
            elif not isinstance(event, End):
                raise FormatError("binary HTTP: a request where a response was expected")


class _Replayable:
    """A request's body, kept as long as it is small enough to be sent again."""

    def __init__(self, client: ClientConnection) -> None:
        self._client = client
        self._kept: list[bytes] = []
        self._size = 0
        self._ended = False
        self.complete = True

    async def all(self) -> AsyncIterator[bytes]:
        """The body from its beginning.

        Raises:
            CaiError: the client's body is malformed, stalls or stops.
        """
        for data in list(self._kept):
            yield data
        if self._ended:
            return
        async for event in self._client.body():
            if isinstance(event, h11.EndOfMessage):
                self._ended = True
                return
            data = bytes(event.data)
            self._keep(data)
            yield data

    def _keep(self, data: bytes) -> None:
        self._size += len(data)
        if self._size > MAX_REPLAY:
            self._kept.clear()
            self.complete = False
        elif self.complete:
            self._kept.append(data)


async def _within(coming: Awaitable[_Given]) -> _Given:
    try:
        async with asyncio.timeout(SILENCE_S):
            return await coming
    except TimeoutError as error:
        raise PeerError(f"the peer was silent for {SILENCE_S:g} s") from error


def _phrase(status: int) -> bytes:
    try:
        return HTTPStatus(status).phrase.encode("ascii")
    except ValueError:
        return b""
