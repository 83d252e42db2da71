"""What decides over the requests of one egress entry, whichever of its ports they come by."""

from __future__ import annotations

import secrets

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tng.config.guard import Guard, is_plain_path
from tng.guard.bodies import Judged, cache_salt, judge, parse_body
from tng.guard.callers import Authenticator, Identity
from tng.guard.http import Incoming, StreamServer, too_long
from tng.guard.limits import Ledger
from tng.guard.receipts import Receipts
from tng.guard.refusals import GuardRefused
from tng.guard.routes import Route

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
    """

    def __init__(self, guard: Guard, keys: BootKeys) -> None:
        self.guard = guard
        self.ledger = Ledger(guard.requests)
        self.callers = Authenticator(guard)
        self.receipts = Receipts(keys.receipts) if guard.receipts else None
        self._salt_key = keys.salt

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

    async def body(
        self, request: Incoming, route: Route, server: StreamServer, identity: Identity
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
        _demand_json(request, limit)
        received = await server.body(limit, self.guard.request_s)
        salt = cache_salt(self._salt_key, identity.name) if self.guard.salted else None
        return received, judge(parse_body(received), route, salt, self.guard.body)


def _demand_json(request: Incoming, limit: int) -> None:
    length = request.header("content-length") or "0"
    if len(length) > MAX_LENGTH_DIGITS or int(length) > limit:
        raise too_long(limit)
    kind = (request.header("content-type") or "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise GuardRefused(415, "unsupported_media_type", "the body is application/json")
    if request.header("content-encoding") not in (None, "identity"):
        raise GuardRefused(415, "unsupported_media_type", "the body is not compressed")
