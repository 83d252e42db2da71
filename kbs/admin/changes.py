"""Administrative changes as data, so that one path checks, proposes, applies and logs them all.

A kind of change is a pure check and a function that runs in the transaction which also logs it. An
object id and the exact bytes are all that it gets, so a change that waits for a second person is
stored as bytes and applied later by the same code (decisions §5).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from cai import jcs
from cai.errors import InputError, InputMissing, Undecided
from kbs.audit.log import newest_change

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from kbs.audit.log import Change
    from kbs.core import Core


class Role(StrEnum):
    """What an administrator may do."""

    ADMIN = "admin"
    POLICY = "policy"
    REFERENCE = "reference"
    RESOURCE = "resource"
    AUDITOR = "auditor"


class Conflict(InputError):
    """What is asked for does not fit the state that things are in."""

    code, http_status = "conflict", 409


class Outdated(Undecided):
    """What was prepared outside the transaction no longer fits what the transaction found.

    ``apply`` raises it; the office prepares again, a few times.
    """

    code = "outdated"


class Proposed(Undecided):
    """The change is stored and waits for further persons; nothing has changed yet.

    Not a failure: the admin listener answers 202 with the proposal.

    Args:
        summary: the proposal, as ``GET proposal/<id>`` shows it.
    """

    code, http_status = "proposed", 202

    def __init__(self, summary: Mapping[str, Any]) -> None:
        super().__init__(
            f"proposal {summary['id']} waits for {summary['missing']} more of {summary['needed']}"
            " signatures",
            hint=f"kbs proposal approve {summary['id']}",
        )
        self.summary = dict(summary)


@dataclass(frozen=True, slots=True)
class Applied:
    """What a change did.

    Attributes:
        change: the object's new state, for the audit leaf; ``None`` when no stored object changed.
        answer: what the caller is told.
        details: further members of the audit leaf; no secret.
        policies: digests of policies that are now in force, hex.
    """

    change: Change | None
    answer: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    policies: Mapping[str, str] = field(default_factory=dict)


def first_segment(object_id: str) -> str:
    """The tenant of an object whose id starts with a repository, e.g. a resource's path."""
    return object_id.partition("/")[0]


def _whole_broker(_object_id: str) -> str:
    return ""


@dataclass(frozen=True, slots=True)
class ChangeKind:
    """One kind of administrative change.

    Attributes:
        action: its name in the audit log, ``<noun>.<verb>``, e.g. ``resource.set``.
        role: who may ask for it, besides ``admin``.
        check: refuses an unsound object id or contents before any transaction.
        apply: makes the change inside the transaction that logs it, from nothing but the object id
            and the contents, or what ``prepare`` made of them. Nothing slow.
        reducing: it only takes away what could be released, so one person may do it even where
            changes need two.
        visible: a proposal's contents are shown to those who may approve it; never for secrets.
        prepare: the slow part (a wrap by an HSM, a network call), before the transaction; ``apply``
            gets its result in place of the contents and raises ``Outdated`` when it no longer fits.
        tenant: the tenant that an object belongs to; ``""`` is the whole broker.
        object_name: what the audit log calls the object; by default ``<noun>/<object id>``.
        state: hash of the object's current state, which voids a proposal when it changes; by
            default of the newest audit leaf about it.
    """

    action: str
    role: Role
    check: Callable[[Core, str, bytes], None]
    apply: Callable[[Core, Connection, str, Any], Applied]
    reducing: bool = False
    visible: bool = False
    prepare: Callable[[Core, str, bytes], Any] | None = None
    tenant: Callable[[str], str] = _whole_broker
    object_name: Callable[[str], str] | None = None
    state: Callable[[Core, Connection, str], str] | None = None

    def name_of(self, object_id: str) -> str:
        """What the audit log calls this object."""
        if self.object_name is not None:
            return self.object_name(object_id)
        return f"{self.action.partition('.')[0]}/{object_id}"

    def state_of(self, core: Core, connection: Connection, object_id: str) -> str:
        """Hash of the object's current state, hex."""
        if self.state is not None:
            return self.state(core, connection, object_id)
        name = self.name_of(object_id)
        return state_of_objects(connection, name)


def state_of_objects(connection: Connection, *names: str) -> str:
    """Hash of the newest version of each of these objects, hex; for ``ChangeKind.state``."""
    states = []
    for name in names:
        newest = newest_change(connection, name)
        version, row_hash = (0, "") if newest is None else (newest.version, newest.row_hash)
        states.append({"object": name, "version": version, "row_hash": row_hash})
    return sha256(jcs.canonical(states)).hexdigest()


class ChangeKinds:
    """Every kind of change by its action."""

    def __init__(self, *kinds: ChangeKind) -> None:
        self._kinds = {kind.action: kind for kind in kinds}

    def find(self, action: str) -> ChangeKind:
        """The kind of this action.

        Raises:
            InputMissing: there is none.
        """
        kind = self._kinds.get(action)
        if kind is None:
            raise InputMissing(f"there is no change {action[:64]!r}")
        return kind
