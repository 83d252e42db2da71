"""Policies and reference values: sealed rows, held against the newest audit leaf about each.

The leaf names the version and the hash of the stored row, so a row that was exchanged, put back to
an older version or deleted behind the broker's back is found at its next use (decisions §6). Every
version stays readable; who wrote it and when is what its leaf says.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sqlalchemy import Connection, Table, func, insert, select, tuple_

from cai.errors import InputMissing, Tampered
from kbs.audit.leaf import change_of, parse_leaf
from kbs.audit.log import Change, logged_change, newest_change
from kbs.database.tables import AUDIT
from kbs.keys.sealing import RowIdentity, Sealer, row_hash


@dataclass(frozen=True, slots=True)
class Stored:
    """An opened row."""

    contents: bytes
    version: int


@dataclass(frozen=True, slots=True)
class VersionNote:
    """One version of an object, as its audit leaf notes it.

    Attributes:
        version: counts from 1.
        time: of the change, RFC 3339.
        author: who asked for it.
        action: e.g. ``policy.set``.
        row_hash: SHA-256 of the stored row, hex; empty when this version is a removal.
    """

    version: int
    time: str
    author: str
    action: str
    row_hash: str

    @property
    def removed(self) -> bool:
        """The object was taken away."""
        return not self.row_hash


class VersionedRows:
    """The rows of one table that keeps every version.

    Args:
        table: ``POLICY`` or ``REFERENCE``: ``path``, ``version``, ``sealed``.
        instance: id of the database.
        realm: its realm.
        sealer: opens and seals.
    """

    def __init__(self, table: Table, *, instance: str, realm: str, sealer: Sealer) -> None:
        self._table = table
        self._instance = instance
        self._realm = realm
        self._sealer = sealer

    def get(self, connection: Connection, path: str) -> Stored | None:
        """The newest version, or ``None`` when there is none.

        Raises:
            Tampered: the row is not the one that the audit log says is newest.
        """
        return self.get_many(connection, (path,)).get(path)

    def get_many(self, connection: Connection, paths: Iterable[str]) -> dict[str, Stored]:
        """The newest versions of those among ``paths`` that exist, in two queries.

        Raises:
            Tampered: a row is not the one that the audit log says is newest.
        """
        wanted = list(dict.fromkeys(paths))
        logged = _newest_changes(connection, [self.object_name(path) for path in wanted])
        newest = (
            select(self._table.c.path, func.max(self._table.c.version))
            .where(self._table.c.path.in_(wanted))
            .group_by(self._table.c.path)
        )
        columns = self._table.c
        rows = connection.execute(
            select(columns.path, columns.version, columns.sealed).where(
                tuple_(columns.path, columns.version).in_(newest)
            )
        )
        stored = {row.path: row for row in rows}
        found: dict[str, Stored] = {}
        for path in wanted:
            change, row = logged.get(self.object_name(path)), stored.get(path)
            if row is None:
                if change is not None and change.row_hash:
                    raise Tampered(
                        f"{self.object_name(path)}: the row is gone, the audit log has it"
                    )
                continue
            if change is not None and not change.row_hash and row.version < change.version:
                continue
            self._require(path, row.version, row.sealed, change)
            found[path] = self._open(path, row.version, row.sealed)
        return found

    def version(self, connection: Connection, path: str, version: int) -> Stored:
        """One version, old or new.

        Raises:
            InputMissing: there is none, or it is a removal.
            Tampered: the row is not the one that the audit log says was stored.
        """
        logged = logged_change(connection, self.object_name(path), version)
        if logged is None or not logged.row_hash:
            raise InputMissing(f"{self.object_name(path)} has no version {version}")
        columns = self._table.c
        sealed = connection.execute(
            select(columns.sealed).where(columns.path == path).where(columns.version == version)
        ).scalar()
        if sealed is None:
            raise Tampered(f"{self.object_name(path)}: version {version} is gone")
        self._require(path, version, sealed, logged)
        return self._open(path, version, sealed)

    def put(self, connection: Connection, path: str, contents: bytes) -> Change:
        """Store the next version inside the caller's transaction, which must log the change."""
        version = self._next(connection, path)
        sealed = self._sealer.seal(self._identity(path, version), contents)
        connection.execute(
            insert(self._table).values(path=path, version=version, sealed=sealed)
        )
        return Change(self.object_name(path), version, row_hash(sealed))

    def remove(self, connection: Connection, path: str) -> Change:
        """Take an object away inside the caller's transaction, which must log the change.

        Its old versions stay readable.

        Raises:
            InputMissing: there is none.
        """
        if self.get(connection, path) is None:
            raise InputMissing(f"there is no {self.object_name(path)}")
        return Change(self.object_name(path), self._next(connection, path), "")

    def paths(self, connection: Connection, prefix: str = "") -> list[str]:
        """Paths of the living objects, as the audit log has them, in order."""
        start = self.object_name(prefix)
        within = AUDIT.c.object.startswith(start, autoescape=True)
        names = connection.execute(select(AUDIT.c.object).distinct().where(within)).scalars()
        newest = _newest_changes(connection, list(names))
        skip = len(self.object_name(""))
        return sorted(name[skip:] for name, change in newest.items() if change.row_hash)

    def history(self, connection: Connection, path: str) -> list[VersionNote]:
        """Every version of an object, oldest first; empty when it never was.

        Raises:
            FormatError: a leaf is not canonical JSON; the log was edited.
        """
        leaves = connection.execute(
            select(AUDIT.c.leaf)
            .where(AUDIT.c.object == self.object_name(path))
            .order_by(AUDIT.c.seq)
        ).scalars()
        return [_note(leaf) for leaf in leaves]

    def object_name(self, path: str) -> str:
        """What the audit log calls an object of this table."""
        return f"{self._table.name}/{path}"

    def _next(self, connection: Connection, path: str) -> int:
        logged = newest_change(connection, self.object_name(path))
        return 1 if logged is None else logged.version + 1

    def _require(self, path: str, version: int, sealed: bytes, logged: Change | None) -> None:
        if logged != Change(self.object_name(path), version, row_hash(sealed)):
            raise Tampered(
                f"{self.object_name(path)}: the stored row is not the one in the audit log",
                hint="the database was edited; restore it from a backup",
            )

    def _open(self, path: str, version: int, sealed: bytes) -> Stored:
        return Stored(self._sealer.open(self._identity(path, version), sealed), version)

    def _identity(self, path: str, version: int) -> RowIdentity:
        return RowIdentity(self._instance, self._realm, self._table.name, path, version)


def _newest_changes(connection: Connection, names: list[str]) -> dict[str, Change]:
    """What the newest leaf about each of these objects says it is now."""
    newest = select(func.max(AUDIT.c.seq)).where(AUDIT.c.object.in_(names)).group_by(AUDIT.c.object)
    leaves = connection.execute(
        select(AUDIT.c.object, AUDIT.c.leaf).where(AUDIT.c.seq.in_(newest))
    )
    found: dict[str, Change] = {}
    for row in leaves:
        change = change_of(parse_leaf(row.leaf))
        if change is None or change.object != row.object:
            raise Tampered(f"{row.object}: the audit log's index names another leaf")
        found[row.object] = change
    return found


def _note(leaf: bytes) -> VersionNote:
    value = parse_leaf(leaf)
    change, actor = change_of(value), value.get("actor")
    return VersionNote(
        change.version if change else 0,
        str(value.get("time", "")),
        str(actor.get("name", "")) if isinstance(actor, dict) else "",
        str(value.get("action", "")),
        change.row_hash if change else "",
    )
