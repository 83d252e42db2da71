"""What decides over the requests of one egress entry, whichever of its ports they come by."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator

import h11
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tng.config.guard import Guard, is_plain_path
from tng.guard.bodies import Judged, cache_salt, judge, parse_body
from tng.guard.callers import Authenticator, Identity
from tng.guard.http import Incoming, StreamServer, too_long
from tng.guard.limits import BUSY_RETRY_S, Ledger
from tng.guard.receipts import Receipts
from tng.guard.refusals import GuardRefused
from tng.guard.routes import Route

MAX_HELD_MIB = 1024
"""Most bodies of requests in memory at once, of all callers together, MiB."""

MAX_LENGTH_DIGITS = 15
"""Most digits of a content-length."""


class BootKeys:
    """Secrets of one run of a gateway; workers that it forks share them."""

    def __init__(self) -> None:
        self.salt = secrets.token_bytes(32)
        self.receipts = Ed25519PrivateKey.generate()

    def __repr__(self) -> str:
        return "<boot keys>"

    def __reduce__(self) -> str:
        raise TypeError("boot keys are not pickled")


class Desk:
    """Callers, limits, paths and bodies of one entry.

    Args:
        guard: settings.
        keys: of this run.

    Raises:
        CaiError: a file that the settings name is missing or malformed.
    """

    def __init__(self, guard: Guard, keys: BootKeys) -> None:
        self.guard = guard
        self.ledger = Ledger(guard.requests)
        self.callers = Authenticator(guard)
        self.receipts = Receipts(keys.receipts) if guard.receipts else None
        self._salt_key = keys.salt
        self._held = 0

    def status(self) -> dict[str, object]:
        """What the control interface shows."""
        return {
            "running": self.ledger.running,
            "callers": self.ledger.status(),
            "paths": sorted(self.guard.routes),
            "receipt_key": self.receipts.public_key if self.receipts else "",
            "unsafe": list(self.guard.unsafe),
        }

    def route(self, request: Incoming) -> Route:
        """The route of a request.

        Raises:
            GuardRefused: 403 when its path is not open, 405 when its method is another.
        """
        route = self.guard.routes.get(request.path)
        if route is None or not is_plain_path(request.path):
            raise GuardRefused(403, "path_not_allowed", "this path is not open to clients")
        if request.method != route.method:
            raise GuardRefused(
                405, "method_not_allowed", f"this path takes {route.method}", allow=(route.method,)
            )
        return route

    @contextlib.contextmanager
    def holding(self, request: Incoming, route: Route) -> Iterator[None]:
        """Room for the body of a request, while it lasts.

        Raises:
            GuardRefused: the body is too long or of another kind, or there is no room for it.
        """
        limit = self.guard.body_bytes
        length = _announced(request, limit) if route.method != "GET" else 0
        if length > limit:
            raise too_long(limit)
        if self._held + length > MAX_HELD_MIB * 2**20:
            raise GuardRefused(
                503, "overloaded", "the gateway holds too much", retry_after_s=BUSY_RETRY_S
            )
        self._held += length
        try:
            yield
        finally:
            self._held -= length

    async def body(
        self, route: Route, server: StreamServer, identity: Identity
    ) -> tuple[bytes, Judged | None]:
        """The body as received, and as it may go on; ``None`` where there is none.

        Raises:
            GuardRefused: it may not go on, naming why.
            ClientGone: the client left inside it.
        """
        limit = self.guard.body_bytes
        if route.method == "GET":
            if await server.body(0, self.guard.request_s):
                raise too_long(0)
            return b"", None
        if server.waits_for_continue:
            await server.send(h11.InformationalResponse(status_code=100, headers=[]))
        received = await server.body(limit, self.guard.request_s)
        salt = cache_salt(self._salt_key, identity.name) if self.guard.salted else None
        return received, judge(parse_body(received), route, salt, self.guard.body)


def _announced(request: Incoming, limit: int) -> int:
    """How long a body of JSON says it is; one in chunks may become as long as any."""
    kind = (request.header("content-type") or "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise GuardRefused(415, "unsupported_media_type", "the body is application/json")
    if request.header("content-encoding") not in (None, "identity"):
        raise GuardRefused(415, "unsupported_media_type", "the body is not compressed")
    length = request.header("content-length")
    if length is None:
        return limit if request.header("transfer-encoding") else 0
    if len(length) > MAX_LENGTH_DIGITS:
        raise too_long(limit)
    return int(length)
