"""Resources and policies: one sealed row each, held against the newest audit leaf about it.

The leaf names the version and the hash of the stored row, so a row that was exchanged, put back to
an older version or deleted behind the broker's back is found at its next use (decisions §6).
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, Table, delete, insert, select

from cai.errors import Tampered
from kbs.audit.log import Change, newest_change
from kbs.keys.sealing import RowIdentity, Sealer, row_hash


@dataclass(frozen=True, slots=True)
class Stored:
    """An opened row."""

    contents: bytes
    version: int


class SealedRows:
    """The rows of one table.

    Args:
        table: ``RESOURCE`` or ``POLICY``.
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
        table = self._table
        row = connection.execute(
            select(table.c.version, table.c.owner, table.c.sealed).where(table.c.path == path)
        ).one_or_none()
        logged = newest_change(connection, self._object(path))
        if row is None:
            if logged is not None and logged.row_hash:
                raise Tampered(f"{self._object(path)}: the row is gone, the audit log has it")
            return None
        found = Change(self._object(path), row.version, row_hash(row.sealed))
        if logged != found:
            raise Tampered(
                f"{self._object(path)}: the stored row is not the one in the audit log",
                hint="the database was edited; restore it from a backup",
            )
        identity = self._identity(path, row.version, row.owner)
        return Stored(self._sealer.open(identity, row.sealed), row.version)

    def put(self, connection: Connection, path: str, contents: bytes, *, owner: str = "") -> Change:
        """Store the next version inside the caller's transaction, which must log the change."""
        logged = newest_change(connection, self._object(path))
        version = 1 if logged is None else logged.version + 1
        sealed = self._sealer.seal(self._identity(path, version, owner), contents)
        connection.execute(delete(self._table).where(self._table.c.path == path))
        connection.execute(
            insert(self._table).values(path=path, version=version, owner=owner, sealed=sealed)
        )
        return Change(self._object(path), version, row_hash(sealed))

    def _object(self, path: str) -> str:
        return f"{self._table.name}/{path}"

    def _identity(self, path: str, version: int, owner: str) -> RowIdentity:
        return RowIdentity(self._instance, self._realm, self._table.name, path, version, owner)
