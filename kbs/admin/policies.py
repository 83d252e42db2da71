"""Administration of policies: kinds of change, and their routes."""

from __future__ import annotations

from hashlib import sha256

from fastapi import FastAPI, Request, Response
from sqlalchemy import Connection
from starlette.concurrency import run_in_threadpool

from cai import jcs
from cai.attest.jwk import b64u_decode, b64u_encode
from cai.attest.rcar import MAX_MESSAGE
from cai.errors import FormatError, InputMissing
from kbs.admin.changes import Applied, ChangeKind, Role
from kbs.admin.office import Office
from kbs.core import Core
from kbs.policy.rows import RELEASE_POLICY, VERIFICATION_POLICY, checked_digest
from kbs.server.answers import json_answer, read_body, request_id

POLICY_ROUTES = {"resource-policy": RELEASE_POLICY, "verification-policy": VERIFICATION_POLICY}
"""Route names of the policies."""


def _check(_core: Core, kind: str, text: bytes) -> None:
    checked_digest(kind, text)


def _set(core: Core, connection: Connection, kind: str, text: bytes) -> Applied:
    digest = sha256(text).hexdigest()
    change = core.policies.put(connection, kind, text)
    return Applied(change, {"sha256": digest}, policies={kind: digest})


POLICY_SET = ChangeKind("policy.set", Role.POLICY, _check, _set)
"""Store a policy; the object is its kind, the contents its exact bytes."""

KINDS = (POLICY_SET,)
"""Every kind of change of this module."""


def add_routes(app: FastAPI, office: Office) -> None:
    """Add the routes of this module to the admin listener."""

    @app.post("/kbs/v0/{route}")
    async def set_policy(request: Request, route: str) -> Response:
        admin = await office.identify(request, Role.POLICY)
        kind = _kind(route)
        text = _policy_text(await read_body(request))
        answer = await run_in_threadpool(
            office.submit, POLICY_SET, kind, text, admin=admin, request=request_id(request)
        )
        return json_answer(answer)

    @app.get("/kbs/v0/{route}")
    async def get_policy(request: Request, route: str) -> Response:
        await office.identify(request, Role.POLICY, Role.AUDITOR)
        text = await run_in_threadpool(_text, office.core, _kind(route))
        if text is None:
            raise InputMissing(f"no {route} is set", hint="kbs policy set")
        return json_answer({"policy": b64u_encode(text)})


def _text(core: Core, kind: str) -> bytes | None:
    with core.database.read() as connection:
        stored = core.policies.get(connection, kind)
    return None if stored is None else stored.contents


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
