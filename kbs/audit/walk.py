"""The whole log of a database, walked: leaves, tree, checkpoints, and every row that they name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from sqlalchemy import Connection, Row, and_, or_, select

from cai.attest.verdict import Verdict
from cai.errors import CaiError
from kbs.audit import report, tree
from kbs.audit.leaf import Change, change_of
from kbs.audit.log import FAILURE_ACTION, read_head
from kbs.audit.replay import Replay, opened
from kbs.audit.report import Report
from kbs.audit.stored import Ledger, LoggedTable
from kbs.database.tables import AUDIT, AUDIT_CHECKPOINT, AUDIT_HEAD, AUDIT_NODE, INSTANCE

HELD: Final = "the checkpoint kept outside"
"""What failures call the one that the caller brings."""

BATCH: Final = 500
"""Leaves that are read at a time."""


def verify_database(
    connection: Connection,
    *,
    instance: str,
    realm: str,
    keys: Sequence[bytes],
    tables: Sequence[LoggedTable],
    held: bytes | None = None,
    opening: bool = True,
) -> Verdict:
    """Walk the log.

    Args:
        connection: a consistent view of everything.
        instance: id of the key broker.
        realm: its realm.
        keys: public keys of its checkpoints.
        tables: every table whose rows the log names.
        held: a checkpoint that was kept outside; the log must be that one or extend it.
        opening: also open each row, which asks the key provider for each resource version.

    Returns:
        Every check by name, and every failure with its place.
    """
    return _Walk(connection, instance, realm, keys, tables, held).run(opening=opening)


class _Walk:
    def __init__(
        self, connection: Connection, instance: str, realm: str, keys: Sequence[bytes],
        tables: Sequence[LoggedTable], held: bytes | None,
    ) -> None:  # fmt: skip
        self.connection = connection
        self.instance = instance
        self.realm = realm
        self.keys = keys
        self.found = Report()
        self.replay = Replay(instance, found=self.found, realm=realm)
        self.ledger = Ledger(tables, self.found)
        self.kept = None if held is None else opened(held, keys, self.found, name=HELD)
        self.failures = -1
        self.created = ""
        self.stored: set[tuple[str, int]] = set()

    def run(self, *, opening: bool) -> Verdict:
        # 1. The leaves in order, each with its place in the index and the tree.
        self._held()
        for batch in self._batches():
            self._batch(batch)
        # 2. What lies beyond the end of the log.
        self._beyond()
        # 3. The head, and the database's own row.
        self._head()
        self._instance()
        # 4. Every row of every table.
        self.ledger.compare(self.connection, opening=opening)
        return self.found.verdict(
            f"audit log of {self.instance}", simulated=self.realm == "simulated"
        )

    def _batches(self) -> Iterator[list[Row[Any]]]:
        last = -(2**62)
        while True:
            rows = self.connection.execute(
                select(AUDIT).where(AUDIT.c.seq > last).order_by(AUDIT.c.seq).limit(BATCH)
            ).all()
            if not rows:
                return
            last = rows[-1].seq
            yield list(rows)

    def _batch(self, rows: list[Row[Any]]) -> None:
        start = self.replay.size
        completed: dict[tree.Node, bytes] = {}
        checkpoints = self._checkpoints(start, start + len(rows))
        for row in rows:
            place = self.replay.size
            self.found.require(
                report.LEAF_PLACE, row.seq == place, f"leaf {place} is missing",
                observed=row.seq, expected=place,
            )  # fmt: skip
            leaf, nodes = self.replay.take(bytes(row.leaf))
            completed.update(nodes)
            if leaf is not None:
                self._note(place, leaf, row)
            for checkpoint in checkpoints.get(self.replay.size, ()):
                self._checkpoint(checkpoint)
            self._held()
        self._nodes(start, self.replay.size, completed)

    def _note(self, place: int, leaf: dict[str, Any], row: Row[Any]) -> None:
        change = change_of(leaf)
        indexed = change or Change("", 0, "")
        self.found.require(
            report.INDEX, (row.object, row.version) == (indexed.object, indexed.version),
            f"leaf {place}: the index names {row.object!r} version {row.version}",
            expected=f"{indexed.object!r} version {indexed.version}",
        )  # fmt: skip
        if change is not None:
            self.ledger.note(place, change)
        if leaf.get("action") == FAILURE_ACTION:
            self.failures = place
        if place == 0:
            self.created = str(leaf.get("time"))[:19] + "Z"

    def _nodes(self, start: int, stop: int, completed: dict[tree.Node, bytes]) -> None:
        levels = range(1, max(stop, 1).bit_length())
        ranges = [
            and_(
                AUDIT_NODE.c.level == level,
                AUDIT_NODE.c.position >= start >> level,
                AUDIT_NODE.c.position < stop >> level,
            )
            for level in levels
            if start >> level < stop >> level
        ]
        rows = self.connection.execute(select(AUDIT_NODE).where(or_(*ranges))) if ranges else ()
        stored = {(row.level, row.position): bytes(row.hash) for row in rows}
        for node, value in completed.items():
            level, position = node
            self.found.require(
                report.NODE, stored.get(node) == value,
                f"node {position} of level {level} is "
                f"{'missing' if node not in stored else 'not the one of its leaves'}",
            )  # fmt: skip

    def _checkpoints(self, start: int, stop: int) -> dict[int, list[Row[Any]]]:
        """The stored checkpoints of more than ``start`` and at most ``stop`` leaves, by size."""
        size = AUDIT_CHECKPOINT.c.size
        query = select(AUDIT_CHECKPOINT).where(size > start, size <= stop)
        found: dict[int, list[Row[Any]]] = {}
        for row in self.connection.execute(query):
            found.setdefault(row.size, []).append(row)
        return found

    def _checkpoint(self, row: Row[Any]) -> None:
        self.stored.add((row.origin, row.size))
        checkpoint = self.replay.checkpoint(bytes(row.note), self.keys)
        if checkpoint is not None:
            self.found.require(
                report.STORED_CHECKPOINT, row.origin == checkpoint.origin,
                f"the checkpoint of {row.size} leaves stands under {row.origin!r}",
            )  # fmt: skip

    def _beyond(self) -> None:
        size = self.replay.size
        query = select(AUDIT_NODE.c.level, AUDIT_NODE.c.position)
        for level, position in self.connection.execute(query):
            if level < 1 or position < 0 or position + 1 > size >> level:
                self.found.fail(report.NODE, f"node {position} of level {level} has no leaves")
        outside = (AUDIT_CHECKPOINT.c.size > size) | (AUDIT_CHECKPOINT.c.size <= 0)
        for row in self.connection.execute(select(AUDIT_CHECKPOINT).where(outside)):
            self.stored.add((row.origin, row.size))
            self.found.fail(
                report.STORED_CHECKPOINT,
                f"checkpoint of {row.size} leaves: the log has {size}; leaves were cut off",
            )
        for origin, count in sorted(self.replay.named - self.stored):
            self.found.fail(
                report.STORED_CHECKPOINT, f"checkpoint of {count} leaves of {origin}: it is gone"
            )
        if self.kept is not None and self.kept.size > size:
            self.found.fail(
                report.CHECKPOINT_HELD,
                f"rolled back: the log has {size} leaves, it had {self.kept.size}",
                observed=size, expected=self.kept.size,
            )  # fmt: skip

    def _held(self) -> None:
        if self.kept is not None and self.kept.size == self.replay.size:
            self.found.require(
                report.CHECKPOINT_HELD, self.kept.root == self.replay.root,
                f"the first {self.kept.size} leaves are not those of the checkpoint kept outside",
                observed=self.replay.root.hex(), expected=self.kept.root.hex(),
            )  # fmt: skip

    def _head(self) -> None:
        rows = self.connection.execute(select(AUDIT_HEAD.c.id)).scalars().all()
        self.found.require(
            report.HEAD, list(rows) == [1], f"there are {len(rows)} head rows, not row 1 alone"
        )
        try:
            head = read_head(self.connection)
        except CaiError as error:
            self.found.fail(report.HEAD, error.message)
            return
        replay = self.replay
        if head.size > replay.size:
            self.found.fail(
                report.LEAF_PLACE, f"leaf {replay.size} is missing, and those after it",
                observed=replay.size, expected=head.size,
            )  # fmt: skip
        own = head.origin or Replay(self.instance, found=self.found).origin
        if head.checkpoint and (own, head.checkpoint) not in self.stored:
            self.found.fail(
                report.STORED_CHECKPOINT, f"checkpoint of {head.checkpoint} leaves: it is gone"
            )
        newest = max((size for origin, size in self.stored if origin == own), default=0)
        for name, observed, expected in (
            ("size", head.size, replay.size),
            ("changes", head.changes, replay.changes),
            ("frontier", head.frontier, replay.frontier),
            ("origin", own, replay.origin),
            ("checkpoint", head.checkpoint, newest),
            ("failures", head.failures, self.failures),
        ):
            self.found.require(
                report.HEAD, observed == expected, f"its {name} is not the one of the leaves",
                observed=None if name == "frontier" else observed,
                expected=None if name == "frontier" else expected,
            )  # fmt: skip

    def _instance(self) -> None:
        rows = self.connection.execute(select(INSTANCE)).all()
        expected = [(self.instance, self.realm, self.created)]
        self.found.require(
            report.ROW, [tuple(row) for row in rows] == expected,
            "instance: the row is not the one of the first leaf",
            observed=[tuple(row) for row in rows], expected=expected,
        )  # fmt: skip
