"""The main listener: Trustee's key broker protocol, for guests."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response
from starlette.concurrency import run_in_threadpool

from cai.errors import CaiError, Unauthenticated
from kbs.protocol.sessions import LIFETIME
from kbs.release.broker import KeyBroker
from kbs.server.answers import json_answer, new_app, read_body, request_id

COOKIE = "kbs-session-id"
"""Name of the session cookie, as stock clients know it."""

MAX_COOKIE = 256
"""Longest cookie value that is looked up, characters."""


def public_app(broker: KeyBroker) -> FastAPI:
    """The application of the main listener."""
    app = new_app(broker, unauthenticated="TokenNotFound")

    @app.post("/kbs/v0/auth")
    async def auth(request: Request) -> Response:
        body = await read_body(request)
        try:
            challenge, cookie = await run_in_threadpool(broker.auth, body)
        except CaiError:
            await run_in_threadpool(broker.count_failure, "auth")
            raise
        return _with_cookie(json_answer(challenge), cookie)

    @app.post("/kbs/v0/attest")
    async def attest(request: Request) -> Response:
        cookie = _cookie(request)
        body = await read_body(request)
        if cookie is None:
            await run_in_threadpool(broker.count_failure, "session")
            raise Unauthenticated("no session cookie", hint="start with POST auth")
        token = await run_in_threadpool(
            broker.attest, cookie, body, request=request_id(request)
        )
        return _with_cookie(json_answer({"token": token}), cookie)

    @app.get("/kbs/v0/resource/{path:path}")
    async def resource(request: Request, path: str) -> Response:
        sealed = await run_in_threadpool(
            broker.release,
            path,
            cookie=_cookie(request),
            bearer=_bearer(request),
            request=request_id(request),
        )
        return Response(sealed, media_type="application/json")

    @app.post("/kbs/v0/lease")
    async def lease(request: Request) -> Response:
        body = await read_body(request)
        answer = await run_in_threadpool(
            broker.lease,
            body,
            cookie=_cookie(request),
            bearer=_bearer(request),
            request=request_id(request),
        )
        return json_answer(answer)

    return app


def _bearer(request: Request) -> str | None:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None


def _cookie(request: Request) -> str | None:
    value = request.cookies.get(COOKIE)
    return value if value and len(value) <= MAX_COOKIE else None


def _with_cookie(response: Response, cookie: str) -> Response:
    # No Secure attribute: the protocol runs over plain HTTP too, since its answers are encrypted.
    response.set_cookie(COOKIE, cookie, expires=LIFETIME, path="/kbs/v0", httponly=True,
                        samesite="strict")  # fmt: skip
    return response
