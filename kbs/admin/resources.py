"""Administration of resources: kinds of change, and their routes."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response
from sqlalchemy import Connection
from starlette.concurrency import run_in_threadpool

from cai.errors import FormatError, LimitExceeded
from kbs.admin.changes import Applied, ChangeKind, Role
from kbs.admin.office import Office
from kbs.core import Core
from kbs.names import ResourceName
from kbs.server.answers import json_answer, read_body, request_id

MAX_RESOURCE = 1024 * 1024
"""Largest resource, bytes."""


def _check_set(_core: Core, path: str, contents: bytes) -> None:
    ResourceName.parse(path)
    if not contents:
        raise FormatError("a resource must not be empty")
    if len(contents) > MAX_RESOURCE:
        raise LimitExceeded(
            f"resource of {len(contents)} bytes, at most {MAX_RESOURCE} are stored"
        )


def _set(core: Core, connection: Connection, path: str, contents: bytes) -> Applied:
    change = core.resources.put(connection, ResourceName.parse(path).path, contents)
    return Applied(change, {"version": change.version})


RESOURCE_SET = ChangeKind("resource.set", Role.RESOURCE, _check_set, _set)
"""Store the next version of a resource; the object is its path, the contents its bytes."""

KINDS = (RESOURCE_SET,)
"""Every kind of change of this module."""


def add_routes(app: FastAPI, office: Office) -> None:
    """Add the routes of this module to the admin listener."""

    @app.post("/kbs/v0/resource/{path:path}")
    async def set_resource(request: Request, path: str) -> Response:
        admin = await office.identify(request, Role.RESOURCE)
        body = await read_body(request, limit=MAX_RESOURCE)
        answer = await run_in_threadpool(
            office.submit, RESOURCE_SET, path, body, admin=admin, request=request_id(request)
        )
        return json_answer(answer)
