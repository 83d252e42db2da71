"""What every administrative call goes through: who asks, may they, and the change itself.

A change and its audit row are one transaction. Where the two-person rule is on, a change that could
widen what is released becomes a proposal instead (``kbs.admin.proposals``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import Request
from sqlalchemy import Connection
from starlette.concurrency import run_in_threadpool

from cai.errors import Unauthenticated
from kbs.admin.changes import Applied, ChangeKind, ChangeKinds, Outdated, Role
from kbs.admin.identity import Directory
from kbs.admin.people import Administrator
from kbs.admin.proposal_store import MAX_ROUNDS, Proposals
from kbs.admin.settings import AdminSettings
from kbs.audit.log import Entry
from kbs.core import Core

__all__ = ["Administrator", "Office"]


class Office:
    """The administrator's side of one key broker.

    Args:
        core: the broker's state.
        settings: who may administer it.
        kinds: every kind of change that can be proposed.

    Attributes:
        directory: knows every administrator.
        proposals: changes that wait for further persons; ``None`` where one is enough.

    Raises:
        CaiError: a pinned key of the settings cannot be read.
    """

    def __init__(
        self, core: Core, settings: AdminSettings | None = None, kinds: ChangeKinds | None = None
    ) -> None:
        self.core = core
        self.settings = settings or AdminSettings()
        self.kinds = kinds or ChangeKinds()
        self.directory = Directory(core, self.settings)
        rule = self.settings.two_person
        self.proposals = (
            None if rule is None
            else Proposals(core, self.directory, self.kinds, rule, self.log)
        )  # fmt: skip

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
            admin = self.directory.authenticate(authorization)
        except Unauthenticated:
            self.core.count_failure("admin")
            raise
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
        if self.proposals is not None and not kind.reducing:
            raise self.proposals.propose(kind, object_id, contents, admin, request)
        for left in reversed(range(MAX_ROUNDS)):
            prepared = kind.prepare(core, object_id, contents) if kind.prepare else contents
            try:
                with core.database.decide() as connection:
                    self.directory.require_living(connection, admin)
                    applied = kind.apply(core, connection, object_id, prepared)
                    self.log(connection, kind, object_id, applied, admin.actor, request)
                return applied.answer
            except Outdated:
                if not left:
                    raise
        raise AssertionError  # pragma: no cover - the last round returns or raises

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
