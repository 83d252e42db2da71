"""Proposals on the admin listener: shown, approved, rejected."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response
from starlette.concurrency import run_in_threadpool

from cai import jcs
from cai.errors import FormatError, InputMissing
from kbs.admin.changes import Role
from kbs.admin.office import Office
from kbs.admin.proposal_store import Proposals
from kbs.server.answers import json_answer, read_body, request_id

MAX_APPROVAL = 1024
"""Longest body of an approval, bytes."""


def add_routes(app: FastAPI, office: Office) -> None:
    """Add the routes of this module to the admin listener."""

    @app.get("/kbs/v0/proposal")
    async def proposals(request: Request) -> Response:
        admin = await office.identify(request, *Role)
        found = await run_in_threadpool(_open(office).all, admin)
        return json_answer({"proposals": found})

    @app.get("/kbs/v0/proposal/{identifier}")
    async def proposal(request: Request, identifier: str) -> Response:
        admin = await office.identify(request, *Role)
        return json_answer(await run_in_threadpool(_open(office).one, identifier, admin))

    @app.post("/kbs/v0/proposal/{identifier}/approve")
    async def approve(request: Request, identifier: str) -> Response:
        admin = await office.identify(request, *Role)
        signature = _signature(await read_body(request, limit=MAX_APPROVAL))
        answer = await run_in_threadpool(
            _open(office).approve, identifier, signature, admin, request_id(request)
        )
        return json_answer(answer)

    @app.post("/kbs/v0/proposal/{identifier}/reject")
    async def reject(request: Request, identifier: str) -> Response:
        admin = await office.identify(request, *Role)
        answer = await run_in_threadpool(
            _open(office).reject, identifier, admin, request_id(request)
        )
        return json_answer(answer)


def _open(office: Office) -> Proposals:
    if office.proposals is None:
        raise InputMissing(
            "this broker has no two-person rule", hint="set [admin.two_person] in its settings"
        )
    return office.proposals


def _signature(body: bytes) -> str:
    value = jcs.parse(body, what="approval", limit=MAX_APPROVAL)
    signature = value.get("signature") if isinstance(value, dict) else None
    if (
        not isinstance(signature, str)
        or len(signature) != 128
        or not set(signature) <= set("0123456789abcdef")
    ):
        raise FormatError('approval: expected {"signature": "<128 hex digits>"}')
    return signature
