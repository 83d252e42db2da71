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
from tng.ingress.exchange import Exchange
from tng.ingress.http1 import (
    ClientConnection,
    ClientGone,
    HeadTooLarge,
    SlowRequest,
    parse_target,
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
                exchange = Exchange(
                    client,
                    stream,
                    host=str(destination).encode("ascii"),
                    mark=(ATTESTED_HEADER, _attested(proven)),
                )
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
