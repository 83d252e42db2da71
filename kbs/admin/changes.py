"""Administrative changes as data, so that one path checks, proposes, applies and logs them all.

A kind of change is a pure check and a function that runs in the transaction which also logs it. An
object id and the exact bytes are all that it gets, so a change that waits for a second person is
stored as bytes and applied later by the same code (decisions §5).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from cai.errors import InputMissing

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


@dataclass(frozen=True, slots=True)
class ChangeKind:
    """One kind of administrative change.

    Attributes:
        action: its name in the audit log, e.g. ``resource.set``.
        role: who may ask for it, besides ``admin``.
        check: refuses an unsound object id or contents before any transaction.
        apply: makes the change inside the transaction that logs it.
        reducing: it only takes away what could be released, so one person may do it even where
            changes need two.
    """

    action: str
    role: Role
    check: Callable[[Core, str, bytes], None]
    apply: Callable[[Core, Connection, str, bytes], Applied]
    reducing: bool = False


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
