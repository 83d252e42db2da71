"""The audit log on the admin listener, for those who may read it."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response
from starlette.concurrency import run_in_threadpool

from cai import jcs
from cai.errors import FormatError
from kbs.admin.changes import Role
from kbs.admin.office import Office
from kbs.audit.log import MAX_ROWS, read_leaves


def add_routes(app: FastAPI, office: Office) -> None:
    """Add the routes of this module to the admin listener."""

    @app.get("/kbs/v0/audit")
    async def audit(request: Request) -> Response:
        await office.identify(request, Role.AUDITOR)
        start = _number(request, "from", 0, most=jcs.MAX_INTEGER)
        limit = _number(request, "limit", MAX_ROWS, most=MAX_ROWS)
        size, leaves = await run_in_threadpool(
            read_leaves, office.core.database, start=start, limit=limit
        )
        # The leaves as they are: a reader hashes exactly these canonical bytes.
        body = b'{"size":%d,"rows":[%s]}' % (size, b",".join(leaves))
        return Response(body, media_type="application/json")


def _number(request: Request, name: str, default: int, *, most: int) -> int:
    text = request.query_params.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 16 and int(text) <= most):
        raise FormatError(f"{name} must be a whole number of at most {most}")
    return int(text)
