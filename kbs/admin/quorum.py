"""Whose signatures count under a proposal (decisions §5).

They count at the moment that the last one arrives: each is checked again against the key, role,
tenant and end that its person has then. So one who was removed meanwhile no longer counts, and
nobody who edits the database can add a signature.
"""

from __future__ import annotations

from sqlalchemy import Connection

from cai.errors import Refused
from kbs.admin.changes import ChangeKind, Conflict, Role
from kbs.admin.identity import Directory
from kbs.admin.people import Administrator
from kbs.admin.proposal_form import Pending
from kbs.admin.settings import TwoPerson


class Quorum:
    """The persons whose signatures a change needs.

    Args:
        directory: knows every administrator.
        rule: how many, and which.
    """

    def __init__(self, directory: Directory, rule: TwoPerson) -> None:
        self._directory = directory
        self.rule = rule

    def require_may_sign(
        self, kind: ChangeKind, pending: Pending, admin: Administrator, signature: str
    ) -> None:
        """Refuse a signature that would not count, or is not this person's.

        Raises:
            Refused: it is.
        """
        proposal = pending.proposal
        admin.require(kind.role)
        admin.require_tenant(kind.tenant(proposal.object))
        if admin.key is None:
            raise Refused(
                f"{admin.name} has no key here to sign with",
                hint="kbs admin add gives a person a key; identity providers cannot sign",
                code="proposal-signature",
            )
        if not self._may_count(admin, proposal.proposer):
            raise Refused(
                f"the signature of {admin.name} does not count here",
                hint="the settings under admin.two_person say whose does",
                code="proposal-signature",
            )
        if not proposal.signed_by(admin.key, signature):
            raise Refused(
                "that is not a signature of yours under this proposal",
                hint="kbs proposal approve makes one",
                code="proposal-signature",
            )

    def counting(self, connection: Connection, kind: ChangeKind, pending: Pending) -> list[str]:
        """The persons whose signatures count now, by name."""
        proposal = pending.proposal
        return [
            person
            for person, signature in sorted(pending.signatures.items())
            if (admin := self._directory.person(connection, person)) is not None
            and self._could_sign(admin, kind, proposal.object, proposal.proposer)
            and admin.key is not None
            and proposal.signed_by(admin.key, signature)
        ]

    def complete(self, connection: Connection, kind: ChangeKind, pending: Pending) -> bool:
        """Whether enough have signed."""
        return len(self.counting(connection, kind, pending)) >= self.rule.required

    def require_enough(
        self, connection: Connection, kind: ChangeKind, object_id: str, proposer: Administrator
    ) -> None:
        """Refuse a proposal that nobody could ever complete.

        Raises:
            Conflict: there are too few persons.
        """
        able = [
            admin.name
            for admin in self._directory.persons(connection)
            if self._could_sign(admin, kind, object_id, proposer.name)
        ]
        if len(able) < self.rule.required:
            raise Conflict(
                f"{kind.action} needs {self.rule.required} signatures, and only {len(able)}"
                f" {'person' if len(able) == 1 else 'persons'} could sign",
                hint="switch admin.two_person off, add administrators, and switch it on again",
                code="proposal-persons",
            )

    def _could_sign(
        self, admin: Administrator, kind: ChangeKind, object_id: str, proposer: str
    ) -> bool:
        return (
            bool(admin.roles & {Role.ADMIN, kind.role})
            and admin.tenant in ("", kind.tenant(object_id))
            and self._may_count(admin, proposer)
        )

    def _may_count(self, admin: Administrator, proposer: str) -> bool:
        if admin.name == proposer and not self.rule.proposer_counts:
            return False
        return not self.rule.approvers or admin.name in self.rule.approvers
