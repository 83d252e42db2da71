"""What the log says that the tables hold, and how a table is held against it.

Each table is described by its room; nothing here knows how a row is sealed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from sqlalchemy import Connection

from cai.errors import CaiError
from kbs.audit.leaf import Change
from kbs.audit.report import ROW, Report


class Kept(StrEnum):
    """Which versions of an object have a row."""

    ALL = "all"
    NEWEST = "newest"
    UNTIL_ENDED = "until ended"
    """The newest, until it ends by itself; its end is not logged."""


@dataclass(frozen=True, slots=True)
class StoredRow:
    """A row as it is now.

    Attributes:
        change: its object, version and hash, computed from the stored columns.
        open: checks what the hash does not cover; raises ``CaiError``.
    """

    change: Change
    open: Callable[[], object] | None = None


@dataclass(frozen=True, slots=True)
class LoggedTable:
    """A table whose rows the log names.

    Attributes:
        name: of the table, for failures.
        kept: which versions have a row.
        holds: whether an object of this name is one of the table's.
        rows: every row.
        destroys: the object whose versions, up to the change's own, a leaf about another object
            says were destroyed for good; ``None`` where it is no such leaf.
    """

    name: str
    kept: Kept
    holds: Callable[[str], bool]
    rows: Callable[[Connection], Iterable[StoredRow]]
    destroys: Callable[[str], str | None] = lambda _name: None


class Ledger:
    """Everything that the log says about stored rows.

    Args:
        tables: every table that it may name.
        report: collects what is found.
    """

    def __init__(self, tables: Sequence[LoggedTable], report: Report) -> None:
        self._tables = tables
        self._report = report
        self._newest: dict[str, Change] = {}
        self._versions: dict[tuple[str, int], str] = {}
        self._destroyed: dict[str, int] = {}

    def note(self, seq: int, change: Change) -> None:
        """Take the change of leaf ``seq``; leaves come in order."""
        for table in self._tables:
            if table.holds(change.object):
                self._newest[change.object] = change
                if table.kept is Kept.ALL:
                    self._versions[change.object, change.version] = change.row_hash
                return
            destroyed = table.destroys(change.object)
            if destroyed is not None:
                upto = max(change.version, self._destroyed.get(destroyed, 0))
                self._destroyed[destroyed] = upto
                return
        self._report.fail(ROW, f"leaf {seq} is about {change.object}: no table holds such objects")

    def compare(self, connection: Connection, *, opening: bool) -> None:
        """Hold every row of every table against the log.

        Args:
            connection: a consistent view of the tables.
            opening: check also what the hashes do not cover.
        """
        for table in self._tables:
            seen: set[tuple[str, int]] = set()
            for row in table.rows(connection):
                change = row.change
                seen.add((change.object, change.version))
                wrong = self._wrong(table, change)
                if wrong is None and opening and row.open is not None:
                    try:
                        row.open()
                    except CaiError as error:
                        wrong = error.message
                name = f"{change.object} version {change.version}"
                self._report.require(ROW, wrong is None, f"{name}: {wrong}")
            self._missing(table, seen)

    def _wrong(self, table: LoggedTable, found: Change) -> str | None:
        newest = self._newest.get(found.object)
        if newest is None or not table.holds(found.object):
            return "the log has no such object"
        if found.version <= self._destroyed.get(found.object, 0):
            return "it was destroyed, and is back"
        if table.kept is Kept.ALL:
            logged = self._versions.get((found.object, found.version))
            if logged is None:
                return "the log has no such version"
        elif newest.row_hash and found.version != newest.version:
            return f"the newest version is {newest.version}"
        else:
            logged = newest.row_hash
        if not logged:
            return "it was removed, and is back"
        return None if logged == found.row_hash else "the row was changed"

    def _missing(self, table: LoggedTable, seen: set[tuple[str, int]]) -> None:
        if table.kept is Kept.UNTIL_ENDED:
            return
        if table.kept is Kept.ALL:
            named = [place for place, row_hash in self._versions.items() if row_hash]
        else:
            named = [
                (change.object, change.version)
                for change in self._newest.values()
                if change.row_hash
            ]
        for name, version in named:
            gone = (name, version) not in seen and version > self._destroyed.get(name, 0)
            if gone and table.holds(name):
                self._report.fail(ROW, f"{name} version {version}: the row is gone")
