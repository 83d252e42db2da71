"""Administration of resources: kinds of change, and their routes. Contents never come back."""

from __future__ import annotations

import os
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from sqlalchemy import Connection
from starlette.concurrency import run_in_threadpool

from cai import jcs
from cai.errors import FormatError, LimitExceeded, Refused
from kbs.admin.changes import Applied, ChangeKind, Outdated, Role, first_segment
from kbs.admin.office import Administrator, Office
from kbs.core import Core
from kbs.names import ResourceName
from kbs.resources.listing import MAX_LISTED, list_resources, resource_info
from kbs.resources.retention import sweep
from kbs.resources.rows import LeaseRule
from kbs.resources.store import Prepared, Stale
from kbs.server.answers import json_answer, read_body, request_id

MAX_ORDER: Final = 4096
"""Largest body of a call that names no contents, bytes."""

NEW_BYTES: Final = 32
"""Length of a generated key unless told otherwise, bytes."""

MAX_NEW_BYTES: Final = 1024
"""Longest generated key, bytes."""

_FORMS: Final = ("raw", "hex")


def _check_path(path: str) -> None:
    if ResourceName.parse(path).path != path:
        raise FormatError(f"{path[:64]!r} is not a resource's path")


def _order(contents: bytes, **known: type) -> dict[str, Any]:
    """The canonical JSON object that asks for something; every member is optional."""
    value = jcs.parse_canonical(contents, what="order", limit=MAX_ORDER) if contents else {}
    if not isinstance(value, dict):
        raise FormatError("order: expected an object")
    for name, item in value.items():
        if name not in known or type(item) is not known[name]:
            raise FormatError(f"order: member {name[:32]!r} is unknown or of another kind")
    return value


def _put(core: Core, connection: Connection, _path: str, prepared: Prepared) -> Applied:
    try:
        change = core.resources.put(connection, prepared)
    except Stale as error:
        raise Outdated(error.message) from error
    lease = prepared.stored.identity.lease.value
    return Applied(change, {"version": change.version}, {"lease": lease})


# Setting.


def _check_set(core: Core, path: str, contents: bytes) -> None:
    _check_path(path)
    core.resources.require_storable(path, len(contents))


def _prepare_set(core: Core, path: str, contents: bytes) -> Prepared:
    return core.resources.prepare(path, contents)


RESOURCE_SET = ChangeKind(
    "resource.set", Role.RESOURCE, _check_set, _put, prepare=_prepare_set, tenant=first_segment
)
"""Store the next version of a resource; the object is its path, the contents its bytes."""


# Generating.


def _check_new(core: Core, path: str, contents: bytes) -> None:
    _check_path(path)
    size, form, _, _ = _new_order(contents)
    core.resources.require_storable(path, 2 * size if form == "hex" else size)


def _new_order(contents: bytes) -> tuple[int, str, LeaseRule | None, bool]:
    order = _order(contents, bytes=int, form=str, lease=str, replace=bool)
    size, form, lease = order.get("bytes", NEW_BYTES), order.get("form", "raw"), order.get("lease")
    if not 16 <= size <= MAX_NEW_BYTES:
        raise FormatError(f"a generated key has 16 to {MAX_NEW_BYTES} bytes, not {size}")
    if form not in _FORMS:
        raise FormatError(f"the form of a generated key is one of {', '.join(_FORMS)}")
    return size, form, None if lease is None else _lease(lease), order.get("replace", False)


def _lease(text: str) -> LeaseRule:
    try:
        return LeaseRule(text)
    except ValueError as error:
        raise FormatError("lease is required or optional") from error


def _prepare_new(core: Core, path: str, contents: bytes) -> Prepared:
    size, form, lease, replace = _new_order(contents)
    if not replace:
        with core.database.read() as connection:
            if core.resources.sealed(connection, path) is not None:
                raise Refused(
                    f"resource {path} exists", hint="a new key would replace it; say so"
                )
    key = os.urandom(size)
    return core.resources.prepare(path, key.hex().encode() if form == "hex" else key, lease=lease)


RESOURCE_NEW = ChangeKind(
    "resource.new", Role.RESOURCE, _check_new, _put, visible=True, prepare=_prepare_new,
    tenant=first_segment,
)  # fmt: skip
"""Generate a key that no person ever sees; the contents say how long it is and in which form."""


# Changing the lease rule; bringing back.


def _check_lease(_core: Core, path: str, contents: bytes) -> None:
    _check_path(path)
    _lease(contents[:16].decode("ascii", "replace"))


def _prepare_lease(core: Core, path: str, contents: bytes) -> Prepared:
    with core.database.read() as connection:
        living = core.resources.sealed(connection, path)
        version = 0 if living is None else living.version
    lease = _lease(contents.decode("ascii", "replace"))
    return core.resources.prepare_again(path, version, lease=lease)


RESOURCE_LEASE = ChangeKind(
    "resource.lease", Role.RESOURCE, _check_lease, _put, visible=True, prepare=_prepare_lease,
    tenant=first_segment,
)  # fmt: skip
"""Store the living version again with another lease rule, ``required`` or ``optional``."""


def _check_restore(_core: Core, path: str, contents: bytes) -> None:
    _check_path(path)
    _order(contents, version=int)


def _prepare_restore(core: Core, path: str, contents: bytes) -> Prepared:
    return core.resources.prepare_restore(path, _order(contents, version=int).get("version"))


RESOURCE_RESTORE = ChangeKind(
    "resource.restore", Role.RESOURCE, _check_restore, _put, visible=True,
    prepare=_prepare_restore, tenant=first_segment,
)  # fmt: skip
"""Store a deleted resource, or the version that the contents name, again as the next version."""


# Deleting.


def _check_delete(_core: Core, path: str, contents: bytes) -> None:
    _check_path(path)
    if contents:
        raise FormatError("to delete a resource there is nothing to send")


def _delete(core: Core, connection: Connection, path: str, _contents: bytes) -> Applied:
    change = core.resources.delete(connection, path)
    return Applied(change, {"version": change.version, "keep_days": _keep_days(core)})


RESOURCE_DELETE = ChangeKind(
    "resource.delete", Role.RESOURCE, _check_delete, _delete, reducing=True, visible=True,
    tenant=first_segment,
)  # fmt: skip
"""Delete a resource; it can be restored until its retention is over."""


def _check_purge(_core: Core, path: str, contents: bytes) -> None:
    _check_path(path)
    _order(contents, upto=int)


def _purge(core: Core, connection: Connection, path: str, contents: bytes) -> Applied:
    upto = _order(contents, upto=int).get("upto")
    if upto is None:
        upto = core.resources.newest_purgeable(connection, path)
    change = core.resources.purge(connection, path, upto)
    return Applied(change, {"upto": upto})


RESOURCE_PURGE = ChangeKind(
    "resource.purge", Role.RESOURCE, _check_purge, _purge, visible=True, tenant=first_segment
)
"""Destroy versions for good: all of a deleted resource, all old ones of a living one, or up to the
version that the contents name."""

KINDS = (
    RESOURCE_SET, RESOURCE_NEW, RESOURCE_LEASE, RESOURCE_RESTORE, RESOURCE_DELETE, RESOURCE_PURGE,
)  # fmt: skip
"""Every kind of change of this module."""

_ORDERS: Final = {
    "resource-new": RESOURCE_NEW,
    "resource-lease": RESOURCE_LEASE,
    "resource-restore": RESOURCE_RESTORE,
    "resource-purge": RESOURCE_PURGE,
}


def add_routes(app: FastAPI, office: Office) -> None:
    """Add the routes of this module to the admin listener."""

    async def submit(request: Request, kind: ChangeKind, path: str, limit: int) -> Response:
        admin = await office.identify(request, Role.RESOURCE)
        path = path.removeprefix("kbs:///")
        body = await read_body(request, limit=limit)
        answer = await run_in_threadpool(
            office.submit, kind, path, body, admin=admin, request=request_id(request)
        )
        return json_answer(answer)

    @app.post("/kbs/v0/resource/{path:path}")
    async def set_resource(request: Request, path: str) -> Response:
        limit = office.core.resources.settings.max_bytes
        return await submit(request, RESOURCE_SET, path, limit)

    @app.delete("/kbs/v0/resource/{path:path}")
    async def delete_resource(request: Request, path: str) -> Response:
        return await submit(request, RESOURCE_DELETE, path, 0)

    @app.get("/kbs/v0/resources")
    async def resources(request: Request) -> Response:
        admin = await office.identify(request, Role.RESOURCE, Role.AUDITOR)
        listed = await run_in_threadpool(_list, office.core, admin, request.query_params)
        # The fork's shape: an array, without what is deleted.
        return json_answer([item for item in listed if not item["deleted"]])

    @app.get("/kbs/v0/resource-info")
    async def listing(request: Request) -> Response:
        admin = await office.identify(request, Role.RESOURCE, Role.AUDITOR)
        listed = await run_in_threadpool(_list, office.core, admin, request.query_params)
        return json_answer({"resources": listed})

    @app.get("/kbs/v0/resource-info/{path:path}")
    async def info(request: Request, path: str) -> Response:
        admin = await office.identify(request, Role.RESOURCE, Role.AUDITOR)
        admin.require_tenant(first_segment(path))
        return json_answer(await run_in_threadpool(_info, office.core, path))

    @app.post("/kbs/v0/resource-purge")
    async def purge_due(request: Request) -> Response:
        admin = await office.identify(request, Role.RESOURCE)
        admin.require_tenant("")
        purged = await run_in_threadpool(
            sweep, office.core, actor=admin.actor, request=request_id(request)
        )
        return json_answer({"purged": purged})

    def add_order(route: str, kind: ChangeKind) -> None:
        @app.post(f"/kbs/v0/{route}/{{path:path}}")
        async def order(request: Request, path: str) -> Response:
            return await submit(request, kind, path, MAX_ORDER)

    for route, kind in _ORDERS.items():
        add_order(route, kind)


def _list(core: Core, admin: Administrator, query: Any) -> list[dict[str, Any]]:
    prefix, after = query.get("prefix", ""), query.get("after", "")
    if len(prefix) > MAX_ORDER or len(after) > MAX_ORDER:
        raise LimitExceeded("the query is too long")
    if admin.tenant and first_segment(prefix) != admin.tenant:
        if prefix:
            admin.require_tenant(first_segment(prefix))
        prefix = admin.tenant
    with core.database.read() as connection:
        found = list_resources(
            connection, core.resources, prefix=prefix, after=after, limit=MAX_LISTED
        )
    return [item.to_json() for item in found]


def _info(core: Core, path: str) -> dict[str, Any]:
    _check_path(path)
    with core.database.read() as connection:
        return resource_info(connection, core.resources, path)


def _keep_days(core: Core) -> int:
    return core.resources.settings.keep_days
