"""Proposals in the database: made, signed, rejected, applied or void.

Signatures count at the moment that the last one arrives: each is checked again against the key,
role, tenant and end that its person has then. So one who was removed meanwhile no longer counts,
and nobody who edits the database can add a signature.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection

from cai.attest.jwk import b64u_encode
from cai.errors import InputMissing, LimitExceeded, Refused
from kbs.admin.changes import ChangeKind, ChangeKinds, Conflict, Outdated, Proposed, Role
from kbs.admin.identity import Directory
from kbs.admin.people import Administrator
from kbs.admin.proposal_form import MAX_CONTENTS, Pending, Proposal
from kbs.admin.rows import AdminRows
from kbs.admin.settings import TwoPerson
from kbs.audit.log import Change, Entry
from kbs.core import Core
from kbs.database.tables import PROPOSAL

if TYPE_CHECKING:
    from collections.abc import Callable

    from kbs.admin.changes import Applied

MAX_ID = 32
"""Length of a proposal's id, hex digits."""

MAX_PROPOSALS = 256
"""Most proposals that wait at once."""

MAX_ROUNDS = 3
"""How often a change is prepared anew when the object changed meanwhile."""


@dataclass(frozen=True, slots=True)
class _Void:
    reason: str


class Proposals:
    """The proposals of one key broker.

    Args:
        core: the broker's state.
        directory: knows every administrator.
        kinds: every kind of change.
        rule: how many persons a change needs.
        log: appends the leaf of an applied change inside its transaction.
    """

    def __init__(
        self,
        core: Core,
        directory: Directory,
        kinds: ChangeKinds,
        rule: TwoPerson,
        log: Callable[[Connection, ChangeKind, str, Applied, Mapping[str, str], str], None],
    ) -> None:
        self._core = core
        self._directory = directory
        self._kinds = kinds
        self._rule = rule
        self._log = log
        self._rows = AdminRows(PROPOSAL, core)

    def propose(
        self, kind: ChangeKind, object_id: str, contents: bytes, admin: Administrator, request: str
    ) -> Proposed:
        """Store a proposal.

        Returns:
            What to raise: nothing has changed yet.

        Raises:
            Conflict: there are not enough persons who could ever sign it.
            LimitExceeded: the contents are too large, or too many proposals wait.
        """
        if len(contents) > MAX_CONTENTS:
            raise LimitExceeded(f"contents of more than {MAX_CONTENTS} bytes cannot be proposed")
        core = self._core
        now = core.clock()
        seconds = int(now.timestamp())
        with core.database.decide() as connection:
            self._directory.require_living(connection, admin)
            self._sweep(connection, request)
            if len(self._rows.paths(connection)) >= MAX_PROPOSALS:
                raise LimitExceeded(
                    f"{MAX_PROPOSALS} proposals wait already", hint="kbs proposal list"
                )
            self._require_enough(connection, kind, object_id, admin)
            proposal = Proposal.about(
                contents,
                kbs=core.instance.id,
                realm=core.instance.realm.value,
                action=kind.action,
                object=object_id,
                state=kind.state_of(core, connection, object_id),
                proposer=admin.name,
                created=seconds,
                expires=seconds + self._rule.hours * 3600,
            )
            pending = Pending(proposal, contents, admin.actor, {})
            change = self._rows.put(connection, proposal.id, pending.encode())
            self._leaf(connection, "proposal.create", admin.actor, request, proposal, change)
        return Proposed(self._summary(pending, kind, [], may_see=False))

    def all(self, admin: Administrator) -> list[dict[str, Any]]:
        """Every waiting proposal that this administrator may know of, oldest first."""
        with self._core.database.read() as connection:
            found = [self._pending(connection, path) for path in self._rows.paths(connection)]
            shown = [
                self._shown(connection, pending, admin)
                for pending in found
                if pending is not None and self._may_know(pending, admin)
            ]
        return sorted(shown, key=lambda item: (item["proposal"]["created"], item["id"]))

    def one(self, identifier: str, admin: Administrator) -> dict[str, Any]:
        """One proposal.

        Raises:
            InputMissing: there is none that this administrator may know of.
        """
        with self._core.database.read() as connection:
            pending = self._known(connection, identifier, admin)
            return self._shown(connection, pending, admin)

    def approve(
        self, identifier: str, signature: str, admin: Administrator, request: str
    ) -> dict[str, Any]:
        """Add a signature; the last one makes the change.

        Returns:
            The proposal; with ``applied`` and the kind's answer when that was the last signature.

        Raises:
            InputMissing: there is no such proposal.
            Refused: this person may not sign it, or the signature is not theirs.
            Conflict: it is void, and gone now.
        """
        core = self._core
        for left in reversed(range(MAX_ROUNDS)):
            # What is slow happens before the transaction, which then checks everything again.
            with core.database.read() as connection:
                pending = self._known(connection, identifier, admin)
                kind = self._signable(pending, admin, signature)
                signed = pending.with_signature(admin.name, signature)
                complete = self._complete(connection, kind, signed)
            prepared: Any = pending.contents
            if complete:
                kind.check(core, pending.proposal.object, pending.contents)
                if kind.prepare is not None:
                    prepared = kind.prepare(core, pending.proposal.object, pending.contents)
            try:
                outcome = self._sign(
                    identifier, signature, admin, request, prepared if complete else None
                )
            except Outdated:
                if not left:
                    raise
                continue
            if isinstance(outcome, _Void):
                raise Conflict(outcome.reason, hint="propose it again", code="proposal-void")
            return outcome
        raise AssertionError  # pragma: no cover - the last round returns or raises

    def reject(self, identifier: str, admin: Administrator, request: str) -> dict[str, Any]:
        """Take a proposal away; its proposer or one person with its role is enough.

        Raises:
            InputMissing: there is no such proposal.
            Refused: this person may not.
        """
        with self._core.database.decide() as connection:
            self._directory.require_living(connection, admin)
            pending = self._known(connection, identifier, admin)
            kind = self._kinds.find(pending.proposal.action)
            if admin.name != pending.proposal.proposer:
                admin.require(kind.role)
                admin.require_tenant(kind.tenant(pending.proposal.object))
            change = self._rows.remove(connection, identifier)
            self._leaf(
                connection, "proposal.reject", admin.actor, request, pending.proposal, change
            )
        return {"id": identifier, "rejected": True}

    def _sign(
        self, identifier: str, signature: str, admin: Administrator, request: str, prepared: Any
    ) -> dict[str, Any] | _Void:
        core = self._core
        with core.database.decide() as connection:
            self._directory.require_living(connection, admin)
            pending = self._known(connection, identifier, admin)
            kind = self._signable(pending, admin, signature)
            proposal = pending.proposal
            reason = self._void(connection, kind, proposal)
            if reason:
                change = self._rows.remove(connection, identifier)
                self._leaf(
                    connection, "proposal.void", admin.actor, request, proposal, change, reason
                )
                return _Void(reason)
            signed = pending.with_signature(admin.name, signature)
            if not self._complete(connection, kind, signed):
                change = self._rows.put(connection, identifier, signed.encode())
                self._leaf(
                    connection, "proposal.approve", admin.actor, request, proposal, change,
                    signatures={admin.name: signature},
                )  # fmt: skip
                return self._shown(connection, signed, admin)
            if prepared is None:
                raise Outdated("the proposal was completed meanwhile", hint="try again")
            persons = self._counting(connection, kind, signed)
            change = self._rows.remove(connection, identifier)
            self._leaf(
                connection, "proposal.apply", admin.actor, request, proposal, change,
                signatures={person: signed.signatures[person] for person in persons},
            )  # fmt: skip
            applied = kind.apply(core, connection, proposal.object, prepared)
            actor = {**pending.actor, "proposal": proposal.id, "approved_by": " ".join(persons)}
            self._log(connection, kind, proposal.object, applied, actor, request)
        return {"id": identifier, "applied": True, "answer": dict(applied.answer)}

    def _signable(self, pending: Pending, admin: Administrator, signature: str) -> ChangeKind:
        kind = self._kinds.find(pending.proposal.action)
        admin.require(kind.role)
        admin.require_tenant(kind.tenant(pending.proposal.object))
        if admin.key is None:
            raise Refused(
                f"{admin.name} has no key here to sign with",
                hint="kbs admin add gives a person a key; identity providers cannot sign",
                code="proposal-signature",
            )
        if not self._may_count(admin, pending.proposal.proposer):
            raise Refused(
                f"the signature of {admin.name} does not count here",
                hint="the settings under admin.two_person say whose does",
                code="proposal-signature",
            )
        if not pending.proposal.signed_by(admin.key, signature):
            raise Refused(
                "that is not a signature of yours under this proposal",
                hint="kbs proposal approve makes one", code="proposal-signature",
            )  # fmt: skip
        return kind

    def _may_count(self, admin: Administrator, proposer: str) -> bool:
        rule = self._rule
        if admin.name == proposer and not rule.proposer_counts:
            return False
        return not rule.approvers or admin.name in rule.approvers

    def _counting(self, connection: Connection, kind: ChangeKind, pending: Pending) -> list[str]:
        proposal = pending.proposal
        return [
            person
            for person, signature in sorted(pending.signatures.items())
            if (admin := self._directory.person(connection, person)) is not None
            and self._could_sign(admin, kind, proposal.object, proposal.proposer)
            and admin.key is not None
            and proposal.signed_by(admin.key, signature)
        ]

    def _could_sign(
        self, admin: Administrator, kind: ChangeKind, object_id: str, proposer: str
    ) -> bool:
        return (
            bool(admin.roles & {Role.ADMIN, kind.role})
            and admin.tenant in ("", kind.tenant(object_id))
            and self._may_count(admin, proposer)
        )

    def _complete(self, connection: Connection, kind: ChangeKind, pending: Pending) -> bool:
        return len(self._counting(connection, kind, pending)) >= self._rule.required

    def _require_enough(
        self, connection: Connection, kind: ChangeKind, object_id: str, proposer: Administrator
    ) -> None:
        able = [
            admin.name
            for admin in self._directory.persons(connection)
            if self._could_sign(admin, kind, object_id, proposer.name)
        ]
        if len(able) < self._rule.required:
            raise Conflict(
                f"{kind.action} needs {self._rule.required} signatures, and only {len(able)}"
                " persons could sign",
                hint="switch admin.two_person off, add administrators, and switch it on again",
                code="proposal-persons",
            )

    def _void(self, connection: Connection, kind: ChangeKind, proposal: Proposal) -> str:
        if self._core.clock().timestamp() >= proposal.expires:
            return "the proposal has expired"
        if kind.state_of(self._core, connection, proposal.object) != proposal.state:
            return f"{proposal.object} changed since this was proposed"
        return ""

    def _sweep(self, connection: Connection, request: str) -> None:
        now = self._core.clock().timestamp()
        for path in self._rows.paths(connection):
            pending = self._pending(connection, path)
            if pending is not None and now >= pending.proposal.expires:
                change = self._rows.remove(connection, path)
                self._leaf(
                    connection, "proposal.void", {"kind": "system"}, request, pending.proposal,
                    change, "the proposal has expired",
                )  # fmt: skip

    def _pending(self, connection: Connection, identifier: str) -> Pending | None:
        row = self._rows.get(connection, identifier)
        return None if row is None else Pending.parse(row.contents)

    def _known(self, connection: Connection, identifier: str, admin: Administrator) -> Pending:
        pending = None
        if len(identifier) <= MAX_ID and identifier.isalnum() and identifier.isascii():
            pending = self._pending(connection, identifier)
        if pending is None or not self._may_know(pending, admin):
            raise InputMissing(
                f"there is no proposal {identifier[:64]!r}", hint="kbs proposal list"
            )
        return pending

    def _may_know(self, pending: Pending, admin: Administrator) -> bool:
        kind = self._kinds.find(pending.proposal.action)
        if admin.name == pending.proposal.proposer:
            return True
        return bool(admin.roles & {Role.ADMIN, Role.AUDITOR, kind.role}) and admin.tenant in (
            "", kind.tenant(pending.proposal.object),
        )  # fmt: skip

    def _shown(
        self, connection: Connection, pending: Pending, admin: Administrator
    ) -> dict[str, Any]:
        kind = self._kinds.find(pending.proposal.action)
        counting = self._counting(connection, kind, pending)
        may_see = bool(admin.roles & {Role.ADMIN, kind.role})
        void = self._void(connection, kind, pending.proposal)
        return self._summary(pending, kind, counting, may_see=may_see, void=void)

    def _summary(
        self, pending: Pending, kind: ChangeKind, counting: list[str], *, may_see: bool,
        void: str = "",
    ) -> dict[str, Any]:  # fmt: skip
        """A proposal as it is shown; contents only of visible kinds, never of secrets."""
        proposal = pending.proposal
        shown: dict[str, Any] = {
            "id": proposal.id,
            "proposal": proposal.to_json(),
            "signed_by": counting,
            "needed": self._rule.required,
            "missing": max(0, self._rule.required - len(counting)),
            "proposer_counts": self._rule.proposer_counts,
            "void": void,
            "applied": False,
        }
        if kind.visible and may_see:
            shown["contents"] = b64u_encode(pending.contents)
        return shown

    def _leaf(
        self, connection: Connection, action: str, actor: Mapping[str, str], request: str,
        proposal: Proposal, change: Change, reason: str = "",
        signatures: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        details: dict[str, Any] = {"proposal": proposal.to_json()}
        if signatures is not None:
            details["signatures"] = dict(signatures)
        entry = Entry(
            action, actor, request, allowed=not reason, reason=reason, subject=proposal.object,
            change=change, details=details,
        )  # fmt: skip
        self._core.audit.append(connection, entry, self._core.clock())
