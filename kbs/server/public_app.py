"""The main listener: Trustee's key broker protocol, for guests."""

from __future__ import annotations

from fastapi import Request, Response
from starlette.applications import Starlette
from starlette.routing import Route

from cai.errors import FormatError, Unauthenticated
from kbs.protocol.sessions import LIFETIME
from kbs.release.broker import KeyBroker
from kbs.server.answers import (
    error_handlers,
    error_page,
    health_route,
    json_answer,
    read_body,
    request_id,
)
from kbs.server.crew import Crew
from kbs.server.readiness import ready_route

COOKIE = "kbs-session-id"
"""Name of the session cookie, as stock clients know it."""

MAX_COOKIE = 256
"""Longest cookie value that is looked up, characters."""

MAX_LEASE_REQUEST = 64 * 1024
"""Largest request for a lease, bytes."""


class GuestRoutes:
    """What guests call.

    Args:
        broker: answers.
        crew: runs it off the event loop.
    """

    def __init__(self, broker: KeyBroker, crew: Crew) -> None:
        self._broker = broker
        self._crew = crew

    async def auth(self, request: Request) -> Response:
        """``POST /kbs/v0/auth``: begin a session."""
        body = await read_body(request)
        try:
            challenge, cookie = await self._crew.quick(self._broker.auth, body)
        except FormatError:
            await self._crew.quick(self._broker.count_failure, "auth")
            raise
        return _with_cookie(request, json_answer(challenge), cookie)

    async def attest(self, request: Request) -> Response:
        """``POST /kbs/v0/attest``: verify the evidence of a session."""
        cookie = _cookie(request)
        body = await read_body(request)
        if cookie is None:
            await self._crew.quick(self._broker.count_failure, "session")
            raise Unauthenticated("no session cookie", hint="start with POST auth")
        token = await self._crew.verify(
            self._broker.attest, cookie, body, request=request_id(request)
        )
        return _with_cookie(request, json_answer({"token": token}), cookie)

    async def resource(self, request: Request) -> Response:
        """``GET /kbs/v0/resource/…``: release a resource."""
        sealed = await self._crew.quick(
            self._broker.release,
            request.path_params["path"],
            cookie=_cookie(request),
            bearer=_bearer(request),
            request=request_id(request),
        )
        return Response(sealed, media_type="application/json")

    async def lease(self, request: Request) -> Response:
        """``POST /kbs/v0/lease``: grant or renew a lease."""
        body = await read_body(request, limit=MAX_LEASE_REQUEST)
        answer = await self._crew.quick(
            self._broker.lease,
            body,
            cookie=_cookie(request),
            bearer=_bearer(request),
            request=request_id(request),
        )
        return json_answer(answer)


def public_app(broker: KeyBroker, crew: Crew) -> Starlette:
    """The application of the main listener."""
    guest = GuestRoutes(broker, crew)
    return Starlette(
        routes=[
            Route("/kbs/v0/auth", guest.auth, methods=["POST"]),
            Route("/kbs/v0/attest", guest.attest, methods=["POST"]),
            Route("/kbs/v0/resource/{path:path}", guest.resource, methods=["GET"]),
            Route("/kbs/v0/lease", guest.lease, methods=["POST"]),
            Route("/kbs/v0/errors/{kind}", error_page, methods=["GET"]),
            Route("/healthz", health_route(broker), methods=["GET"]),
            Route("/readyz", ready_route(broker, crew), methods=["GET"]),
        ],
        exception_handlers=error_handlers(admin=False),
    )


def _bearer(request: Request) -> str | None:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None


def _cookie(request: Request) -> str | None:
    value = request.cookies.get(COOKIE)
    return value if value and len(value) <= MAX_COOKIE else None


def _with_cookie(request: Request, response: Response, cookie: str) -> Response:
    # Without a path: a client takes that of the request, which has every proxy's prefix in it.
    # Without TLS a Secure cookie would not come back, and the protocol runs over plain HTTP too,
    # since its answers are encrypted to the guest.
    secure = request.scope["scheme"] == "https"
    response.set_cookie(
        COOKIE, cookie, expires=LIFETIME, path=None, httponly=True, secure=secure,
        samesite="strict" if secure else None,
    )  # fmt: skip
    return response
