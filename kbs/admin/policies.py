"""Administration of policies: kinds of change, and their routes.

Our own routes name a policy by its path (``policy/resource/models``); Trustee's and its fork's
routes are there too, for the clients that people have (docs/kbs-policies.md §6).
"""

from __future__ import annotations

from hashlib import sha256
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from sqlalchemy import Connection
from starlette.concurrency import run_in_threadpool

from cai import jcs
from cai.attest.jwk import b64u_decode, b64u_encode
from cai.attest.rcar import MAX_MESSAGE
from cai.errors import FormatError, InputMissing
from kbs.admin.changes import Applied, ChangeKind, Role
from kbs.admin.office import Administrator, Office
from kbs.core import Core
from kbs.policy.names import DEFAULT_ID, PolicyKind, PolicyName, TeeClass
from kbs.policy.store import check_policy
from kbs.server.answers import json_answer, read_body, request_id

TRUSTEE_ID: Final = "resource-policy"
"""What Trustee calls its one resource policy."""

EVERYBODYS: Final = PolicyName(PolicyKind.RESOURCE, "")
"""The resource policy where no more special one is set."""

DEFAULT_VERIFICATION: Final = PolicyName(PolicyKind.VERIFICATION, DEFAULT_ID)
"""The ``policy.toml`` of resources that are bound to nothing else."""


def _check_set(core: Core, path: str, text: bytes) -> None:
    check_policy(PolicyName.parse(path), text, core.rego)


def _set(core: Core, connection: Connection, path: str, text: bytes) -> Applied:
    digest = sha256(text).hexdigest()
    name = PolicyName.parse(path)
    change = core.policies.put(connection, name, text)
    return Applied(
        change, {"sha256": digest, "version": change.version}, policies={name.path: digest}
    )


def _check_remove(_core: Core, path: str, contents: bytes) -> None:
    PolicyName.parse(path)
    if contents:
        raise FormatError("a policy is removed without contents")


def _remove(core: Core, connection: Connection, path: str, _contents: bytes) -> Applied:
    change = core.policies.remove(connection, PolicyName.parse(path))
    return Applied(change, {"version": change.version})


def _tenant(path: str) -> str:
    return PolicyName.parse(path).tenant


POLICY_SET = ChangeKind("policy.set", Role.POLICY, _check_set, _set, visible=True, tenant=_tenant)
"""Store the next version of a policy; the object is its path, the contents its exact bytes."""

POLICY_REMOVE = ChangeKind("policy.remove", Role.POLICY, _check_remove, _remove, tenant=_tenant)
"""Take a policy away. Not reducing: a more general one may then apply, and allow more."""

KINDS = (POLICY_SET, POLICY_REMOVE)
"""Every kind of change of this module."""


def add_routes(app: FastAPI, office: Office) -> None:
    """Add the routes of this module to the admin listener."""
    _add_own_routes(app, office)
    _add_stock_routes(app, office)


def _add_own_routes(app: FastAPI, office: Office) -> None:
    @app.get("/kbs/v0/policies")
    async def list_policies(request: Request) -> Response:
        admin = await office.identify(request, Role.POLICY, Role.AUDITOR)
        listed = await run_in_threadpool(_listed, office.core, admin.tenant)
        return json_answer({"policies": listed})

    @app.get("/kbs/v0/policy-versions/{path:path}")
    async def versions(request: Request, path: str) -> Response:
        admin = await office.identify(request, Role.POLICY, Role.AUDITOR)
        name = _seen(admin, PolicyName.parse(path))
        return json_answer({"versions": await run_in_threadpool(_versions, office.core, name)})

    @app.get("/kbs/v0/policy/{path:path}")
    async def get_policy(request: Request, path: str, version: int | None = None) -> Response:
        admin = await office.identify(request, Role.POLICY, Role.AUDITOR)
        name = _seen(admin, PolicyName.parse(path))
        return json_answer(await run_in_threadpool(_shown, office.core, name, version))

    @app.post("/kbs/v0/policy/{path:path}")
    async def set_policy(request: Request, path: str) -> Response:
        return await _submit_text(request, office, PolicyName.parse(path))

    @app.delete("/kbs/v0/policy/{path:path}")
    async def remove_policy(request: Request, path: str) -> Response:
        return await _submit_removal(request, office, PolicyName.parse(path))


def _add_stock_routes(app: FastAPI, office: Office) -> None:
    @app.post("/kbs/v0/resource-policy")
    async def set_resource_policy(request: Request) -> Response:
        return await _submit_text(request, office, EVERYBODYS)

    @app.get("/kbs/v0/resource-policy")
    async def resource_policy_ids(request: Request) -> Response:
        admin = await office.identify(request, Role.POLICY, Role.AUDITOR)
        return json_answer(await run_in_threadpool(_resource_policy_ids, office.core, admin.tenant))

    @app.post("/kbs/v0/verification-policy")
    async def set_verification(request: Request) -> Response:
        return await _submit_text(request, office, DEFAULT_VERIFICATION)

    @app.get("/kbs/v0/verification-policy")
    async def get_verification(request: Request) -> Response:
        await office.identify(request, Role.POLICY, Role.AUDITOR)
        return json_answer(
            await run_in_threadpool(_shown, office.core, DEFAULT_VERIFICATION, None)
        )

    @app.post("/kbs/v0/attestation-policy")
    async def set_attestation(request: Request) -> Response:
        admin = await office.identify(request, Role.POLICY)
        body = _message(await read_body(request))
        policy_id = body.get("policy_id")
        if not isinstance(policy_id, str):
            raise FormatError("policy message: policy_id is missing")
        name = _attestation(policy_id)
        answer = await run_in_threadpool(
            office.submit, POLICY_SET, name.path, _text(body), admin=admin,
            request=request_id(request),
        )  # fmt: skip
        return json_answer(answer)

    @app.get("/kbs/v0/attestation-policies")
    async def attestation_policies(request: Request) -> Response:
        admin = await office.identify(request, Role.POLICY, Role.AUDITOR)
        return json_answer(await run_in_threadpool(_attestation_ids, office.core, admin.tenant))

    @app.get("/kbs/v0/attestation-policy/{policy_id:path}")
    async def get_attestation(request: Request, policy_id: str) -> Response:
        admin = await office.identify(request, Role.POLICY, Role.AUDITOR)
        name = _seen(admin, _attestation(policy_id))
        shown = await run_in_threadpool(_shown, office.core, name, None)
        return json_answer(shown)

    @app.delete("/kbs/v0/attestation-policy/{policy_id:path}")
    async def remove_attestation(request: Request, policy_id: str) -> Response:
        return await _submit_removal(request, office, _attestation(policy_id))


async def _submit_text(request: Request, office: Office, name: PolicyName) -> Response:
    admin = await office.identify(request, Role.POLICY)
    text = _text(_message(await read_body(request)))
    answer = await run_in_threadpool(
        office.submit, POLICY_SET, name.path, text, admin=admin, request=request_id(request)
    )
    return json_answer(answer)


async def _submit_removal(request: Request, office: Office, name: PolicyName) -> Response:
    admin = await office.identify(request, Role.POLICY)
    answer = await run_in_threadpool(
        office.submit, POLICY_REMOVE, name.path, b"", admin=admin, request=request_id(request)
    )
    return json_answer(answer)


def _seen(admin: Administrator, name: PolicyName) -> PolicyName:
    """A policy that this administrator may read: everybody's, or one of their tenant."""
    if name.tenant:
        admin.require_tenant(name.tenant)
    return name


def _names(core: Core, connection: Connection, tenant: str) -> list[PolicyName]:
    """The policies that an administrator of this tenant sees; of none, all."""
    names = core.policies.names(connection)
    return [name for name in names if not tenant or name.tenant in ("", tenant)]


def _listed(core: Core, tenant: str) -> list[dict[str, Any]]:
    with core.database.read() as connection:
        return [_note(core, connection, name) for name in _names(core, connection, tenant)]


def _note(core: Core, connection: Connection, name: PolicyName) -> dict[str, Any]:
    stored = core.policies.text(connection, name)
    newest = core.policies.history(connection, name)[-1]
    return {
        "policy": name.path,
        "version": newest.version,
        "time": newest.time,
        "author": newest.author,
        "sha256": "" if stored is None else sha256(stored.contents).hexdigest(),
    }


def _versions(core: Core, name: PolicyName) -> list[dict[str, Any]]:
    with core.database.read() as connection:
        notes = core.policies.history(connection, name)
        if not notes:
            raise InputMissing(f"there never was a policy {name.path}")
        found: list[dict[str, Any]] = []
        for note in notes:
            digest = ""
            if not note.removed:
                stored = core.policies.text(connection, name, note.version)
                digest = "" if stored is None else sha256(stored.contents).hexdigest()
            found.append(
                {
                    "version": note.version, "time": note.time, "author": note.author,
                    "removed": note.removed, "sha256": digest,
                }
            )  # fmt: skip
        return found


def _shown(core: Core, name: PolicyName, version: int | None) -> dict[str, Any]:
    with core.database.read() as connection:
        stored = core.policies.text(connection, name, version)
    if stored is None:
        raise InputMissing(f"no policy {name.path} is set", hint="kbs policy set")
    return {
        "name": name.path,
        "version": stored.version,
        "sha256": sha256(stored.contents).hexdigest(),
        "policy": b64u_encode(stored.contents),
    }


def _resource_policy_ids(core: Core, tenant: str) -> list[str]:
    """As Trustee answers; policies of single prefixes stand behind its one id."""
    with core.database.read() as connection:
        names = _names(core, connection, tenant)
    return [
        TRUSTEE_ID if not name.rest else f"{TRUSTEE_ID}/{name.rest}"
        for name in names
        if name.kind is PolicyKind.RESOURCE
    ]


def _attestation_ids(core: Core, tenant: str) -> list[str]:
    with core.database.read() as connection:
        names = _names(core, connection, tenant)
    return [name.rest for name in names if name.kind is PolicyKind.ATTESTATION]


def _attestation(policy_id: str) -> PolicyName:
    """An attestation policy by Trustee's id; one without a class is the CPU's, as it was once."""
    if policy_id.rpartition("_")[2] not in list(TeeClass):
        policy_id = f"{policy_id}_{TeeClass.CPU}"
    return PolicyName.parse(f"{PolicyKind.ATTESTATION}/{policy_id}")


def _message(body: bytes) -> dict[str, Any]:
    value = jcs.parse(body, what="policy message", limit=MAX_MESSAGE)
    if not isinstance(value, dict):
        raise FormatError('policy message: expected {"policy": "<base64url>"}')
    return value


def _text(message: dict[str, Any]) -> bytes:
    text = message.get("policy")
    if not isinstance(text, str):
        raise FormatError('policy message: expected {"policy": "<base64url>"}')
    # Trustee's clients write no padding; some others do, and some the other alphabet.
    return b64u_decode(text.rstrip("=").translate(_ALPHABET), what="policy")


_ALPHABET: Final = str.maketrans("+/", "-_")
