"""Administration of reference values: kinds of change, and their routes.

Bundles are signed by keys that an administrator registered; single values are an administrator's
own word. Trustee's message and its routes are read as well (docs/kbs-policies.md §5).
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from sqlalchemy import Connection
from starlette.concurrency import run_in_threadpool

from cai import jcs
from cai.errors import FormatError, Refused
from kbs.admin.changes import Applied, ChangeKind, Role
from kbs.admin.office import Administrator, Office
from kbs.core import Core
from kbs.policy.reference_store import (
    BUNDLE,
    KEY,
    VALUES,
    ReferenceName,
    default_expiry,
)
from kbs.policy.references import (
    MAX_BUNDLE,
    MAX_LIFE,
    TIME_FORMAT,
    Bundle,
    ReferenceKey,
    SignedBundle,
    checked_values,
    parse_message,
    parse_time,
    require_reference_id,
)
from kbs.server.answers import json_answer, read_body, request_id

MAX_BODY: Final = 2 * MAX_BUNDLE
"""Longest body that these routes read, bytes; base64 makes a bundle longer."""


def _name(path: str, *kinds: str) -> ReferenceName:
    name = ReferenceName.parse(path)
    if name.kind not in kinds:
        raise FormatError(f"{path[:64]!r} is changed another way")
    return name


def _tenant(path: str) -> str:
    return ReferenceName.parse(path).tenant


def _object(path: str) -> str:
    return f"reference/{path}"


def _check_key(_core: Core, path: str, pem: bytes) -> None:
    _name(path, KEY)
    ReferenceKey.parse(pem)


def _set_key(core: Core, connection: Connection, path: str, pem: bytes) -> Applied:
    key = ReferenceKey.parse(pem)
    change = core.references.put_key(connection, _name(path, KEY), pem)
    told = {"key": key.id, "kind": key.kind}
    return Applied(change, {**told, "version": change.version}, details=told)


def _check_bundle(core: Core, path: str, contents: bytes) -> None:
    name, signed = _name(path, BUNDLE), SignedBundle.parse(contents)
    with core.database.read() as connection:
        keys = core.references.keys(connection, tenant=name.tenant)
    signed.opened(keys)


def _set_bundle(core: Core, connection: Connection, path: str, contents: bytes) -> Applied:
    change, bundle, signer = core.references.put_bundle(
        connection, _name(path, BUNDLE), SignedBundle.parse(contents), now=core.clock()
    )
    told = {"signer": signer, "expires": bundle.expires.strftime(TIME_FORMAT)}
    return Applied(
        change, {**told, "version": change.version, "values": len(bundle.values)}, details=told
    )


def _check_values(core: Core, path: str, contents: bytes) -> None:
    _name(path, VALUES)
    _values_of(contents)
    if core.policy_settings.require_signed_references:
        raise Refused(
            "only signed bundles of reference values are taken here",
            hint="kbs reference add FILE --signature FILE.sig",
            code="reference-unsigned",
        )


def _set_values(core: Core, connection: Connection, path: str, contents: bytes) -> Applied:
    values, expires = _values_of(contents)
    now = core.clock()
    if expires is None:
        expires = default_expiry(now, core.policy_settings.reference_days)
    if not now < expires <= now + MAX_LIFE:
        raise Refused(
            f"reference values must expire in the future, within {MAX_LIFE.days} days",
            code="reference-expired",
        )
    tenant = _name(path, VALUES).tenant
    change = core.references.put_values(connection, tenant, values, expires=expires)
    told = {"values": sorted(values), "expires": expires.strftime(TIME_FORMAT)}
    return Applied(change, {**told, "version": change.version}, details=told)


def _check_removal(_core: Core, path: str, contents: bytes) -> None:
    _removed(_name(path, KEY, BUNDLE, VALUES), contents)


def _remove(core: Core, connection: Connection, path: str, contents: bytes) -> Applied:
    name = _name(path, KEY, BUNDLE, VALUES)
    items = _removed(name, contents)
    if items:
        change = core.references.remove_values(connection, name.tenant, items)
    else:
        change = core.references.remove(connection, name)
    return Applied(change, {"version": change.version}, details={"values": items})


def _removed(name: ReferenceName, contents: bytes) -> list[str]:
    """Ids of the single values to remove; none for a whole row."""
    if not contents:
        return []
    items = jcs.parse(contents, what="reference ids", limit=MAX_BUNDLE)
    if name.kind != VALUES or not isinstance(items, list) or not items:
        raise FormatError("reference ids: expected a list, for single values only")
    return [require_reference_id(str(item)) for item in items]


def _values_of(contents: bytes) -> tuple[dict[str, Any], datetime | None]:
    """``{"values": {id: value}, "expires": moment or null}``."""
    body = jcs.parse(contents, what="reference values", limit=MAX_BODY)
    if not isinstance(body, dict) or set(body) != {"values", "expires"}:
        raise FormatError("reference values: expected the members values and expires")
    expires = body["expires"]
    if expires is not None and not isinstance(expires, str):
        raise FormatError("reference values: expires must be a moment")
    return checked_values(body["values"]), None if expires is None else parse_time(expires)


KEY_SET = ChangeKind(
    "reference-key.set", Role.ADMIN, _check_key, _set_key, visible=True, tenant=_tenant,
    object_name=_object,
)  # fmt: skip
"""Register a key that may sign bundles; the contents are its PEM."""

KEY_REMOVE = ChangeKind(
    "reference-key.remove", Role.ADMIN, _check_removal, _remove, tenant=_tenant,
    object_name=_object,
)  # fmt: skip
"""Take a key away; what it signed is no longer in force."""

BUNDLE_SET = ChangeKind(
    "reference.set", Role.REFERENCE, _check_bundle, _set_bundle, visible=True, tenant=_tenant,
    object_name=_object,
)  # fmt: skip
"""Store a signed bundle."""

VALUES_SET = ChangeKind(
    "reference.values", Role.REFERENCE, _check_values, _set_values, visible=True, tenant=_tenant,
    object_name=_object,
)  # fmt: skip
"""Set single values."""

REFERENCE_REMOVE = ChangeKind(
    "reference.remove", Role.REFERENCE, _check_removal, _remove, visible=True, tenant=_tenant,
    object_name=_object,
)  # fmt: skip
"""Take a bundle or single values away. Not reducing: a policy may allow what it finds no value
for."""

KINDS = (KEY_SET, KEY_REMOVE, BUNDLE_SET, VALUES_SET, REFERENCE_REMOVE)
"""Every kind of change of this module."""


def add_routes(app: FastAPI, office: Office) -> None:
    """Add the routes of this module to the admin listener."""
    _add_own_routes(app, office)
    _add_stock_routes(app, office)


def _add_own_routes(app: FastAPI, office: Office) -> None:
    @app.get("/kbs/v0/references")
    async def list_references(request: Request, tenant: str = "") -> Response:
        admin = await office.identify(request, Role.REFERENCE, Role.POLICY, Role.AUDITOR)
        return json_answer(await run_in_threadpool(_listed, office.core, _seen(admin, tenant)))

    @app.post("/kbs/v0/reference-bundle/{name}")
    async def set_bundle(request: Request, name: str, tenant: str = "") -> Response:
        admin = await office.identify(request, Role.REFERENCE)
        body = await read_body(request, limit=MAX_BODY)
        path = f"{BUNDLE}/{tenant}/{name}"
        return await _submit(request, office, BUNDLE_SET, path, body, admin)

    @app.delete("/kbs/v0/reference-bundle/{name}")
    async def remove_bundle(request: Request, name: str, tenant: str = "") -> Response:
        admin = await office.identify(request, Role.REFERENCE)
        path = f"{BUNDLE}/{tenant}/{name}"
        return await _submit(request, office, REFERENCE_REMOVE, path, b"", admin)

    @app.post("/kbs/v0/reference-key/{name}")
    async def set_key(request: Request, name: str, tenant: str = "") -> Response:
        admin = await office.identify(request)
        pem = await read_body(request)
        return await _submit(request, office, KEY_SET, f"{KEY}/{tenant}/{name}", pem, admin)

    @app.delete("/kbs/v0/reference-key/{name}")
    async def remove_key(request: Request, name: str, tenant: str = "") -> Response:
        admin = await office.identify(request)
        return await _submit(request, office, KEY_REMOVE, f"{KEY}/{tenant}/{name}", b"", admin)

    @app.post("/kbs/v0/reference-values")
    async def set_values(request: Request, tenant: str = "") -> Response:
        admin = await office.identify(request, Role.REFERENCE)
        body = await read_body(request, limit=MAX_BODY)
        return await _submit(request, office, VALUES_SET, f"{VALUES}/{tenant}", body, admin)


def _add_stock_routes(app: FastAPI, office: Office) -> None:
    async def register(request: Request, tenant: str = "") -> Response:
        admin = await office.identify(request, Role.REFERENCE)
        values = parse_message(await read_body(request, limit=MAX_BODY))
        body = jcs.canonical({"values": values, "expires": None})
        return await _submit(request, office, VALUES_SET, f"{VALUES}/{tenant}", body, admin)

    async def remove_value(request: Request, name: str, tenant: str = "") -> Response:
        admin = await office.identify(request, Role.REFERENCE)
        body = jcs.canonical([require_reference_id(name)])
        return await _submit(request, office, REFERENCE_REMOVE, f"{VALUES}/{tenant}", body, admin)

    @app.get("/kbs/v0/reference-value/{name:path}")
    async def get_value(request: Request, name: str, tenant: str = "") -> Response:
        admin = await office.identify(request, Role.REFERENCE, Role.POLICY, Role.AUDITOR)
        return json_answer(
            await run_in_threadpool(_found, office.core, name, _seen(admin, tenant))
        )

    @app.get("/kbs/v0/rvps/query")
    async def query(request: Request, tenant: str = "") -> Response:
        admin = await office.identify(request, Role.REFERENCE, Role.POLICY, Role.AUDITOR)
        return json_answer(await run_in_threadpool(_in_force, office.core, _seen(admin, tenant)))

    app.post("/kbs/v0/reference-value")(register)
    app.post("/kbs/v0/rvps/register")(register)
    app.delete("/kbs/v0/reference-value/{name:path}")(remove_value)
    app.delete("/kbs/v0/rvps/delete/{name:path}")(remove_value)


async def _submit(
    request: Request, office: Office, kind: ChangeKind, path: str, contents: bytes,
    admin: Administrator,
) -> Response:  # fmt: skip
    ReferenceName.parse(path)
    answer = await run_in_threadpool(
        office.submit, kind, path, contents, admin=admin, request=request_id(request)
    )
    return json_answer(answer)


def _seen(admin: Administrator, tenant: str) -> str:
    """The tenant whose values are shown; an administrator of one tenant sees no other."""
    tenant = tenant or admin.tenant
    admin.require_tenant(tenant)
    return tenant


def _found(core: Core, name: str, tenant: str) -> Any:
    with core.database.read() as connection:
        return core.references.find(connection, name, now=core.clock(), tenant=tenant)


def _in_force(core: Core, tenant: str) -> dict[str, Any]:
    with core.database.read() as connection:
        return dict(core.references.current(connection, now=core.clock(), tenant=tenant).values)


def _listed(core: Core, tenant: str) -> dict[str, Any]:
    now = core.clock()
    with core.database.read() as connection:
        store = core.references
        keys = store.keys(connection, tenant=tenant)
        bundles = store.bundles(connection)
        listed = store.listed(connection, tenant=tenant)
    return {
        "keys": [
            {"tenant": name.tenant, "name": name.name, "kind": key.kind, "id": key.id}
            for name, key in ((ReferenceName.parse(path), key) for path, key in keys.items())
        ],
        "bundles": [
            _bundle_note(name, Bundle.parse(signed.bundle), now)
            for name, signed in bundles.items()
            if name.tenant in ("", tenant)
        ],
        "values": [
            {
                "tenant": owner, "id": name, "value": item.value, "source": item.source,
                "expires": item.expires.strftime(TIME_FORMAT), "expired": item.expires <= now,
            }
            for owner, values in listed.items()
            for name, item in sorted(values.items())
        ],
    }  # fmt: skip


def _bundle_note(name: ReferenceName, bundle: Bundle, now: datetime) -> dict[str, Any]:
    return {
        "tenant": name.tenant,
        "name": name.name,
        "issued": bundle.issued.strftime(TIME_FORMAT),
        "expires": bundle.expires.strftime(TIME_FORMAT),
        "expired": bundle.expires <= now,
        "values": len(bundle.values),
    }
