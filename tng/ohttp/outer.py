"""Outer HTTP: connections of an ingress to one origin, kept alive and used one request at a time.

Nothing that is learnt here is trusted: what matters is sealed, or proven by evidence.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
from collections.abc import Awaitable, Callable
from http import HTTPStatus

import h11

from cai.errors import CaiError, PeerError, PeerUnreachable
from tng.ingress.http1 import MAX_HEAD, told
from tng.ohttp.messages import API_HEADER, MAX_JSON
from tng.peers.destination import Destination, server_name

CONNECT_TIMEOUT_S = 10.0
"""Longest wait for a connection, seconds; the outer TLS handshake included."""

CALL_TIMEOUT_S = 75.0
"""Longest wait for an answer that may need a quote (TNG gives its agent 50 s), seconds."""

IDLE_S = 15.0
"""How long a connection is kept without a request, seconds: less than load balancers keep it."""

MAX_IDLE = 32
"""Most idle connections to one origin."""

MAX_ERROR = 2048
"""Most of an error's body that is read, bytes."""

CHUNK = 64 * 1024
"""Most bytes that are read at once."""

_CODE = re.compile(r'"code"\s*:\s*"([A-Za-z]{1,64})"')

Resolve = Callable[[Destination], Awaitable[tuple[str, ...]]]


class OuterRefusal(PeerError):
    """An answer other than 200.

    Args:
        status: HTTP status.
        name: TNG's code; empty when the answer names none.
        text: what it says.
    """

    code = "ohttp-refused"

    def __init__(self, status: int, name: str, text: str) -> None:
        super().__init__(f"the peer answers HTTP {status} {name or _phrase(status)}: {text}")
        self.status = status
        self.name = name


class Stale(PeerUnreachable):
    """A kept connection ended before the answer began; another one may do."""


class OuterConnection:
    """One connection.

    Args:
        reader: from the origin.
        writer: to it.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD)
        self._answered = False
        self.used = 0
        self.idle_since = 0.0

    @property
    def alive(self) -> bool:
        """Whether it can be used again, as far as is known."""
        return not self._reader.at_eof() and not self._writer.is_closing()

    @property
    def reusable(self) -> bool:
        """Whether another request may follow."""
        both = self._http.our_state is h11.DONE and self._http.their_state is h11.DONE
        return both and self.alive

    def again(self) -> None:
        """Make ready for another request."""
        self._answered = False
        self._http.start_next_cycle()

    async def send(self, *events: h11.Event) -> None:
        """Send parts of a request, together.

        Raises:
            PeerUnreachable: the connection broke.
            PeerError: the request cannot be sent.
        """
        try:
            data = b"".join(self._http.send(event) or b"" for event in events)
            if data:
                self._writer.write(data)
            await self._writer.drain()
        except h11.LocalProtocolError as error:
            raise PeerError(f"the outer request cannot be sent: {told(error)}") from error
        except OSError as error:
            raise PeerUnreachable("the peer broke the connection") from error

    async def response(self) -> h11.Response:
        """The head of the answer.

        Raises:
            Stale: a kept connection ended before it began.
            PeerUnreachable, PeerError: the connection broke, or it is no HTTP.
        """
        event = await self._event()
        while isinstance(event, h11.InformationalResponse):
            event = await self._event()
        if not isinstance(event, h11.Response):
            raise self._ended()
        self._answered = True
        return event

    async def data(self) -> bytes:
        """Some of the answer's body; empty at its end.

        Raises:
            PeerUnreachable, PeerError: the connection broke, or it is no HTTP.
        """
        event = await self._event()
        while isinstance(event, h11.Data) and not event.data:
            event = await self._event()
        if isinstance(event, h11.Data):
            return bytes(event.data)
        if isinstance(event, h11.EndOfMessage):
            return b""
        raise self._ended()

    def close(self) -> None:
        """Drop it, with what waits to be sent."""
        self._writer.transport.abort()

    async def _event(self) -> object:
        try:
            while (event := self._http.next_event()) is h11.NEED_DATA:
                self._http.receive_data(await self._reader.read(CHUNK))
        except h11.RemoteProtocolError as error:
            if self._reader.at_eof():
                raise self._ended() from error
            raise PeerError(f"the peer's answer is no HTTP response: {told(error)}") from error
        except OSError as error:
            raise self._ended() from error
        return event

    def _ended(self) -> PeerError:
        if self.used and not self._answered:
            return Stale("the peer closed a kept connection")
        return PeerUnreachable("the peer ended the connection before its answer was whole")


class OuterClient:
    """The connections to one origin.

    Args:
        origin: where they go.
        resolve: its checked addresses.
        tls: for HTTPS.
    """

    def __init__(
        self, origin: Destination, resolve: Resolve, tls: ssl.SSLContext | None
    ) -> None:
        self._origin = origin
        self._resolve = resolve
        self._tls = tls
        self._idle: list[OuterConnection] = []
        self._busy: set[OuterConnection] = set()

    @property
    def connected(self) -> bool:
        """Whether a connection stands."""
        return bool(self._busy) or any(item.alive for item in self._idle)

    @property
    def busy(self) -> int:
        """Requests running now."""
        return len(self._busy)

    async def acquire(self, *, fresh: bool = False) -> OuterConnection:
        """A connection that nobody else uses until it is released.

        Raises:
            DestinationRefused: the address may not be gone to.
            PeerUnreachable: none can be made.
        """
        now = asyncio.get_running_loop().time()
        while self._idle and not fresh:
            connection = self._idle.pop()
            if connection.alive and now - connection.idle_since < IDLE_S:
                connection.again()
                self._busy.add(connection)
                return connection
            connection.close()
        connection = await self._connect()
        self._busy.add(connection)
        return connection

    def release(self, connection: OuterConnection) -> None:
        """Give a connection back; one that is not at the end of an answer is dropped."""
        self._busy.discard(connection)
        if not connection.reusable or len(self._idle) >= MAX_IDLE:
            connection.close()
            return
        connection.used += 1
        connection.idle_since = asyncio.get_running_loop().time()
        self._idle.append(connection)

    def close(self) -> None:
        """Drop every connection."""
        for connection in (*self._idle, *self._busy):
            connection.close()
        self._idle.clear()

    def head(self, method: str, path: str, api: bytes, *more: tuple[bytes, bytes]) -> h11.Request:
        """The head of an outer request.

        Raises:
            PeerError: the path cannot be sent.
        """
        default = 443 if self._tls else 80
        host = str(self._origin)
        if self._origin.port == default:
            host = host.rpartition(":")[0]
        headers = [(b"host", host.encode("ascii")), (API_HEADER, api), (b"accept", b"*/*"), *more]
        try:
            return h11.Request(method=method, target=path, headers=headers)
        except h11.LocalProtocolError as error:
            raise PeerError(f"the outer request cannot be sent: {told(error)}") from error

    async def call(self, method: str, path: str, api: bytes, body: bytes) -> bytes:
        """One request with a JSON answer.

        Raises:
            OuterRefusal: an answer other than 200.
            PeerUnreachable, PeerError: there is none.
        """
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                try:
                    return await self._call(method, path, api, body, fresh=False)
                except Stale:
                    return await self._call(method, path, api, body, fresh=True)
        except TimeoutError as error:
            raise PeerUnreachable(
                f"{self._origin} does not answer {api.decode()} within {CALL_TIMEOUT_S:g} s"
            ) from error

    async def _call(
        self, method: str, path: str, api: bytes, body: bytes, *, fresh: bool
    ) -> bytes:
        connection = await self.acquire(fresh=fresh)
        try:
            length = (b"content-length", str(len(body)).encode("ascii"))
            kind = (b"content-type", b"application/json")
            more = (kind, length) if method == "POST" else ()
            with contextlib.suppress(PeerUnreachable):
                # A peer may answer and close before it has read everything.
                parts = (h11.Data(data=body),) if body else ()
                head = self.head(method, path, api, *more)
                await connection.send(head, *parts, h11.EndOfMessage())
            response = await connection.response()
            if response.status_code != HTTPStatus.OK:
                raise await refusal(connection, response)
            data = bytearray()
            while part := await connection.data():
                data += part
                if len(data) > MAX_JSON:
                    raise PeerError(f"{self._origin} answers more than {MAX_JSON} bytes")
            return bytes(data)
        finally:
            self.release(connection)

    async def _connect(self) -> OuterConnection:
        addresses = await self._resolve(self._origin)
        failed: Exception | None = None
        for address in addresses:
            try:
                async with asyncio.timeout(CONNECT_TIMEOUT_S):
                    reader, writer = await asyncio.open_connection(
                        address,
                        self._origin.port,
                        ssl=self._tls,
                        server_hostname=(server_name(self._origin) or address)
                        if self._tls
                        else None,
                    )
                return OuterConnection(reader, writer)
            except (OSError, TimeoutError) as error:
                failed = failed or error
        raise PeerUnreachable(
            f"{self._origin} cannot be reached: {failed or 'no address'}",
            hint="check that the egress, or the load balancer before it, runs there",
        ) from failed


async def refusal(connection: OuterConnection, response: h11.Response) -> OuterRefusal:
    """What an answer other than 200 says; its words are the peer's, or somebody's between."""
    data = b""
    with contextlib.suppress(CaiError):
        while len(data) < MAX_ERROR and (part := await connection.data()):
            data += part
        if len(data) < MAX_ERROR:
            return _refusal(response.status_code, data)
    return _refusal(response.status_code, data[:MAX_ERROR])


def _refusal(status: int, data: bytes) -> OuterRefusal:
    text = data.decode("utf-8", "replace")
    match = _CODE.search(text)
    name = match.group(1) if match else ""
    return OuterRefusal(status, name, " ".join(text.split())[:256])


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return ""
