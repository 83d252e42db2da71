"""The audit log: leaves appended in the transaction that decides, one log for all replicas.

The head row is locked first, so leaves have one order and no gaps everywhere. With each leaf the
Merkle tree over all of them grows by the hashes that this leaf completes. What cannot be logged is
refused: the caller answers only after its transaction has committed.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import Connection, Select, insert, or_, select, update

from cai.errors import StorageError, Tampered
from cai.merkle import leaf_hash
from kbs.audit import tree
from kbs.audit.leaf import ORIGIN_ACTION, Change, Entry, change_of, parse_leaf, time_of
from kbs.database.engine import Database
from kbs.database.tables import AUDIT, AUDIT_HEAD, AUDIT_NODE

MAX_ROWS = 1000
"""Most leaves in one answer of the admin listener."""

FAILURE_SECONDS = 60
"""Unauthenticated failures become at most one leaf in this time, seconds (decisions §6)."""

FAILURE_ACTION: Final = "unauthenticated"
"""Action of the leaf that counts failures which anybody can cause."""

__all__ = [
    "FAILURE_ACTION", "FAILURE_SECONDS", "MAX_ROWS", "AuditLog", "Change", "Entry", "FailureCount",
    "Head", "changes", "logged_change", "newest_change", "node_hashes", "read_head", "read_leaves",
    "seconds_since_failures",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Head:
    """The head row.

    Attributes:
        size: leaves.
        changes: administrative changes among them.
        frontier: hashes of the maximal complete subtrees, from left to right.
        origin: of checkpoints, where a restore made another than the instance's own; else empty.
        checkpoint: leaves of the newest checkpoint of that origin; 0 without one.
        failures: place of the newest leaf that counts failures; -1 without one.
    """

    size: int
    changes: int
    frontier: tuple[bytes, ...]
    origin: str
    checkpoint: int
    failures: int

    @property
    def root(self) -> bytes:
        """Root of the tree over all leaves."""
        return tree.fold(self.frontier)


class AuditLog:
    """Appends leaves to one database.

    Args:
        instance: id of the database.
        realm: its realm.
    """

    def __init__(self, instance: str, realm: str) -> None:
        self.instance = instance
        self.realm = realm

    def append(self, connection: Connection, entry: Entry, at: datetime) -> int:
        """Append a leaf inside the caller's write transaction.

        Returns:
            Its place in the log, from 0.

        Raises:
            StorageError: the head row is missing.
            Tampered: the head row does not fit itself.
        """
        head = read_head(connection, lock=True)
        seq, changes = head.size, head.changes + entry.counts
        leaf = entry.encode(
            instance=self.instance, realm=self.realm, seq=seq, changes=changes,
            checkpoint=head.checkpoint, at=at,
        )  # fmt: skip
        frontier, completed = tree.appended(head.frontier, seq, leaf_hash(leaf))
        origin, checkpoint = head.origin, head.checkpoint
        if entry.action == ORIGIN_ACTION:
            origin, checkpoint = str(entry.details["origin"]), 0
        connection.execute(
            update(AUDIT_HEAD)
            .where(AUDIT_HEAD.c.id == 1)
            .values(
                size=seq + 1,
                changes=changes,
                frontier=b"".join(frontier),
                origin=origin,
                checkpoint=checkpoint,
                failures=seq if entry.action == FAILURE_ACTION else head.failures,
            )
        )
        changed = entry.change or Change("", 0, "")
        connection.execute(
            insert(AUDIT).values(
                seq=seq, object=changed.object, version=changed.version, leaf=leaf
            )
        )
        if completed:
            connection.execute(
                insert(AUDIT_NODE),
                [{"level": level, "position": at, "hash": value}
                 for (level, at), value in completed],
            )  # fmt: skip
        return seq


def read_head(connection: Connection, *, lock: bool = False) -> Head:
    """The head row.

    Args:
        connection: any transaction.
        lock: keep every other decision out until this transaction ends (PostgreSQL; an SQLite
            write transaction keeps them out anyway).

    Raises:
        StorageError: there is none.
        Tampered: size and frontier do not fit.
    """
    query = select(AUDIT_HEAD).where(AUDIT_HEAD.c.id == 1)
    row = connection.execute(query.with_for_update() if lock else query).one_or_none()
    if row is None:
        raise StorageError("the audit log has no head; nothing can be decided")
    frontier = tree.split_frontier(row.frontier, row.size)
    if frontier is None:
        raise Tampered(
            "the head of the audit log does not fit its size",
            hint="the database was edited; restore it from a backup",
        )
    return Head(
        row.size, row.changes, tuple(frontier), row.origin, row.checkpoint, row.failures
    )


def changes(connection: Connection) -> int:
    """How many administrative changes the log holds; equal while nothing was administered.

    Raises:
        StorageError: the head row is missing.
    """
    count = connection.execute(
        select(AUDIT_HEAD.c.changes).where(AUDIT_HEAD.c.id == 1)
    ).scalar_one_or_none()
    if count is None:
        raise StorageError("the audit log has no head; nothing can be decided")
    return int(count)


def newest_change(connection: Connection, name: str) -> Change | None:
    """What the newest leaf about an object says it is now.

    Raises:
        FormatError: that leaf is not canonical JSON; the log was edited.
        Tampered: that leaf is about something else.
    """
    return _change(connection, name, select(AUDIT.c.leaf).where(AUDIT.c.object == name))


def logged_change(connection: Connection, name: str, version: int) -> Change | None:
    """What the newest leaf about one version of an object says.

    Raises:
        FormatError: that leaf is not canonical JSON; the log was edited.
        Tampered: that leaf is about something else.
    """
    query = select(AUDIT.c.leaf).where(AUDIT.c.object == name, AUDIT.c.version == version)
    change = _change(connection, name, query)
    if change is not None and change.version != version:
        raise Tampered(f"{name}: the audit log's index names another leaf")
    return change


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


def node_hashes(connection: Connection, nodes: Iterable[tree.Node]) -> dict[tree.Node, bytes]:
    """Hashes of complete nodes; those of leaves come from the leaves themselves.

    Raises:
        Tampered: one of them is missing.
    """
    wanted = set(nodes)
    places = [at for level, at in wanted if level == 0]
    upper = [(level, at) for level, at in wanted if level]
    found: dict[tree.Node, bytes] = {}
    if places:
        rows = connection.execute(select(AUDIT.c.seq, AUDIT.c.leaf).where(AUDIT.c.seq.in_(places)))
        found |= {(0, row.seq): leaf_hash(row.leaf) for row in rows}
    if upper:
        table = AUDIT_NODE.c
        places_above = or_(*((table.level == level) & (table.position == at)
                             for level, at in upper))  # fmt: skip
        for row in connection.execute(select(AUDIT_NODE).where(places_above)):
            found[row.level, row.position] = row.hash
    if set(found) != wanted:
        missing = min(wanted - set(found))
        raise Tampered(
            f"the audit log lacks node {missing[1]} of level {missing[0]}",
            hint="the database was edited; restore it from a backup",
        )
    return found


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

    def put_back(self, counts: dict[str, int], last: datetime) -> None:
        """Keep counts that were not written, because another replica wrote a leaf at ``last``."""
        with self._lock:
            self._counts.update(counts)
            self._last = last

    def _take(self) -> dict[str, int]:
        counts, self._counts = dict(self._counts), Counter()
        return counts


def seconds_since_failures(connection: Connection, now: datetime) -> float | None:
    """Age of the newest leaf that counts failures, by any replica; ``None`` without one."""
    seq = read_head(connection).failures
    leaf = connection.execute(select(AUDIT.c.leaf).where(AUDIT.c.seq == seq)).scalar()
    return None if leaf is None else (now - time_of(parse_leaf(leaf))).total_seconds()


def _change(connection: Connection, name: str, query: Select[Any]) -> Change | None:
    leaf = connection.execute(query.order_by(AUDIT.c.seq.desc()).limit(1)).scalar()
    if leaf is None:
        return None
    change = change_of(parse_leaf(leaf))
    if change is None or change.object != name:
        # The column is only an index; what the leaf itself says counts.
        raise Tampered(f"{name}: the audit log's index names another leaf")
    return change
