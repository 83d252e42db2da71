"""What every administrative call goes through: who asks, may they, and the change itself.

A change and its audit row are one transaction. Where the two-person rule is on, a change that could
widen what is released becomes a proposal instead (``kbs.admin.proposals``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from fastapi import Request
from sqlalchemy import Connection
from starlette.concurrency import run_in_threadpool

from cai.errors import Refused, Unauthenticated
from kbs.admin import tokens
from kbs.admin.changes import Applied, ChangeKind, ChangeKinds, Outdated, Role
from kbs.admin.settings import AdminSettings
from kbs.audit.log import Change, Entry, newest_change
from kbs.core import Core

MAX_ROUNDS = 3
"""How often a change is prepared anew when the object changed meanwhile."""


@dataclass(frozen=True, slots=True)
class Administrator:
    """Who asks.

    Attributes:
        name: the person; given by the key or the identity provider, never by a token's holder.
        roles: what they may do with this token.
        tenant: the one repository that they may change; ``""`` is the whole broker.
        key: checks their signatures under proposals; ``None`` when they cannot sign.
        credential: the stored row that vouches for them, as it was read; ``None`` where
            configuration does.
    """

    name: str
    roles: frozenset[Role]
    tenant: str = ""
    key: Ed25519PublicKey | None = None
    credential: Change | None = None

    @property
    def actor(self) -> dict[str, str]:
        """As audit leaves name them."""
        named = {"kind": "admin", "name": self.name, "roles": " ".join(sorted(self.roles))}
        return {**named, "tenant": self.tenant} if self.tenant else named

    def require(self, *roles: Role) -> None:
        """Refuse unless they have one of ``roles``, or ``admin``.

        Raises:
            Refused: they have none.
        """
        if not self.roles & {Role.ADMIN, *roles}:
            wanted = " or ".join(sorted({Role.ADMIN, *roles}))
            raise Refused(
                f"{self.name} has not the role {wanted}",
                hint="kbs admin list shows who may do what",
                code="admin-role",
            )

    def require_tenant(self, tenant: str) -> None:
        """Refuse what lies outside their tenant.

        Raises:
            Refused: it does.
        """
        if self.tenant and tenant != self.tenant:
            raise Refused(
                f"{self.name} administers {self.tenant!r} only",
                hint="ask an administrator of the whole broker",
                code="admin-tenant",
            )


class Office:
    """The administrator's side of one key broker.

    Args:
        core: the broker's state.
        settings: who may administer it.
        kinds: every kind of change that can be proposed.

    Attributes:
        core: the broker's state.
    """

    def __init__(
        self, core: Core, settings: AdminSettings | None = None, kinds: ChangeKinds | None = None
    ) -> None:
        self.core = core
        self.settings = settings or AdminSettings()
        self.kinds = kinds or ChangeKinds()

    async def identify(self, request: Request, *roles: Role) -> Administrator:
        """Who sends this request; one of ``roles``, or ``admin``, is required.

        Raises:
            Unauthenticated: no valid token.
            Refused: the person has none of the roles.
        """
        return await run_in_threadpool(
            self.authenticate, request.headers.get("authorization"), *roles
        )

    def authenticate(self, authorization: str | None, *roles: Role) -> Administrator:
        """The administrator behind an ``Authorization`` header.

        Raises:
            Unauthenticated: none.
            Refused: they have none of the roles.
        """
        try:
            name = tokens.authenticate(
                authorization, self.core.instance.admin_key, now=self.core.clock()
            )
        except Unauthenticated:
            self.core.count_failure("admin")
            raise
        admin = Administrator(name, frozenset({Role.ADMIN}))
        admin.require(*roles)
        return admin

    def submit(
        self,
        kind: ChangeKind,
        object_id: str,
        contents: bytes,
        *,
        admin: Administrator,
        request: str,
    ) -> Mapping[str, Any]:
        """Make a change, or propose it where the two-person rule asks for that.

        Args:
            kind: what to do.
            object_id: to what, in the words of that kind.
            contents: the exact new contents.
            admin: who asks; already identified with the kind's role.
            request: id of this request.

        Returns:
            The kind's answer.

        Raises:
            Refused: the object is outside the administrator's role or tenant.
            Proposed: it waits for further persons.
            CaiError: the change is not sound; nothing happened.
        """
        core = self.core
        admin.require(kind.role)
        admin.require_tenant(kind.tenant(object_id))
        kind.check(core, object_id, contents)
        for left in reversed(range(MAX_ROUNDS)):
            prepared = kind.prepare(core, object_id, contents) if kind.prepare else contents
            try:
                with core.database.decide() as connection:
                    self.require_living(connection, admin)
                    applied = kind.apply(core, connection, object_id, prepared)
                    self.log(connection, kind, object_id, applied, admin.actor, request)
                return applied.answer
            except Outdated:
                if not left:
                    raise
        raise AssertionError  # pragma: no cover - the last round returns or raises

    def require_living(self, connection: Connection, admin: Administrator) -> None:
        """Refuse an administrator who was changed or removed since they were identified.

        Raises:
            Unauthenticated: they were.
        """
        known = admin.credential
        if known is not None and newest_change(connection, known.object) != known:
            raise Unauthenticated("this administrator was changed meanwhile", hint="try again")

    def log(
        self,
        connection: Connection,
        kind: ChangeKind,
        object_id: str,
        applied: Applied,
        actor: Mapping[str, str],
        request: str,
    ) -> None:
        """Append the leaf of a change inside its transaction."""
        entry = Entry(
            kind.action,
            actor,
            request,
            allowed=True,
            subject=object_id,
            change=applied.change,
            policies=applied.policies,
            details=applied.details,
        )
        self.core.audit.append(connection, entry, self.core.clock())
