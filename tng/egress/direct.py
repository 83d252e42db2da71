"""``direct_forward``: plain requests that an egress answers unprotected, because it says so.

Stock TNG looks at the first path of a connection and then passes everything. Here each request is
read, its whole path must match, and the first one that does not ends the connection. What is
forwarded is serialised anew, one upstream connection a request, so that none hides in another.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import Sequence
from http import HTTPStatus

import h11

from cai.errors import CaiError, PeerError, PolicyDenied
from tng.channel.hello import TLS_HANDSHAKE
from tng.channel.link import TLS_TIMEOUT_S
from tng.config.addresses import Upstream
from tng.egress.upstreams import connect_upstream
from tng.ingress.direct import PlainStream
from tng.ingress.exchange import Exchange
from tng.ingress.http1 import ClientConnection, ClientGone, HeadTooLarge, SlowRequest
from tng.operation.journal import Journal, endpoint_text
from tng.peers.destination import BadRequest
from tng.streams import Acceptor, Backend, Code

UNSAFE = "direct_forward"
"""What status shows."""

MAX_CLIENTS = 256
"""Most plain connections of one entry at once."""

MAX_PATH = 4096
"""Longest path that is matched, bytes; patterns may backtrack."""

_READ_SIZE = 64 * 1024

_DISGUISED = re.compile(rb"%2[ef]|%5c|%00|\\|//|/\.\.?(/|$)", re.IGNORECASE)
"""Spellings of a path that a backend may read as another one."""


class PathRefused(PolicyDenied):
    """A plain request for something that is served attested only."""

    code = "direct-forward-refused"


class DirectForward:
    """An acceptor that lets chosen plain requests through, and leads the rest to the real one.

    Args:
        name: of the entry.
        paths: patterns of which one must match the whole path.
        acceptor: for everything that is not plain HTTP.
        journal: where its lines go.
    """

    def __init__(
        self, name: str, paths: Sequence[re.Pattern[str]], acceptor: Acceptor, journal: Journal
    ) -> None:
        self._name = name
        self._paths = tuple(paths)
        self._acceptor = acceptor
        self._journal = journal
        self._clients = 0
        self._leaving = False

    async def serve(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        backend: Backend,
        targets: Sequence[Upstream] = (),
    ) -> None:
        """Serve one connection to its end.

        Args:
            reader: from the client.
            writer: to the client.
            backend: for attested streams.
            targets: where plain requests go, the first that answers.
        """
        try:
            async with asyncio.timeout(TLS_TIMEOUT_S):
                first = await reader.read(_READ_SIZE)
        except (OSError, TimeoutError):
            writer.transport.abort()
            return
        _unread(reader, first)
        if not first or first[0] == TLS_HANDSHAKE:
            await self._acceptor.serve(reader, writer, backend)
            return
        if self._clients >= MAX_CLIENTS:
            writer.close()
            return
        self._clients += 1
        client = ClientConnection(reader, writer)
        try:
            while not self._leaving and await self._next(client, writer, targets):
                pass
        finally:
            self._clients -= 1
            writer.close()

    def status(self) -> dict[str, object]:
        """What the control interface shows."""
        return {**self._acceptor.status(), "plain_connections": self._clients}

    def leave(self) -> None:
        """Take no new sessions, streams and requests."""
        self._leaving = True
        self._acceptor.leave()

    async def close(self) -> None:
        """End every session now."""
        await self._acceptor.close()

    async def _next(
        self, client: ClientConnection, writer: asyncio.StreamWriter, targets: Sequence[Upstream]
    ) -> bool:
        """One request; whether another may follow."""
        what = f"{self._name} {endpoint_text(writer.get_extra_info('peername'))} in clear"
        try:
            request = await client.next_request()
            if request is None:
                return False
            demand_direct(request, self._paths)
            status = await self._forward(client, request, targets)
        except ClientGone:
            client.abort()
            return False
        except CaiError as error:
            self._journal.line(f"{what} refused: {error.machine_code}: {error.message}")
            await _refuse(client, error)
            return False
        self._journal.line(f"{what}: {status}")
        return client.reusable

    async def _forward(
        self, client: ClientConnection, request: h11.Request, targets: Sequence[Upstream]
    ) -> int:
        stream = await _connect(targets)
        try:
            host = next(value for name, value in request.headers if name == b"host")
            return await Exchange(client, stream, host=host).run(request, request.target)
        finally:
            stream.reset(Code.CANCELLED)


def demand_direct(request: h11.Request, paths: Sequence[re.Pattern[str]]) -> None:
    """Refuse a plain request unless its whole path is one of those that are let through.

    Args:
        request: its head, strictly parsed.
        paths: patterns; a query is not part of the path.

    Raises:
        PathRefused: none matches, or the path may be read in more than one way.
        BadRequest: the request has no ``Host``.
    """
    path = request.target.partition(b"?")[0]
    if request.method == b"CONNECT" or not path.startswith(b"/"):
        raise PathRefused("this port is no proxy")
    if len(path) > MAX_PATH or _DISGUISED.search(path) or b"#" in request.target:
        raise PathRefused("the path can be read in more than one way")
    text = path.decode("latin-1")
    if not any(pattern.fullmatch(text) for pattern in paths):
        raise PathRefused(
            "this path is served attested only", hint="ask through a tng ingress"
        )
    if not any(name == b"host" for name, _value in request.headers):
        raise BadRequest("the request has no host")


def _unread(reader: asyncio.StreamReader, data: bytes) -> None:
    """Put back what was read, in front of what came since.

    asyncio has no way to look without reading, and the session behind this takes the reader's place
    in its protocol, so it needs this very reader and not one that wraps it.
    """
    reader._buffer[:0] = data  # type: ignore[attr-defined]


async def _connect(targets: Sequence[Upstream]) -> PlainStream:
    failure: PeerError = PeerError("this egress has no backend for plain requests")
    for target in targets:
        try:
            reader, writer = await connect_upstream(target)
        except PeerError as error:
            failure = error
        else:
            return PlainStream(reader, writer)
    raise failure


async def _refuse(client: ClientConnection, error: CaiError) -> None:
    if client.response_started:
        # Part of a response is out: only a broken connection says that it is not whole.
        client.abort()
        return
    own = isinstance(error, (BadRequest, HeadTooLarge, SlowRequest, PathRefused))
    status = error.http_status if own else HTTPStatus.BAD_GATEWAY
    # A stranger learns that the backend does not answer, not where it would have been.
    told = error.to_json() if own else PeerError("the backend does not answer").to_json()
    body = json.dumps({"error": told}, ensure_ascii=False).encode() + b"\n"
    head = (
        f"HTTP/1.1 {int(status)} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    with contextlib.suppress(ClientGone):
        await client.send_raw(head.encode("ascii") + body)
