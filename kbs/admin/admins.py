"""Administration of administrators: kinds of change, and their routes."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from sqlalchemy import Connection
from starlette.concurrency import run_in_threadpool

from cai import jcs
from cai.errors import FormatError
from kbs.admin.changes import Applied, ChangeKind, Role
from kbs.admin.office import Office
from kbs.admin.people import MAX_RECORD, NAME, AdminRecord, AdminStore
from kbs.admin.tokens import key_id
from kbs.core import Core
from kbs.server.answers import json_answer, read_body, request_id


def _check_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise FormatError(
            f"{name[:64]!r} does not name an administrator",
            hint="up to 64 of a-z, 0-9, '_', '.', '@', '-'",
        )


def _check_set(_core: Core, name: str, contents: bytes) -> None:
    _check_name(name)
    AdminRecord.parse(contents)


def _set(core: Core, connection: Connection, name: str, contents: bytes) -> Applied:
    record = AdminRecord.parse(contents)
    change = AdminStore(core).put(connection, name, record)
    return Applied(
        change,
        {"name": name, "version": change.version},
        # With the key in the log, signatures under proposals verify offline.
        {"key": record.key.public_bytes_raw().hex(), "roles": sorted(record.roles),
         "tenant": record.tenant, "expires": record.expires},
    )  # fmt: skip


def _check_remove(_core: Core, name: str, contents: bytes) -> None:
    _check_name(name)
    if contents:
        raise FormatError("admin.remove has no contents")


def _remove(core: Core, connection: Connection, name: str, _contents: bytes) -> Applied:
    change = AdminStore(core).remove(connection, name)
    return Applied(change, {"name": name, "version": change.version})


ADMIN_SET = ChangeKind("admin.set", Role.ADMIN, _check_set, _set, visible=True)
"""Add or replace an administrator; the object is the name, the contents an ``AdminRecord``."""

ADMIN_REMOVE = ChangeKind("admin.remove", Role.ADMIN, _check_remove, _remove, visible=True)
"""Remove an administrator; the object is the name. Not reducing: fewer persons can decide then."""

KINDS = (ADMIN_SET, ADMIN_REMOVE)
"""Every kind of change of this module."""


def add_routes(app: FastAPI, office: Office) -> None:
    """Add the routes of this module to the admin listener."""

    @app.get("/kbs/v0/whoami")
    async def whoami(request: Request) -> Response:
        admin = await office.identify(request, *Role)
        return json_answer(
            {
                "name": admin.name,
                "roles": sorted(admin.roles),
                "tenant": admin.tenant,
                "signs": admin.key is not None,
                "two_person": office.settings.two_person is not None,
            }
        )

    @app.get("/kbs/v0/admin")
    async def admins(request: Request) -> Response:
        admin = await office.identify(request, Role.AUDITOR)
        return json_answer({"admins": await run_in_threadpool(_listed, office.core, admin.tenant)})

    @app.post("/kbs/v0/admin/{name}")
    async def set_admin(request: Request, name: str) -> Response:
        admin = await office.identify(request, Role.ADMIN)
        body = await read_body(request, limit=MAX_RECORD)
        record = _record_from(body, added_by=admin.name)
        answer = await run_in_threadpool(
            office.submit, ADMIN_SET, name, record.encode(), admin=admin,
            request=request_id(request),
        )  # fmt: skip
        return json_answer(answer)

    @app.delete("/kbs/v0/admin/{name}")
    async def remove_admin(request: Request, name: str) -> Response:
        admin = await office.identify(request, Role.ADMIN)
        answer = await run_in_threadpool(
            office.submit, ADMIN_REMOVE, name, b"", admin=admin, request=request_id(request)
        )
        return json_answer(answer)


def _record_from(body: bytes, *, added_by: str) -> AdminRecord:
    value = jcs.parse(body, what="administrator", limit=MAX_RECORD)
    if not isinstance(value, dict) or not {"key", "roles"} <= set(value):
        raise FormatError('administrator: expected {"key", "roles", "tenant", "expires"}')
    whole = {"tenant": "", "expires": 0, **value, "added_by": added_by}
    return AdminRecord.parse(jcs.canonical(whole))


def _listed(core: Core, tenant: str) -> list[dict[str, Any]]:
    with core.database.read() as connection:
        records = AdminStore(core).all(connection)
    now = core.clock()
    return [
        {
            "name": name,
            "key": record.key.public_bytes_raw().hex(),
            "key_id": key_id(record.key),
            "roles": sorted(record.roles),
            "tenant": record.tenant,
            "expires": record.expires,
            "living": record.living(now),
            "added_by": record.added_by,
        }
        for name, record in records.items()
        if tenant in ("", record.tenant)
    ]
