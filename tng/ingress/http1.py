"""HTTP/1.1 at the proxy's client side: strict heads, bodies by h11, bounded everywhere.

h11 parses; this module first refuses the spellings over which two parsers could disagree (RFC 9112
§2.2, §5.2, §6.3), so that no request can hide another one. What is forwarded is serialised anew.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable

import h11

from cai.errors import CaiError, LimitExceeded, PeerError
from tng.peers.destination import BadRequest, Destination, parse_authority

MAX_HEAD = 64 * 1024
"""Longest request or response head, bytes."""

MAX_HEADERS = 100
"""Most header lines of a request."""

HEAD_TIMEOUT_S = 10.0
"""Longest time from the first byte of a request head to its last, seconds."""

KEEP_ALIVE_S = 75.0
"""How long a client connection may wait between requests, seconds."""

BODY_TIMEOUT_S = 60.0
"""Longest pause inside a request body, seconds."""

_CHUNK = 64 * 1024

Header = tuple[bytes, bytes]

HOP_BY_HOP = frozenset(
    {
        b"connection", b"keep-alive", b"proxy-connection", b"proxy-authorization",
        b"proxy-authenticate", b"te", b"upgrade",
    }
)  # fmt: skip
"""Headers that end at this proxy (RFC 9110 §7.6.1)."""

_NEVER_HOP = frozenset({b"host", b"content-length", b"transfer-encoding", b"trailer"})
"""Headers that a client may not declare hop-by-hop: their removal would change the message."""


class ClientGone(PeerError):
    """The client closed its connection."""

    code = "client-gone"


class HeadTooLarge(LimitExceeded):
    """A request head beyond ``MAX_HEAD``."""

    code, http_status = "head-too-large", 431


class SlowRequest(CaiError):
    """A request that does not arrive in time."""

    code, exit_status, http_status = "slow-request", 8, 408


def demand_strict_head(raw: bytes) -> None:
    """Refuse spellings of a request head that parsers read differently.

    Args:
        raw: from the first byte of the request line through the empty line.

    Raises:
        BadRequest: bare CR or LF, NUL, a folded line, a doubled or contradictory length, a transfer
            coding other than ``chunked``, or more headers than ``MAX_HEADERS``.
    """
    if b"\x00" in raw or raw.count(b"\r\n") != raw.count(b"\n") or raw.count(b"\r\n") != (
        raw.count(b"\r")
    ):
        raise BadRequest("the request head has a bare CR, LF or NUL")
    lines = raw.split(b"\r\n")[1:-2]
    if len(lines) > MAX_HEADERS:
        raise BadRequest(f"more than {MAX_HEADERS} headers")
    seen: dict[bytes, int] = {}
    codings: list[bytes] = []
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or not name or name != name.strip():
            raise BadRequest("a header line is folded, or has space around its name")
        key = name.lower()
        seen[key] = seen.get(key, 0) + 1
        if key == b"transfer-encoding":
            codings.append(value.strip(b" \t").lower())
        if key == b"content-length" and not value.strip(b" \t").isdigit():
            raise BadRequest("content-length is not one number")
    if seen.get(b"content-length", 0) > 1 or seen.get(b"host", 0) > 1:
        raise BadRequest("content-length or host is given twice")
    if codings and (b"content-length" in seen or codings != [b"chunked"]):
        raise BadRequest("transfer-encoding is not exactly chunked, or comes with content-length")


def parse_target(request: h11.Request) -> tuple[Destination, bytes]:
    """Destination and origin-form path of a request to the proxy.

    Raises:
        BadRequest: not in absolute form, or URI and Host disagree (RFC 9112 §3.2.2, decisions §7).
    """
    target = request.target
    host = [value for name, value in request.headers if name == b"host"]
    if request.method == b"CONNECT":
        destination = parse_authority(_text(target), default_port=None)
        # Clients send the authority again as Host; some leave the port out.
        if host and host[0] != target:
            named = parse_authority(_text(host[0]), default_port=destination.port)
            _demand_equal(named, destination)
        return destination, b""
    if target.startswith(b"/") or target == b"*":
        raise BadRequest(
            "this is a proxy, and the request names no absolute URI",
            hint="use it as http_proxy=http://HOST:PORT, not as the address of a service",
        )
    scheme, separator, rest = target.partition(b"://")
    if not separator or scheme.lower() != b"http":
        raise BadRequest(
            "only http:// URIs can be proxied", hint="https goes through CONNECT (https_proxy)"
        )
    cut = min((rest.find(mark) for mark in b"/?#" if mark in rest), default=len(rest))
    authority, path = rest[:cut], rest[cut:]
    if b"#" in path:
        raise BadRequest("the URI has a fragment")
    destination = parse_authority(_text(authority), default_port=80)
    if host:
        _demand_equal(parse_authority(_text(host[0]), default_port=80), destination)
    return destination, path if path.startswith(b"/") else b"/" + path


def end_to_end(headers: Iterable[Header]) -> list[Header]:
    """The headers that go on, those that ``Connection`` names taken out.

    Raises:
        BadRequest: ``Connection`` names a header that the message cannot do without.
    """
    listed = list(headers)
    named = {
        token.strip().lower()
        for name, value in listed
        if name == b"connection"
        for token in value.split(b",")
    }
    if named & _NEVER_HOP:
        raise BadRequest("connection names a header that belongs to the message")
    return [(name, value) for name, value in listed if name not in HOP_BY_HOP | named]


class ClientConnection:
    """One client connection of the proxy: requests in, responses out.

    Args:
        reader: from the client.
        writer: to the client.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._ahead = b""
        self._http = _fresh()
        self.response_started = False

    async def next_request(self) -> h11.Request | None:
        """The next request head, or ``None`` when the client has no more.

        Raises:
            BadRequest, HeadTooLarge, SlowRequest: the client is to be told, and the connection
                ends.
        """
        self.response_started = False
        self._http = _fresh()
        try:
            async with asyncio.timeout(KEEP_ALIVE_S):
                while not (head := self._ahead.removeprefix(b"\r\n")):
                    if not await self._more():
                        return None
        except TimeoutError:
            return None
        self._ahead = head
        try:
            async with asyncio.timeout(HEAD_TIMEOUT_S):
                while (end := self._ahead.find(b"\r\n\r\n")) < 0:
                    if len(self._ahead) > MAX_HEAD:
                        raise HeadTooLarge(f"the request head is longer than {MAX_HEAD} bytes")
                    if b"\n\n" in self._ahead:
                        raise BadRequest("the request head has a bare LF")
                    if not await self._more():
                        return None
        except TimeoutError as error:
            raise SlowRequest(f"the request head took longer than {HEAD_TIMEOUT_S:g} s") from error
        if end + 4 > MAX_HEAD:
            raise HeadTooLarge(f"the request head is longer than {MAX_HEAD} bytes")
        demand_strict_head(self._ahead[: end + 4])
        data, self._ahead = self._ahead, b""
        try:
            self._http.receive_data(data)
            event = self._http.next_event()
        except h11.RemoteProtocolError as error:
            raise BadRequest(f"not an HTTP/1.1 request: {told(error)}") from error
        if not isinstance(event, h11.Request) or event.http_version not in (b"1.0", b"1.1"):
            raise BadRequest("not an HTTP/1.1 request")
        return event

    async def body(self) -> AsyncIterator[h11.Data | h11.EndOfMessage]:
        """The request body as events, the end included.

        Raises:
            BadRequest, SlowRequest, ClientGone: the body is malformed, stalls, or stops.
        """
        while True:
            try:
                event = self._http.next_event()
            except h11.RemoteProtocolError as error:
                raise BadRequest(f"the request body is malformed: {told(error)}") from error
            if event is h11.NEED_DATA:
                try:
                    async with asyncio.timeout(BODY_TIMEOUT_S):
                        data = await self._read()
                except TimeoutError as error:
                    raise SlowRequest("the request body stalls") from error
                if not data:
                    raise ClientGone("the client left inside its request")
                self._http.receive_data(data)
            elif isinstance(event, h11.Data):
                yield event
            elif isinstance(event, h11.EndOfMessage):
                self._ahead = self._http.trailing_data[0]
                yield event
                return
            else:
                raise BadRequest("the request body is malformed")

    async def until_gone(self) -> None:
        """Wait until the client closes; what it sends ahead is kept, up to ``MAX_HEAD``.

        Raises:
            ClientGone: always, unless it is cancelled.
        """
        while len(self._ahead) < MAX_HEAD:
            if not await self._more():
                raise ClientGone("the client left before the response")
        await asyncio.Event().wait()

    async def send(self, event: h11.Event) -> None:
        """Send one event of the response.

        Raises:
            ClientGone: the client takes nothing any more.
            PeerError: the event does not fit the response, as a broken upstream makes it.
        """
        if isinstance(event, h11.Response):
            self.response_started = True
        try:
            data = self._http.send(event)
            if data:
                self._writer.write(data)
            await self._writer.drain()
        except h11.LocalProtocolError as error:
            raise PeerError(f"the upstream's response cannot be sent on: {told(error)}") from error
        except OSError as error:
            raise ClientGone("the client left inside the response") from error

    @property
    def reusable(self) -> bool:
        """Whether another request may follow on this connection."""
        return self._http.our_state is h11.DONE and self._http.their_state is h11.DONE

    def tunnel(self) -> bytes:
        """After CONNECT: the bytes that the client has sent behind its head."""
        return self._http.trailing_data[0]

    async def send_raw(self, data: bytes) -> None:
        """Send bytes as they are (the answer to CONNECT).

        Raises:
            ClientGone: the client takes nothing any more.
        """
        self.response_started = True
        try:
            self._writer.write(data)
            await self._writer.drain()
        except OSError as error:
            raise ClientGone("the client left") from error

    def abort(self) -> None:
        """Drop the connection, so that a cut response cannot look whole."""
        self._writer.transport.abort()

    async def _more(self) -> bool:
        data = await self._read()
        self._ahead += data
        return bool(data)

    async def _read(self) -> bytes:
        try:
            return await self._reader.read(_CHUNK)
        except OSError as error:
            raise ClientGone("the client's connection broke") from error


def told(error: h11.ProtocolError) -> str:
    """What h11 says, without the bytes that it quotes: those may be somebody's prompt."""
    return str(error).partition(":")[0]


def _fresh() -> h11.Connection:
    return h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)


def _text(data: bytes) -> str:
    try:
        return data.decode("ascii")
    except UnicodeDecodeError as error:
        raise BadRequest("the destination is not ASCII") from error


def _demand_equal(named: Destination, destination: Destination) -> None:
    if named != destination:
        raise BadRequest("the request's URI and its Host name different destinations")
