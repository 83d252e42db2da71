"""What every administrative call goes through: who asks, may they, and the change itself.

A change and its audit row are one transaction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from cai.errors import Unauthenticated
from kbs.admin import tokens
from kbs.admin.changes import ChangeKind, Role
from kbs.audit.log import Entry
from kbs.core import Core


@dataclass(frozen=True, slots=True)
class Administrator:
    """Who asks.

    Attributes:
        name: as the token says.
        roles: what they may do.
    """

    name: str
    roles: frozenset[Role]

    @property
    def actor(self) -> dict[str, str]:
        """As audit leaves name them."""
        return {"kind": "admin", "name": self.name}


class Office:
    """The administrator's side of one key broker.

    Attributes:
        core: the broker's state.
    """

    def __init__(self, core: Core) -> None:
        self.core = core

    async def identify(self, request: Request, *roles: Role) -> Administrator:
        """Who sends this request; one of ``roles``, or ``admin``, is required.

        Raises:
            Unauthenticated: no valid token.
        """
        return await run_in_threadpool(
            self.authenticate, request.headers.get("authorization"), *roles
        )

    def authenticate(self, authorization: str | None, *roles: Role) -> Administrator:
        """The administrator behind an ``Authorization`` header.

        Raises:
            Unauthenticated: none.
        """
        del roles  # there is one role
        try:
            name = tokens.authenticate(
                authorization, self.core.instance.admin_key, now=self.core.clock()
            )
        except Unauthenticated:
            self.core.count_failure("admin")
            raise
        return Administrator(name, frozenset({Role.ADMIN}))

    def submit(
        self,
        kind: ChangeKind,
        object_id: str,
        contents: bytes,
        *,
        admin: Administrator,
        request: str,
    ) -> Mapping[str, Any]:
        """Make a change.

        Args:
            kind: what to do.
            object_id: to what, in the words of that kind.
            contents: the exact new contents.
            admin: who asks; already identified with the kind's role.
            request: id of this request.

        Returns:
            The kind's answer.

        Raises:
            CaiError: the change is not sound; nothing happened.
        """
        core = self.core
        kind.check(core, object_id, contents)
        with core.database.decide() as connection:
            applied = kind.apply(core, connection, object_id, contents)
            entry = Entry(
                kind.action,
                admin.actor,
                request,
                allowed=True,
                subject=object_id,
                change=applied.change,
                policies=applied.policies,
                details=applied.details,
            )
            core.audit.append(connection, entry, core.clock())
        return applied.answer
