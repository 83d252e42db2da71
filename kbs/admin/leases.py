"""Administration of leases and blocks: kinds of change, and their routes.

One authorised person may revoke; lifting a block is a change like any other (decisions §5).
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from sqlalchemy import Connection
from starlette.concurrency import run_in_threadpool

from cai import jcs
from cai.errors import FormatError
from kbs.admin.changes import Applied, ChangeKind, Role
from kbs.admin.office import Office
from kbs.core import Core
from kbs.release.lease import LeaseStore
from kbs.release.revocation import Block, BlockStore, Target, new_block
from kbs.server.answers import json_answer, read_body, request_id

MAX_BODY = 4096
"""Largest body of a revocation, bytes."""


NO_REASON = "no reason was given"
"""What is logged where a caller says none."""


def _target(object_id: str) -> Target:
    kind, slash, value = object_id.partition("/")
    if not slash:
        raise FormatError("a block is named <kind>/<value>")
    return Target.parse(kind, value)


def _reason(contents: bytes) -> str:
    if not contents:
        return NO_REASON
    value = jcs.parse(contents, what="revocation", limit=MAX_BODY)
    if not isinstance(value, dict) or set(value) != {"reason"}:
        raise FormatError('revocation: expected {"reason": "<why>"}')
    reason = value["reason"]
    if not isinstance(reason, str):
        raise FormatError("revocation: the reason is not text")
    return reason


def _object(object_id: str) -> str:
    return _target(object_id).object


def _check_set(core: Core, object_id: str, contents: bytes) -> None:
    new_block(_target(object_id), _reason(contents), core.clock())


def _set(core: Core, connection: Connection, object_id: str, contents: bytes) -> Applied:
    now = core.clock()
    block = new_block(_target(object_id), _reason(contents), now)
    change = BlockStore.of(core).put(connection, block)
    reached = LeaseStore.of(core).reached(connection, block.target, now=now)
    told = {
        "leases": len(reached),
        "last_ends": max((lease.ends for lease in reached), default=0),
    }
    details = {**block.to_json(), "leases": [lease.id for lease in reached]}
    return Applied(change, {**block.to_json(), **told}, details)


def _check_lift(_core: Core, object_id: str, contents: bytes) -> None:
    _target(object_id)
    _reason(contents)


def _lift(core: Core, connection: Connection, object_id: str, contents: bytes) -> Applied:
    target = _target(object_id)
    change = BlockStore.of(core).lift(connection, target)
    named = {"kind": target.kind.value, "value": target.value}
    return Applied(change, named, {**named, "reason": _reason(contents)})


BLOCK_SET = ChangeKind(
    "block.set", Role.RESOURCE, _check_set, _set, reducing=True, visible=True, object_name=_object
)
"""Revoke; the object is ``<kind>/<value>``, the contents say why."""

BLOCK_LIFT = ChangeKind(
    "block.lift", Role.ADMIN, _check_lift, _lift, visible=True, object_name=_object
)
"""Take a block away; the object is ``<kind>/<value>``, the contents say why."""

KINDS = (BLOCK_SET, BLOCK_LIFT)
"""Every kind of change of this module."""


def add_routes(app: FastAPI, office: Office) -> None:
    """Add the routes of this module to the admin listener."""

    @app.get("/kbs/v0/lease")
    async def list_leases(request: Request) -> Response:
        await office.identify(request, Role.RESOURCE, Role.AUDITOR)
        return json_answer(await run_in_threadpool(_leases, office.core))

    @app.get("/kbs/v0/block")
    async def list_blocks(request: Request) -> Response:
        await office.identify(request, Role.RESOURCE, Role.AUDITOR)
        blocks = await run_in_threadpool(_blocks, office.core)
        return json_answer({"blocks": [block.to_json() for block in blocks]})

    @app.post("/kbs/v0/block/{kind}/{value:path}")
    async def revoke(request: Request, kind: str, value: str) -> Response:
        return await _submit(request, BLOCK_SET, f"{kind}/{value}", office)

    @app.delete("/kbs/v0/block/{kind}/{value:path}")
    async def unrevoke(request: Request, kind: str, value: str) -> Response:
        return await _submit(request, BLOCK_LIFT, f"{kind}/{value}", office)


async def _submit(request: Request, kind: ChangeKind, object_id: str, office: Office) -> Response:
    admin = await office.identify(request, kind.role)
    body = await read_body(request, limit=MAX_BODY)
    answer = await run_in_threadpool(
        office.submit, kind, object_id, body, admin=admin, request=request_id(request)
    )
    return json_answer(answer)


def _leases(core: Core) -> dict[str, Any]:
    now = core.clock()
    with core.database.read() as connection:
        leases = LeaseStore.of(core).listed(connection)
        blocks = BlockStore.of(core).all(connection)
    blocked = {block.target: block for block in blocks}
    rows = []
    for lease in leases:
        ended = [str(target) for target in lease.targets if target in blocked]
        state = "ended" if lease.ends <= now.timestamp() else "draining"
        if lease.expires > now.timestamp():
            state = "revoked" if ended else "living"
        rows.append(
            lease.to_json()
            | {"expires": lease.expires, "ends": lease.ends, "state": state, "revoked_by": ended}
        )
    return {"now": int(now.timestamp()), "leases": rows}


def _blocks(core: Core) -> list[Block]:
    with core.database.read() as connection:
        return BlockStore.of(core).all(connection)
