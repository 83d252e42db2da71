"""Administration of keys: rotation of the key provider and of the signing keys, and their state."""

from __future__ import annotations

from typing import Any, Final

from fastapi import FastAPI, Request, Response
from sqlalchemy import Connection
from starlette.concurrency import run_in_threadpool

from cai import jcs
from cai.errors import FormatError
from kbs.admin.changes import Applied, ChangeKind, Outdated, Role
from kbs.admin.office import Office
from kbs.core import Core
from kbs.keys.rowkey import OBJECT, row_key_state
from kbs.keys.signing import OVERLAP_SECONDS, KeyName, object_name, parse_key_name
from kbs.resources.rotation import Rewrapped, probe, wrapping_counts
from kbs.resources.store import Stale
from kbs.server.answers import json_answer, read_body, request_id

MAX_ORDER: Final = 4096
"""Largest body of a call, bytes."""

PROVIDER: Final = "provider"
"""Object id of the key provider in force."""


def _target(core: Core, contents: bytes) -> str:
    """Name of the provider to rotate to: the one that is named, else the configured default."""
    value = jcs.parse_canonical(contents, what="order", limit=MAX_ORDER) if contents else {}
    if not isinstance(value, dict) or set(value) - {"to"}:
        raise FormatError('order: expected {"to": NAME}')
    name = value.get("to", core.instance.keyring.default)
    if not isinstance(name, str):
        raise FormatError("order: to is not a name")
    return name


def _check_rotate(core: Core, object_id: str, contents: bytes) -> None:
    if object_id != PROVIDER:
        raise FormatError(f"there is nothing to rotate that is called {object_id[:64]!r}")
    core.instance.keyring.named(_target(core, contents))


def _prepare_rotate(core: Core, _object_id: str, contents: bytes) -> Rewrapped:
    return core.rotation.prepare(_target(core, contents))


def _rotate(core: Core, connection: Connection, _object_id: str, made: Rewrapped) -> Applied:
    try:
        change = core.rotation.apply(connection, made)
    except Stale as error:
        raise Outdated(error.message) from error
    told: dict[str, Any] = {
        "from": made.before.wrapped.provider,
        "to": made.after.wrapped.provider,
        "generation": made.after.generation,
        "data_keys": len(made.data_keys),
    }
    return Applied(change, told, told)


KEY_ROTATE = ChangeKind(
    "key.rotate", Role.ADMIN, _check_rotate, _rotate, visible=True, prepare=_prepare_rotate,
    object_name=lambda _object_id: OBJECT,
)  # fmt: skip
"""Wrap every key anew; the object is ``provider``, the contents name the provider to go to."""


def _check_signing(_core: Core, name: str, contents: bytes) -> None:
    parse_key_name(name)
    if contents:
        raise FormatError("to rotate a signing key there is nothing to send")


def _rotate_signing(core: Core, connection: Connection, name: str, _contents: bytes) -> Applied:
    key = parse_key_name(name)
    change = core.signing.rotate(connection, key, now=core.clock())
    told = {"name": key.value, "version": change.version, "overlap_s": OVERLAP_SECONDS[key]}
    return Applied(change, told)


KEY_ROTATE_SIGNING = ChangeKind(
    "key.rotate-signing", Role.ADMIN, _check_signing, _rotate_signing, visible=True,
    object_name=lambda name: object_name(parse_key_name(name)),
)  # fmt: skip
"""Make the next version of a signing key; the object is its name."""

KINDS = (KEY_ROTATE, KEY_ROTATE_SIGNING)
"""Every kind of change of this module."""


def add_routes(app: FastAPI, office: Office) -> None:
    """Add the routes of this module to the admin listener."""

    async def submit(request: Request, kind: ChangeKind, object_id: str) -> Response:
        admin = await office.identify(request, Role.ADMIN)
        body = await read_body(request, limit=MAX_ORDER)
        answer = await run_in_threadpool(
            office.submit, kind, object_id, body, admin=admin, request=request_id(request)
        )
        return json_answer(answer)

    @app.get("/kbs/v0/key")
    async def status(request: Request) -> Response:
        admin = await office.identify(request, Role.ADMIN, Role.AUDITOR)
        admin.require_tenant("")
        return json_answer(await run_in_threadpool(key_status, office.core))

    @app.post("/kbs/v0/key/rotate")
    async def rotate(request: Request) -> Response:
        answer = await submit(request, KEY_ROTATE, PROVIDER)
        office.core.rotation.finish()
        return answer

    @app.post("/kbs/v0/key/rotate-signing/{name}")
    async def rotate_signing(request: Request, name: str) -> Response:
        return await submit(request, KEY_ROTATE_SIGNING, name)


def key_status(core: Core) -> dict[str, Any]:
    """Which provider wraps what, whether each answers, and the signing keys; no key material."""
    keyring, now = core.instance.keyring, core.clock()
    with core.database.read() as connection:
        state = row_key_state(connection)
        counts = wrapping_counts(connection)
        signing = [
            {
                "name": key.name.value,
                "id": key.id,
                "created": int(key.created.timestamp()),
                "retired": None if key.retired is None else int(key.retired.timestamp()),
            }
            for name in KeyName
            for key in core.signing.living(connection, name, now)
        ]
    providers = [
        {
            "name": name,
            "id": provider_id,
            "in_force": provider_id == state.wrapped.provider,
            "keys": counts.pop(provider_id, 0),
            "trouble": probe(keyring, name),
        }
        for name, provider_id in keyring.names.items()
    ]
    return {
        "generation": state.generation,
        "default": keyring.default,
        "providers": providers,
        "unknown": [{"id": name, "keys": count} for name, count in counts.items()],
        "signing": signing,
    }
