"""The audit log: one canonical leaf for each decision, in the transaction that decides.

The bytes are in docs/spec-audit.md. They are the leaves of a later Merkle log (RFC 6962), so they
are RFC 8785 JSON from the first row on, hold no secret, and are never rewritten. What cannot be
logged is refused: the caller answers only after its transaction has committed.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from sqlalchemy import Connection, insert, select, update

from cai import jcs
from cai.attest.verdict import Verdict
from cai.errors import StorageError
from kbs.database.engine import Database
from kbs.database.tables import AUDIT, AUDIT_HEAD

LEAF_VERSION: Final = 1
"""Member ``cai-audit`` of every leaf."""

MAX_LEAF = 1024 * 1024
"""Largest leaf that is read back, bytes."""

MAX_ROWS = 1000
"""Most leaves in one answer of the admin listener."""

FAILURE_SECONDS = 60
"""Unauthenticated failures become at most one leaf in this time, seconds (decisions §6)."""

TEXT_LIMIT = 512
"""Longest text from outside that a leaf repeats, characters."""


@dataclass(frozen=True, slots=True)
class Change:
    """What a decision made of a stored object.

    Attributes:
        object: ``<table>/<path>``.
        version: the version that is now the newest.
        row_hash: SHA-256 of the stored row, hex; empty when there is none any more.
    """

    object: str
    version: int
    row_hash: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One decision, before it has its place in the log.

    Attributes:
        action: ``attest``, ``release``, ``resource.set``, ``policy.set``, ….
        actor: who asked: ``{"kind": "guest", "session": …}`` or ``{"kind": "admin", "name": …}``.
        request: id of the request, as the answer names it.
        allowed: the decision.
        reason: one line when it was refused.
        subject: the resource or policy that was asked for.
        verdict: every check behind it.
        evidence: digests of the evidence, hex.
        policies: digests of the policies in force, hex.
        change: what was stored; ``None`` when nothing was.
        served: version of the resource that was handed out.
        details: further members for one action, e.g. counts.
    """

    action: str
    actor: Mapping[str, str]
    request: str
    allowed: bool
    reason: str = ""
    subject: str = ""
    verdict: Verdict | None = None
    evidence: Mapping[str, str] = field(default_factory=dict)
    policies: Mapping[str, str] = field(default_factory=dict)
    change: Change | None = None
    served: int | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def encode(self, *, instance: str, realm: str, seq: int, at: datetime) -> bytes:
        """The leaf's canonical bytes (spec-audit §2)."""
        value: dict[str, Any] = {
            "cai-audit": LEAF_VERSION,
            "instance": instance,
            "realm": realm,
            "seq": seq,
            "time": at.strftime("%Y-%m-%dT%H:%M:%S.") + f"{at.microsecond // 1000:03d}Z",
            "action": self.action,
            "actor": {name: _plain(text) for name, text in self.actor.items()},
            "request": self.request,
            "decision": "allow" if self.allowed else "deny",
            "reason": _plain(self.reason),
            "subject": _plain(self.subject),
            "evidence": dict(self.evidence),
            "policies": dict(self.policies),
            "checks": [],
            "hardware": {},
            "simulated": False,
            "unsafe": [],
        }
        if self.verdict is not None:
            body = self.verdict.to_json()
            for member in ("hardware", "simulated", "unsafe"):
                value[member] = body[member]
            value["checks"] = [
                {name: _plain(str(text)) for name, text in item.to_json().items()}
                for item in self.verdict.checks
            ]
        if self.change is not None:
            value["change"] = {
                "object": self.change.object,
                "version": self.change.version,
                "row_hash": self.change.row_hash,
            }
        if self.served is not None:
            value["served"] = self.served
        if self.details:
            value["details"] = dict(self.details)
        return jcs.canonical(value)


class AuditLog:
    """Appends leaves to one database.

    Args:
        instance: id of the database.
        realm: its realm.
    """

    def __init__(self, instance: str, realm: str) -> None:
        self._instance = instance
        self._realm = realm

    def append(self, connection: Connection, entry: Entry, at: datetime) -> int:
        """Append a leaf inside the caller's write transaction.

        Returns:
            Its place in the log, from 0.

        Raises:
            StorageError: the head row is missing.
        """
        # The head row is locked first, so that leaves have no gaps and one order everywhere.
        advanced = connection.execute(
            update(AUDIT_HEAD).where(AUDIT_HEAD.c.id == 1).values(size=AUDIT_HEAD.c.size + 1)
        )
        if advanced.rowcount != 1:
            raise StorageError("the audit log has no head; nothing can be decided")
        size: int = connection.execute(select(AUDIT_HEAD.c.size)).scalar_one()
        leaf = entry.encode(instance=self._instance, realm=self._realm, seq=size - 1, at=at)
        changed = entry.change.object if entry.change else ""
        connection.execute(insert(AUDIT).values(seq=size - 1, object=changed, leaf=leaf))
        return size - 1


def newest_change(connection: Connection, name: str) -> Change | None:
    """What the newest leaf about an object says it is now.

    Raises:
        FormatError: that leaf is not canonical JSON; the log was edited.
    """
    leaf = connection.execute(
        select(AUDIT.c.leaf).where(AUDIT.c.object == name).order_by(AUDIT.c.seq.desc()).limit(1)
    ).scalar()
    if leaf is None:
        return None
    value = jcs.parse_canonical(leaf, what="audit leaf", limit=MAX_LEAF)
    change = value.get("change", {}) if isinstance(value, dict) else {}
    return Change(
        str(change.get("object", "")),
        int(change.get("version", 0)),
        str(change.get("row_hash", "")),
    )


def read_leaves(database: Database, *, start: int, limit: int) -> tuple[int, list[bytes]]:
    """Size of the log, and its leaves from ``start``."""
    with database.read() as connection:
        size = connection.execute(select(AUDIT_HEAD.c.size)).scalar_one()
        leaves = connection.execute(
            select(AUDIT.c.leaf)
            .where(AUDIT.c.seq >= start)
            .order_by(AUDIT.c.seq)
            .limit(min(limit, MAX_ROWS))
        ).scalars()
        return size, list(leaves)


class FailureCount:
    """Unauthenticated failures: anybody can cause them, so they are counted, not listed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._last: datetime | None = None

    def note(self, kind: str, at: datetime) -> dict[str, int]:
        """Count one failure.

        Returns:
            The counts to write as one leaf now; empty while the last leaf is too young.
        """
        with self._lock:
            self._counts[kind] += 1
            if self._last is not None and (at - self._last).total_seconds() < FAILURE_SECONDS:
                return {}
            self._last = at
            return self._take()

    def rest(self) -> dict[str, int]:
        """The counts not yet written, at the end of the program."""
        with self._lock:
            return self._take()

    def _take(self) -> dict[str, int]:
        counts, self._counts = dict(self._counts), Counter()
        return counts


def _plain(text: str) -> str:
    """Text from outside, made safe to keep: bounded, printable, no lone surrogate."""
    shown = "".join(char if char.isprintable() else "�" for char in text[:TEXT_LIMIT])
    return shown.encode("utf-8", "replace").decode("utf-8")
