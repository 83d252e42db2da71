"""Rows of the administration: sealed, and held against the newest audit leaf about them.

Like resources and policies (decisions §6), but a removed row leaves a tombstone in the log only:
its contents are gone from the database.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import Connection, Table, delete, insert, select

from cai.errors import Tampered
from kbs.audit.log import Change, newest_change
from kbs.core import Core
from kbs.keys.sealing import RowIdentity, row_hash


@dataclass(frozen=True, slots=True)
class AdminRow:
    """An opened row and the leaf that vouches for it."""

    path: str
    contents: bytes
    change: Change


class AdminRows:
    """The rows of one table with columns ``path``, ``version`` and ``sealed``.

    Args:
        table: ``ADMIN`` or ``PROPOSAL``.
        core: the broker's state.
    """

    def __init__(self, table: Table, core: Core) -> None:
        self._table = table
        self._core = core

    def newest(self, connection: Connection, path: str) -> Change | None:
        """What the audit log says about this row; an empty ``row_hash`` means removed."""
        return newest_change(connection, f"{self._table.name}/{path}")

    def get(self, connection: Connection, path: str) -> AdminRow | None:
        """The row, or ``None`` when there is none.

        Raises:
            Tampered: the row is not the one that the audit log says is newest.
        """
        table = self._table
        row = connection.execute(
            select(table.c.version, table.c.sealed).where(table.c.path == path)
        ).one_or_none()
        name = f"{table.name}/{path}"
        logged = newest_change(connection, name)
        if row is None:
            if logged is not None and logged.row_hash:
                raise Tampered(f"{name}: the row is gone, the audit log has it")
            return None
        if logged != Change(name, row.version, row_hash(row.sealed)):
            raise Tampered(
                f"{name}: the stored row is not the one in the audit log",
                hint="the database was edited; restore it from a backup",
            )
        sealer = self._core.instance.sealer
        return AdminRow(path, sealer.open(self._identity(path, row.version), row.sealed), logged)

    def paths(self, connection: Connection) -> list[str]:
        """Every stored path in order."""
        column = self._table.c.path
        return list(connection.execute(select(column).order_by(column)).scalars())

    def put(
        self, connection: Connection, path: str, contents: bytes, **columns: object
    ) -> Change:
        """Store the next version inside the caller's transaction, which must log the change.

        Args:
            connection: of the transaction.
            path: key of the row.
            contents: to be sealed.
            columns: further columns in clear, which the reader must hold against the contents.
        """
        version = self._next_version(connection, path)
        sealed = self._core.instance.sealer.seal(self._identity(path, version), contents)
        self._delete(connection, path)
        values: Mapping[str, object] = {
            "path": path, "version": version, "sealed": sealed, **columns,
        }  # fmt: skip
        connection.execute(insert(self._table).values(values))
        return Change(f"{self._table.name}/{path}", version, row_hash(sealed))

    def remove(self, connection: Connection, path: str) -> Change:
        """Remove the row; the returned tombstone must be logged in the same transaction."""
        version = self._next_version(connection, path)
        self._delete(connection, path)
        return Change(f"{self._table.name}/{path}", version, "")

    def _delete(self, connection: Connection, path: str) -> None:
        connection.execute(delete(self._table).where(self._table.c.path == path))

    def _next_version(self, connection: Connection, path: str) -> int:
        logged = self.newest(connection, path)
        return 1 if logged is None else logged.version + 1

    def _identity(self, path: str, version: int) -> RowIdentity:
        instance = self._core.instance
        return RowIdentity(instance.id, instance.realm.value, self._table.name, path, version)
