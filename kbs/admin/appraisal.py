"""Administration of the attestation service: stock clients of one post policies to ``/as/policy``.

Upstream's service takes policies from anybody who reaches it. Here the route exists only among the
administrative ones, needs the same token and role as any other way to set a policy, and takes that
way: versions, the two-person rule and the audit log see no difference.
"""

from __future__ import annotations

from typing import Final

from fastapi import FastAPI, Request, Response
from starlette.concurrency import run_in_threadpool

from cai import jcs
from cai.attest.jwk import b64u_decode
from cai.attest.rcar import MAX_MESSAGE
from cai.errors import FormatError
from kbs.admin.changes import Role
from kbs.admin.office import Office
from kbs.admin.policies import POLICY_SET
from kbs.policy.names import PolicyKind, PolicyName
from kbs.server.answers import json_answer, read_body, request_id

_ALPHABET: Final = str.maketrans("+/", "-_")


def add_routes(app: FastAPI, office: Office) -> None:
    """Add the routes of this module to the admin listener."""

    @app.post("/as/policy")
    async def set_policy(request: Request) -> Response:
        admin = await office.identify(request, Role.POLICY)
        name, text = _policy(await read_body(request))
        answer = await run_in_threadpool(
            office.submit, POLICY_SET, name.path, text, admin=admin, request=request_id(request)
        )
        return json_answer(answer)


def _policy(body: bytes) -> tuple[PolicyName, bytes]:
    value = jcs.parse(body, what="policy message", limit=MAX_MESSAGE)
    policy_id = value.get("policy_id") if isinstance(value, dict) else None
    text = value.get("policy") if isinstance(value, dict) else None
    if not isinstance(policy_id, str) or not isinstance(text, str):
        raise FormatError('policy message: expected {"policy_id": …, "policy": "<base64url>"}')
    name = PolicyName.parse(f"{PolicyKind.ATTESTATION}/{policy_id}")
    # Clients write either alphabet, with and without padding.
    return name, b64u_decode(text.rstrip("=").translate(_ALPHABET), what="policy")
