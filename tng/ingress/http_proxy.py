"""Ingress `http_proxy`: plain HTTP from clients of this machine, attested channels to peers.

CONNECT is answered 200 only when the channel stands and the peer's upstream is connected; until
then, and for plain requests, the client gets a status and a reason. Responses are passed on as they
come, so that streamed tokens are not held back.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from dataclasses import replace
from http import HTTPStatus

import h11

from cai.errors import CaiError, PeerError
from tng.config.modes import HttpProxy as HttpProxySettings
from tng.ingress.http1 import (
    MAX_HEAD,
    ClientConnection,
    ClientGone,
    HeadTooLarge,
    SlowRequest,
    end_to_end,
    parse_target,
    told,
)
from tng.operation.accesslog import Access
from tng.operation.journal import Journal, endpoint_text
from tng.peers.destination import (
    BadRequest,
    Destination,
    DestinationRefused,
    demand_allowed,
    matches,
)
from tng.relay import relay
from tng.streams import ByteStream, Code, Peers, Proven, StreamReset

MAX_CLIENTS = 1024
"""Most client connections of one proxy at once."""

RESPONSE_TIMEOUT_S = 3600.0
"""Longest pause before and inside a response, seconds; a model may think for long, and a stream
may be idle for half an hour and more."""

ATTESTED_HEADER = b"cai-attested"
"""Response header that says how the peer was proven; never taken from the peer."""


class HttpProxy:
    """One `http_proxy` entry.

    Args:
        name: of the entry.
        settings: its mode.
        peers: its attested peers.
        direct: where what no filter matches goes; ``None`` refuses it.
        journal: where its lines go.
    """

    def __init__(
        self,
        name: str,
        settings: HttpProxySettings,
        peers: Peers,
        direct: Peers | None,
        journal: Journal,
    ) -> None:
        self._name = name
        self._settings = settings
        self._peers = peers
        self._direct = direct
        self._journal = journal
        self._clients = 0
        self._idle: set[ClientConnection] = set()
        self._leaving = False

    def leave(self) -> None:
        """Take no further requests: connections between two requests are closed now."""
        self._leaving = True
        for client in list(self._idle):
            client.abort()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one client connection to its end."""
        client = ClientConnection(reader, writer)
        if self._clients >= MAX_CLIENTS:
            writer.close()
            return
        self._clients += 1
        try:
            while not self._leaving and await self._next(client, reader, writer):
                pass
        except ClientGone:
            client.abort()
        finally:
            self._clients -= 1
            writer.close()

    async def _next(
        self,
        client: ClientConnection,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> bool:
        """One request; whether another may follow."""
        access = Access(self._name, "request", endpoint_text(writer.get_extra_info("peername")))
        started = time.monotonic()
        try:
            request = await self._request(client)
            if request is None:
                return False
            # A client that keeps its connection may have waited long before it asked.
            started = time.monotonic()
            access = replace(access, what=_text(request.method))
            destination, path = parse_target(request)
            access = replace(access, peer=str(destination))
            stream, proven = await self._peers_for(destination).open(destination)
        except ClientGone:
            raise
        except CaiError as error:
            await self._refuse(client, error, access, started)
            return False
        access = replace(access, attested=_text(_attested(proven)))
        try:
            if request.method == b"CONNECT":
                received, sent = await self._tunnel(client, stream, proven, reader, writer)
                access = replace(access, status="tunnel done", sent=sent, received=received)
            else:
                exchange = _Exchange(client, stream, proven, destination)
                access = replace(access, status=await exchange.run(request, path))
        except ClientGone:
            self._log(replace(access, status="client left"), started)
            raise
        except CaiError as error:
            await self._refuse(client, _at_peer(error, destination), access, started)
            return False
        finally:
            stream.reset(Code.CANCELLED)
        self._log(access, started)
        return request.method != b"CONNECT" and client.reusable

    def _peers_for(self, destination: Destination) -> Peers:
        if self._direct is not None and not matches(destination, self._settings.filters):
            return self._direct
        demand_allowed(destination, self._settings.filters)
        return self._peers

    async def _request(self, client: ClientConnection) -> h11.Request | None:
        self._idle.add(client)
        try:
            return await client.next_request()
        finally:
            self._idle.discard(client)

    async def _tunnel(
        self,
        client: ClientConnection,
        stream: ByteStream,
        proven: Proven,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> tuple[int, int]:
        await stream.opened()
        await client.send_raw(
            b"HTTP/1.1 200 Connection established\r\n"
            + ATTESTED_HEADER + b": " + _attested(proven) + b"\r\n\r\n"
        )  # fmt: skip
        return await relay(stream, reader, writer, client.tunnel())

    async def _refuse(
        self, client: ClientConnection, error: CaiError, access: Access, started: float
    ) -> None:
        status = _status(error)
        told = replace(
            access, status=status, error=error.machine_code, message=error.message, attested=""
        )
        self._log(told, started)
        if client.response_started:
            # Part of a response is out: only a broken connection says that it is not whole.
            client.abort()
            return
        body = json.dumps({"error": error.to_json()}, ensure_ascii=False).encode() + b"\n"
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
            "content-type: application/json\r\n"
            f"content-length: {len(body)}\r\n"
            "connection: close\r\n\r\n"
        )
        with contextlib.suppress(ClientGone):
            await client.send_raw(head.encode("ascii") + body)

    def _log(self, access: Access, started: float) -> None:
        elapsed = int(1000 * (time.monotonic() - started))
        self._journal.access(replace(access, elapsed_ms=elapsed))


class _Exchange:
    """One plain request and its response over a stream."""

    def __init__(
        self, client: ClientConnection, stream: ByteStream, proven: Proven, destination: Destination
    ) -> None:
        self._client = client
        self._stream = stream
        self._proven = proven
        self._destination = destination
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
            (b"host", str(self._destination).encode("ascii")),
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
        headers = [(name, value) for name, value in kept if name != ATTESTED_HEADER]
        headers.append((ATTESTED_HEADER, _attested(self._proven)))
        return h11.Response(
            status_code=response.status_code, headers=headers, reason=response.reason
        )


def _attested(proven: Proven) -> bytes:
    mark = "; SIMULATED" if proven.verdict.simulated else ""
    return f"{proven.verdict.binding.value}{mark}".encode("ascii")


def _status(error: CaiError) -> int:
    if isinstance(error, (BadRequest, DestinationRefused, HeadTooLarge, SlowRequest)):
        return error.http_status
    # Everything else is the peer's side as the client sees it, refused evidence included.
    return HTTPStatus.BAD_GATEWAY


def _at_peer(error: CaiError, destination: Destination) -> CaiError:
    if isinstance(error, StreamReset):
        return PeerError(
            f"peer {destination}: {error.message}", code=f"peer-{error.reset_code.name.lower()}"
        )
    return error


def _text(data: bytes) -> str:
    return data.decode("ascii", "replace")
