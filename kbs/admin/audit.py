"""The audit log on the admin listener, for those who may read all of it."""

from __future__ import annotations

import threading
from typing import Any

from fastapi import FastAPI, Request, Response
from sqlalchemy import select
from starlette.concurrency import run_in_threadpool

from cai import jcs
from cai.attest.checkpoint import MAX_NOTE
from cai.errors import FormatError, InputMissing, Unavailable
from kbs.admin.changes import Role
from kbs.admin.office import Office
from kbs.audit import tree
from kbs.audit.leaf import parse_leaf
from kbs.audit.log import MAX_ROWS, node_hashes, read_head, read_leaves
from kbs.core import Core
from kbs.database.tables import AUDIT_CHECKPOINT
from kbs.server.answers import json_answer, read_body, request_id

MAX_CHECKPOINTS = 1000
"""Most checkpoints in one answer."""

_WALKING = threading.Lock()
"""One walk at a time; each reads the whole database."""


def add_routes(app: FastAPI, office: Office) -> None:
    """Add the routes of this module to the admin listener."""
    core = office.core

    async def identify(request: Request) -> None:
        admin = await office.identify(request, Role.AUDITOR)
        # Leaves name every tenant's resources and guests.
        admin.require_tenant("")

    @app.get("/kbs/v0/audit")
    async def audit(request: Request) -> Response:
        await identify(request)
        start = _number(request, "from", 0, most=jcs.MAX_INTEGER)
        limit = _number(request, "limit", MAX_ROWS, most=MAX_ROWS)
        size, leaves = await run_in_threadpool(
            read_leaves, core.database, start=start, limit=limit
        )
        # The leaves as they are: a reader hashes exactly these canonical bytes.
        body = b'{"size":%d,"rows":[%s]}' % (size, b",".join(leaves))
        return Response(body, media_type="application/json")

    @app.get("/kbs/v0/audit/checkpoint")
    async def checkpoint(request: Request) -> Response:
        await identify(request)
        return json_answer(await run_in_threadpool(_checkpoint, core))

    @app.get("/kbs/v0/audit/checkpoints")
    async def checkpoints(request: Request) -> Response:
        await identify(request)
        start = _number(request, "from", 0, most=jcs.MAX_INTEGER)
        return json_answer(await run_in_threadpool(_checkpoints, core, start))

    @app.get("/kbs/v0/audit/proof")
    async def proof(request: Request) -> Response:
        await identify(request)
        seq = _number(request, "seq", -1, most=jcs.MAX_INTEGER)
        size = _number(request, "size", -1, most=jcs.MAX_INTEGER)
        return json_answer(await run_in_threadpool(_proof, core, seq, size))

    @app.get("/kbs/v0/audit/consistency")
    async def consistency(request: Request) -> Response:
        await identify(request)
        old = _number(request, "old", -1, most=jcs.MAX_INTEGER)
        new = _number(request, "new", -1, most=jcs.MAX_INTEGER)
        path = await run_in_threadpool(core.checkpoints.consistency, old, new)
        return json_answer({"path": [step.hex() for step in path]})

    @app.get("/kbs/v0/audit/frontier")
    async def frontier(request: Request) -> Response:
        await identify(request)
        size = _number(request, "size", 0, most=jcs.MAX_INTEGER)
        return json_answer(await run_in_threadpool(_frontier, core, size))

    @app.post("/kbs/v0/audit/verify")
    async def verify(request: Request) -> Response:
        await identify(request)
        held = await read_body(request, limit=MAX_NOTE)
        opening = request.query_params.get("open", "true") != "false"
        return json_answer(
            await run_in_threadpool(_verify, core, held, opening, request_id(request))
        )


def _checkpoint(core: Core) -> dict[str, Any]:
    note = core.checkpoints.latest()
    return {
        "checkpoint": note.decode("utf-8"),
        "keys": [key.hex() for key in core.checkpoints.public_keys()],
        "instance": core.instance.id,
        "realm": core.instance.realm.value,
    }


def _checkpoints(core: Core, start: int) -> dict[str, Any]:
    with core.database.read() as connection:
        notes = connection.execute(
            select(AUDIT_CHECKPOINT.c.note)
            .where(AUDIT_CHECKPOINT.c.size > start)
            .order_by(AUDIT_CHECKPOINT.c.size, AUDIT_CHECKPOINT.c.origin)
            .limit(MAX_CHECKPOINTS)
        ).scalars()
        return {"checkpoints": [bytes(note).decode("utf-8", "replace") for note in notes]}


def _proof(core: Core, seq: int, size: int) -> dict[str, Any]:
    proof = core.checkpoints.inclusion(seq, None if size < 0 else size)
    _, leaves = read_leaves(core.database, start=seq, limit=1)
    if not leaves:
        raise InputMissing(f"the audit log has no leaf {seq}")
    return {"leaf": parse_leaf(bytes(leaves[0])), "proof": proof.to_json()}


def _frontier(core: Core, size: int) -> dict[str, Any]:
    with core.database.read() as connection:
        head = read_head(connection)
        if size > head.size:
            raise InputMissing(f"the audit log has {head.size} leaves")
        nodes = tree.cover((0, size))
        hashes = node_hashes(connection, nodes)
        origin = connection.execute(
            select(AUDIT_CHECKPOINT.c.origin)
            .where(AUDIT_CHECKPOINT.c.size > size)
            .order_by(AUDIT_CHECKPOINT.c.size)
            .limit(1)
        ).scalar()
        return {
            "frontier": [hashes[node].hex() for node in nodes],
            "origin": origin or core.checkpoints.origin(head),
        }


def _verify(core: Core, held: bytes, opening: bool, request: str) -> dict[str, Any]:  # noqa: FBT001
    from kbs.logged import verify_log

    if not _WALKING.acquire(blocking=False):
        raise Unavailable("the audit log is being verified already", hint="try again in a while")
    try:
        verdict = verify_log(core, held=held or None, opening=opening)
    finally:
        _WALKING.release()
    return {**verdict.to_json(), "request": request}


def _number(request: Request, name: str, default: int, *, most: int) -> int:
    text = request.query_params.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 16 and int(text) <= most):
        raise FormatError(f"{name} must be a whole number of at most {most}")
    return int(text)
