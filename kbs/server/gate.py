"""The one layer in front of every surface: path prefix, who may speak, how much, and headers.

Plain ASGI, so that a request passes it once and without tasks of its own.
"""

from __future__ import annotations

import re
import time
import uuid
from dataclasses import dataclass
from typing import Any, Final

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cai.errors import CaiError, InputMissing, LimitExceeded, Refused, TooBusy
from kbs.server.answers import error_answer, internal_error
from kbs.server.settings import Compat, HttpSettings, LimitSettings, Network
from kbs.server.sources import (
    Address,
    Crowd,
    RateLimit,
    client_address,
    parse_address,
    source_of,
    within,
)

PROBES: Final = frozenset({"/healthz", "/readyz"})
"""Paths that are served with and without the prefix, to everybody and beyond every limit."""

_HEADERS: Final = (
    (b"cache-control", b"no-store"),
    (b"x-content-type-options", b"nosniff"),
)
_SLASHES: Final = re.compile("^//+")


@dataclass(frozen=True, slots=True)
class Door:
    """What one listener's gate lets pass.

    Attributes:
        http: prefix, status codes, proxies.
        limits: how much at once.
        allow: networks that may speak here; empty allows all.
        admin: the surface of administrators.
        also_bytes: largest body where that is more than the limit, bytes.
    """

    http: HttpSettings
    limits: LimitSettings
    allow: tuple[Network, ...] = ()
    admin: bool = False
    also_bytes: int = 0

    @property
    def body_bytes(self) -> int:
        """Largest body, bytes."""
        return max(self.limits.request_bytes, self.also_bytes)


class Gate:
    """An ASGI application in front of another.

    Args:
        app: what is behind it.
        door: its settings.
    """

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self._app = app
        self._door = door
        self._prefix = door.http.prefix
        self._compat = door.http.compat is Compat.TRUSTEE
        limits = door.limits
        self._crowd = Crowd(limits.requests, limits.requests_per_source)
        self._rate = RateLimit(limits.rate, limits.burst) if limits.rate else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return
        number = uuid.uuid4().hex
        scope["state"] = {
            **scope.get("state", {}), "request_id": number, "compat": self._compat,
            "prefix": self._prefix,
        }  # fmt: skip
        started = False

        async def answer(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [
                    *message.get("headers", ()), *_HEADERS,
                    (b"x-request-id", number.encode("ascii")),
                ]  # fmt: skip
            await send(message)

        try:
            source = self._admitted(scope)
        except CaiError as error:
            await self._refuse(scope, receive, answer, error)
            return
        try:
            await self._app(scope, self._bounded(scope, receive), answer)
        except Exception as error:
            # An application answers and logs what it raises; this is for what it could not.
            if not started:
                await internal_error(Request(scope), error)(scope, receive, answer)
        finally:
            if source is not None:
                self._crowd.leave(source)

    def _admitted(self, scope: Scope) -> str | None:
        """Let a request pass; the source that it was counted for, or ``None`` for a probe.

        Raises:
            CaiError: it does not pass.
        """
        address = self._address(scope)
        self._strip_prefix(scope)
        if scope["path"] in PROBES:
            return None
        door = self._door
        if door.allow and address is not None and not within(address, door.allow):
            raise Refused("this address is not allowed here", code="address")
        source = source_of(address)
        local = address is None or address.is_loopback
        if self._rate is not None and not local and not self._rate.admit(source, time.monotonic()):
            raise TooBusy("too many requests from this address", code="rate")
        self._require_small(scope)
        if not self._crowd.enter(source):
            raise TooBusy("too many requests at once")
        return source

    def _address(self, scope: Scope) -> Address | None:
        """The client's address; ``scheme`` becomes what a trusted proxy says it is."""
        peer = parse_address(scope["client"][0]) if scope.get("client") else None
        trusted = self._door.http.trusted_proxies
        if peer is None or not trusted or not within(peer, trusted):
            return peer
        if _header(scope, b"x-forwarded-proto") == "https":
            scope["scheme"] = "https"
        return client_address(peer, _header(scope, b"x-forwarded-for"), trusted)

    def _strip_prefix(self, scope: Scope) -> None:
        path: str = scope["path"]
        if self._prefix and path not in PROBES:
            if not path.startswith(self._prefix + "/"):
                raise InputMissing(
                    f"{path[:128]} is not served here", hint=f"the path prefix is {self._prefix}",
                    code="request-path",
                )  # fmt: skip
            path = path.removeprefix(self._prefix)
        # A base that ends in a slash gives stock clients paths that start with two.
        scope["path"] = _SLASHES.sub("/", path)
        scope["raw_path"] = scope["path"].encode("utf-8", "replace")

    def _require_small(self, scope: Scope) -> None:
        length = _header(scope, b"content-length")
        limit = self._door.body_bytes
        if length.isascii() and length.isdigit() and (len(length) > 12 or int(length) > limit):
            raise LimitExceeded(f"body of more than {limit} bytes")

    def _bounded(self, scope: Scope, receive: Receive) -> Receive:
        if not _header(scope, b"transfer-encoding"):
            return receive  # the server holds a body to its announced length
        limit, seen = self._door.body_bytes, 0

        async def bounded() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > limit:
                raise LimitExceeded(f"body of more than {limit} bytes")
            return message

        return bounded

    async def _refuse(self, scope: Scope, receive: Receive, send: Send, error: CaiError) -> None:
        request = Request(scope, receive)
        await error_answer(request, error, admin=self._door.admin)(scope, receive, send)


def _header(scope: Scope, name: bytes) -> str:
    values: list[Any] = [value for key, value in scope["headers"] if key == name]
    return b",".join(values).decode("latin-1").strip() if values else ""
