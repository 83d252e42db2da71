"""What the surfaces share: bounded bodies, errors as Trustee writes them, identification.

Every answer that is not 200 is an ``ErrorInformation``; no exception of ours or of a library
becomes anything else.
"""

from __future__ import annotations

import asyncio
import json
import logging
import traceback
import uuid
from collections.abc import Awaitable, Callable
from pathlib import PurePath
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from cai.attest.rcar import ERROR_PAGES, MAX_MESSAGE
from cai.errors import CaiError, FormatError, InputMissing, LimitExceeded
from kbs.release.broker import KeyBroker
from kbs.server.kinds import KEPT_BY_TRUSTEE, KINDS, Kind, kind_of, page, status_of

LOG = logging.getLogger("kbs")

BODY_SECONDS = 30
"""How long a client may take to send its body, seconds."""

MAX_DETAIL = 4096
"""Longest ``detail`` of an error, characters."""

RETRY_SECONDS = 1
"""``Retry-After`` of what may succeed soon, seconds."""

Handler = Callable[[Request, Exception], Awaitable[Response]]

_RETRIED: Final = (429, 503)


def error_handlers(*, admin: bool) -> dict[Any, Handler]:
    """The handlers of one surface, by class of exception.

    Args:
        admin: the surface of administrators.
    """

    async def known(request: Request, error: Exception) -> Response:
        if not isinstance(error, CaiError):
            return internal_error(request, error)
        return error_answer(request, error, admin=admin)

    async def routing(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 400
        return error_answer(request, _routing_error(request, status), admin=False)

    async def unknown(request: Request, error: Exception) -> Response:
        return internal_error(request, error)

    return {CaiError: known, HTTPException: routing, Exception: unknown}


def new_app(broker: KeyBroker, *, unauthenticated: str = "") -> FastAPI:
    """An application without routes but with every error handler and ``/healthz``.

    Args:
        broker: named in ``/healthz``.
        unauthenticated: ``AdminAuthAccess`` on the surface of administrators.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    for kind, handler in error_handlers(admin=unauthenticated == "AdminAuthAccess").items():
        app.add_exception_handler(kind, handler)
    app.add_route("/healthz", health_route(broker), ["GET"])
    return app


def health_route(broker: KeyBroker) -> Callable[[Request], Awaitable[Response]]:
    """``/healthz``: the process lives, and what it is."""

    async def healthz(_request: Request) -> Response:
        return json_answer(
            {
                "status": "ok",
                "realm": broker.instance.realm.value,
                "unsafe": list(broker.unsafe),
            }
        )

    return healthz


async def error_page(request: Request) -> Response:
    """The page of one kind of error, where ``type`` points."""
    kind = KINDS.get(str(request.path_params.get("kind")))
    if kind is None:
        raise InputMissing("there is no such kind of error", code="request-path")
    return Response(page(kind), media_type="text/plain; charset=utf-8")


def request_id(request: Request) -> str:
    """Id of this request; audit rows and answers name it."""
    known: str | None = getattr(request.state, "request_id", None)
    if known is None:
        known = uuid.uuid4().hex
        request.state.request_id = known
    return known


async def read_body(request: Request, *, limit: int = MAX_MESSAGE) -> bytes:
    """The whole body, bounded in size and time.

    Raises:
        LimitExceeded: longer than ``limit``.
        FormatError: not all of it arrived in ``BODY_SECONDS``.
    """
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise LimitExceeded(f"body of more than {limit} bytes")
    except TimeoutError as error:
        raise FormatError(f"the body did not arrive within {BODY_SECONDS} seconds") from error
    return bytes(body)


def error_answer(request: Request, error: CaiError, *, admin: bool) -> Response:
    """An error of ours on the wire.

    Args:
        request: what is answered.
        error: what happened.
        admin: on the surface of administrators.
    """
    kind = kind_of(error, admin=admin)
    status = status_of(error, kind)
    if status >= 500:
        LOG.error("request %s: %s", request_id(request), error.message)
    body: dict[str, str] = {
        "type": "",
        "detail": error.message[:MAX_DETAIL],
        # Readers of Trustee's two members ignore ours.
        "code": error.machine_code,
        "request": request_id(request),
    }
    if error.hint:
        body["hint"] = error.hint
    return _answer(request, kind, status, body)


def internal_error(request: Request, error: Exception) -> Response:
    """A fault of our own: where it happened, but not its message, which may repeat a secret."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{PurePath(frame.filename).name}:{frame.lineno}"
    LOG.error("request %s failed: %s at %s", request_id(request), type(error).__name__, place)
    body = {
        "type": "",
        "detail": f"internal error, request {request_id(request)}",
        "code": "internal",
        "request": request_id(request),
    }
    return _answer(request, KINDS["PluginInternalError"], 500, body)


def json_answer(value: object, *, status: int = 200) -> Response:
    """A JSON answer."""
    return Response(json.dumps(value, separators=(",", ":")), status, media_type="application/json")


def _answer(request: Request, kind: Kind, status: int, body: dict[str, str]) -> Response:
    name = kind.name
    if getattr(request.state, "compat", False):
        name = kind.trustee or name
        # Trustee's dispatcher knows 404 for two kinds and 401 for everything else.
        status = 404 if kind.name in KEPT_BY_TRUSTEE else 401
    prefix: str = getattr(request.state, "prefix", "")
    body["type"] = f"{prefix}{ERROR_PAGES}/{name}"
    answer = json_answer(body, status=status)
    if status in _RETRIED:
        answer.headers["Retry-After"] = str(RETRY_SECONDS)
    return answer


def _routing_error(request: Request, status: int) -> CaiError:
    """What the router says, as an error of ours."""
    path = request.url.path[:128]
    if status in (404, 405):
        parts = request.scope["path"].split("/")
        # A first segment that nothing answers to, or not with this method, is to Trustee a plugin
        # that does not exist.
        plugin = len(parts) > 3 and parts[1:3] == ["kbs", "v0"]
        return InputMissing(
            f"{request.method} {path} is not served here",
            code="no-such-service" if plugin else "request-path",
        )
    return FormatError(f"{request.method} {path}: HTTP error {status}", code="http")
