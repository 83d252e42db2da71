"""The admin listener: resources, policies and the audit log, for the broker's owner.

Nothing here is reachable through the main listener, and every route asks for the admin token before
it reads a body.
"""

from __future__ import annotations

from fastapi import FastAPI, Request, Response
from starlette.concurrency import run_in_threadpool

from cai import jcs
from cai.attest.jwk import b64u_decode, b64u_encode
from cai.attest.rcar import MAX_MESSAGE
from cai.errors import FormatError, InputMissing
from kbs.administration import MAX_RESOURCE
from kbs.audit import MAX_ROWS
from kbs.broker import KeyBroker
from kbs.http import json_answer, new_app, read_body, request_id
from kbs.policy_rows import RELEASE_POLICY, VERIFICATION_POLICY

POLICY_ROUTES = {"resource-policy": RELEASE_POLICY, "verification-policy": VERIFICATION_POLICY}
"""Route names of the policies."""


def admin_app(broker: KeyBroker) -> FastAPI:
    """The application of the admin listener."""
    app = new_app(broker, unauthenticated="AdminAuthAccess")
    office = broker.administration

    async def admin(request: Request) -> str:
        return await run_in_threadpool(
            office.authenticate, request.headers.get("authorization")
        )

    @app.post("/kbs/v0/resource/{path:path}")
    async def set_resource(request: Request, path: str) -> Response:
        name = await admin(request)
        body = await read_body(request, limit=MAX_RESOURCE)
        version = await run_in_threadpool(
            office.set_resource, path, body, admin=name, request=request_id(request)
        )
        return json_answer({"version": version})

    @app.post("/kbs/v0/{route}")
    async def set_policy(request: Request, route: str) -> Response:
        name = await admin(request)
        kind = _kind(route)
        text = _policy_text(await read_body(request))
        digest = await run_in_threadpool(
            office.set_policy, kind, text, admin=name, request=request_id(request)
        )
        return json_answer({"sha256": digest})

    @app.get("/kbs/v0/audit")
    async def audit(request: Request) -> Response:
        await admin(request)
        start = _number(request, "from", 0, most=jcs.MAX_INTEGER)
        limit = _number(request, "limit", MAX_ROWS, most=MAX_ROWS)
        size, leaves = await run_in_threadpool(office.audit_leaves, start=start, limit=limit)
        # The leaves as they are: a reader hashes exactly these canonical bytes.
        body = b'{"size":%d,"rows":[%s]}' % (size, b",".join(leaves))
        return Response(body, media_type="application/json")

    @app.get("/kbs/v0/{route}")
    async def get_policy(request: Request, route: str) -> Response:
        await admin(request)
        text = await run_in_threadpool(office.policy_text, _kind(route))
        if text is None:
            raise InputMissing(f"no {route} is set", hint="kbs policy set")
        return json_answer({"policy": b64u_encode(text)})

    return app


def _kind(route: str) -> str:
    if route not in POLICY_ROUTES:
        raise InputMissing(f"/kbs/v0/{route[:64]} is not served here")
    return POLICY_ROUTES[route]


def _policy_text(body: bytes) -> bytes:
    value = jcs.parse(body, what="policy message", limit=MAX_MESSAGE)
    text = value.get("policy") if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise FormatError('policy message: expected {"policy": "<base64url>"}')
    # Trustee's clients write no padding; some others do.
    return b64u_decode(text.rstrip("="), what="policy")


def _number(request: Request, name: str, default: int, *, most: int) -> int:
    text = request.query_params.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 16 and int(text) <= most):
        raise FormatError(f"{name} must be a whole number of at most {most}")
    return int(text)

