"""What the two listeners share: bounded bodies, errors as Trustee writes them, headers.

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
from typing import Final

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from cai.attest.rcar import MAX_MESSAGE, ErrorInformation
from cai.errors import (
    CaiError,
    EvidenceRefused,
    FormatError,
    InputError,
    InputMissing,
    LimitExceeded,
    PolicyDenied,
    Tampered,
    Unauthenticated,
    UsageError,
)
from kbs.release.broker import KeyBroker

LOG = logging.getLogger("kbs")

BODY_SECONDS = 30
"""How long a client may take to send its body, seconds."""

MAX_DETAIL = 4096
"""Longest ``detail`` of an error, characters."""

_KINDS: Final[tuple[tuple[type[CaiError], str], ...]] = (
    (PolicyDenied, "PolicyDeny"),
    (EvidenceRefused, "AttestationError"),
    (Unauthenticated, "TokenNotFound"),
    (InputMissing, "PluginInternalError"),
    (Tampered, "StorageBackendInitialization"),
    (InputError, "SerdeError"),
    (UsageError, "ParsePolicyError"),
)
"""Trustee's names of our errors, most special first."""


_KIND_OF_CODE: Final = {
    "protocol-version": "AttestationError", "request-path": "InvalidRequestPath",
}  # fmt: skip


def new_app(broker: KeyBroker, *, unauthenticated: str) -> FastAPI:
    """An application without routes but with every error handler and ``/healthz``.

    Args:
        broker: named in ``/healthz``.
        unauthenticated: this listener's kind of ``Unauthenticated``.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    async def known(request: Request, error: Exception) -> Response:
        if not isinstance(error, CaiError):
            return unknown(request, error)
        return error_answer(request, error, unauthenticated=unauthenticated)

    async def routing(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 400
        # A wrong method is, to Trustee's dispatcher, a plugin that does not exist.
        kind = "InvalidRequestPath" if status in (404, 405) else "HTTPFailed"
        detail = f"{request.method} {request.url.path[:128]} is not served here"
        return _answer(404 if status == 405 else status, ErrorInformation(kind, detail), request)

    def unknown(request: Request, error: Exception) -> Response:
        # Where it happened, but not the message: it may repeat what was being handled.
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{PurePath(frame.filename).name}:{frame.lineno}"
        LOG.error("request %s failed: %s at %s", request_id(request), type(error).__name__, place)
        detail = f"internal error, request {request_id(request)}"
        return _answer(500, ErrorInformation("PluginInternalError", detail), request)

    app.add_exception_handler(CaiError, known)
    app.add_exception_handler(HTTPException, routing)

    @app.middleware("http")
    async def harden(
        request: Request, follow: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        try:
            response = await follow(request)
        except Exception as error:
            response = unknown(request, error)
        response.headers["Cache-Control"] = "no-store"
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["X-Request-Id"] = request_id(request)
        return response

    @app.get("/healthz")
    async def healthz() -> dict[str, object]:
        return {
            "status": "ok",
            "realm": broker.instance.realm.value,
            "unsafe": list(broker.unsafe),
        }

    return app


def request_id(request: Request) -> str:
    """Id of this request, made at its first use; audit rows and answers name it."""
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


def error_answer(request: Request, error: CaiError, *, unauthenticated: str) -> Response:
    """An error of ours on the wire."""
    kind = next((name for cls, name in _KINDS if isinstance(error, cls)), "PluginInternalError")
    kind = _KIND_OF_CODE.get(error.machine_code, kind)
    if isinstance(error, Unauthenticated):
        kind = unauthenticated
    # A row that does not authenticate is this service's trouble, not the caller's.
    status = 500 if isinstance(error, Tampered) else error.http_status
    if status >= 500:
        LOG.error("request %s: %s", request_id(request), error.message)
    information = ErrorInformation(kind, error.message[:MAX_DETAIL])
    return _answer(status, information, request, code=error.machine_code, hint=error.hint)


def json_answer(value: object, *, status: int = 200) -> Response:
    """A JSON answer."""
    return Response(json.dumps(value, separators=(",", ":")), status, media_type="application/json")


def _answer(
    status: int,
    information: ErrorInformation,
    request: Request,
    *,
    code: str = "",
    hint: str | None = None,
) -> Response:
    body: dict[str, str] = {**information.to_json(), "request": request_id(request)}
    # Readers of Trustee's two members ignore ours.
    if code:
        body["code"] = code
    if hint:
        body["hint"] = hint
    return json_answer(body, status=status)
