"""Every table that the audit log vouches for, and the walk that holds them all against it.

It stands above the rooms that own the tables: each row's hash and identity are as its room makes
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

from sqlalchemy import Connection, Row, Table, select

from cai import jcs
from cai.attest.verdict import Check, Verdict, check
from cai.errors import CaiError, Tampered
from kbs.admin.people import AdminRecord
from kbs.admin.tokens import key_id
from kbs.audit.leaf import Change
from kbs.audit.report import CHECKPOINT_SIGNATURE
from kbs.audit.stored import Kept, LoggedTable, StoredRow
from kbs.audit.walk import verify_database
from kbs.core import Core
from kbs.database.tables import (
    ADMIN,
    BLOCK,
    LEASE,
    POLICY,
    PROPOSAL,
    REFERENCE,
    RESOURCE,
    ROW_KEY,
    SECRET,
    SIGNING_KEY,
)
from kbs.keys import rowkey
from kbs.keys.provider import WrappedKey
from kbs.keys.sealing import RowIdentity, row_hash
from kbs.keys.signing import KeyName, object_name
from kbs.release.lease import MAX_RECORD, Lease
from kbs.resources.rows import version_of
from kbs.resources.store import SealedResource
from kbs.resources.store import object_name as resource_name

ROWS_AT_ONCE: Final = 200
"""Rows that are read from a table at a time."""

Opened = Callable[[Row[Any], bytes], None]
"""Holds what stands in clear in a row against its opened contents."""


def verify_log(core: Core, *, held: bytes | None = None, opening: bool = True) -> Verdict:
    """Walk the audit log and every row that it names.

    Args:
        core: an open broker's state.
        held: a checkpoint kept outside; the log must be that one or extend it.
        opening: also open each row, which asks the key provider for each resource version.
    """
    instance = core.instance
    trouble: tuple[Check, ...] = ()
    try:
        keys = core.checkpoints.public_keys()
    except CaiError as error:
        # The walk goes on without: it names the row, and what else is wrong.
        keys = ()
        trouble = (check(CHECKPOINT_SIGNATURE, passed=False, reason=error.message),)
    with core.database.read() as connection:
        verdict = verify_database(
            connection,
            instance=instance.id,
            realm=instance.realm.value,
            keys=keys,
            tables=logged_tables(core),
            held=held,
            opening=opening,
        )
    return verdict.extended(trouble)


def logged_tables(core: Core) -> tuple[LoggedTable, ...]:
    """Every table whose rows the log names."""
    return (
        _Sealed(core, POLICY, Kept.ALL).described,
        _Sealed(core, REFERENCE, Kept.ALL).described,
        _Sealed(core, ADMIN, Kept.NEWEST, opened=_administrator).described,
        _Sealed(core, PROPOSAL, Kept.NEWEST).described,
        _Sealed(core, BLOCK, Kept.NEWEST, key="id").described,
        _Sealed(core, LEASE, Kept.UNTIL_ENDED, key="id", opened=_lease).described,
        _resources(core),
        _signing_keys(core),
        _row_key(),
        _Sealed(core, SECRET, Kept.NEWEST, only=(f"{SECRET.name}/admin-key",)).described,
    )


class _Sealed:
    """A table of sealed rows: a key, a version, and what stands in clear besides."""

    def __init__(
        self, core: Core, table: Table, kept: Kept, *, key: str = "path",
        opened: Opened | None = None, only: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        self._core = core
        self._table = table
        self._key = key
        self._opened = opened
        prefix = f"{table.name}/"
        self.described = LoggedTable(
            table.name, kept,
            lambda name: name in only if only else name.startswith(prefix), self._rows,
        )  # fmt: skip

    def _rows(self, connection: Connection) -> Iterator[StoredRow]:
        for row in _each(connection, self._table):
            path = getattr(row, self._key)
            change = Change(f"{self._table.name}/{path}", row.version, row_hash(bytes(row.sealed)))
            yield StoredRow(change, partial(self._open, row, path))

    def _open(self, row: Row[Any], path: str) -> None:
        instance = self._core.instance
        identity = RowIdentity(
            instance.id, instance.realm.value, self._table.name, path, row.version
        )
        contents = instance.sealer.open(identity, bytes(row.sealed))
        if self._opened is not None:
            self._opened(row, contents)


def _administrator(row: Row[Any], contents: bytes) -> None:
    if row.key_id != key_id(AdminRecord.parse(contents).key):
        raise Tampered("the id of its key was changed")


def _lease(row: Row[Any], contents: bytes) -> None:
    lease = Lease.from_json(jcs.parse_canonical(contents, what="lease", limit=MAX_RECORD))
    if lease.ends != row.ends:
        raise Tampered("its end was changed")


def _resources(core: Core) -> LoggedTable:
    instance, prefix = core.instance, resource_name("")

    def rows(connection: Connection) -> Iterator[StoredRow]:
        for row in _each(connection, RESOURCE):
            stored = version_of(row, instance=instance.id, realm=instance.realm.value)
            name = resource_name(row.path)
            if stored is None:
                yield StoredRow(Change(name, row.version, "no such lease rule"))
                continue
            identity = stored.identity
            sealed = SealedResource(
                identity.path, identity.version, identity.owner, identity.model, identity.lease,
                stored,
            )  # fmt: skip
            change = Change(name, row.version, stored.row_hash)
            yield StoredRow(change, partial(core.resources.open, sealed))

    def destroys(name: str) -> str | None:
        kind, _, path = name.partition("/")
        return resource_name(path) if kind == "purged" else None

    return LoggedTable(
        RESOURCE.name, Kept.ALL, lambda name: name.startswith(prefix), rows, destroys
    )


def _signing_keys(core: Core) -> LoggedTable:
    names = {object_name(name) for name in KeyName}

    def rows(connection: Connection) -> Iterator[StoredRow]:
        trouble: dict[str, CaiError] = {}
        for name in KeyName:
            try:
                core.signing.living(connection, name, core.clock())
            except CaiError as error:
                trouble[name.value] = error
        for row in _each(connection, SIGNING_KEY):
            change = Change(f"secret/{row.name}-key", row.version, row_hash(bytes(row.sealed)))
            yield StoredRow(change, partial(_raise, trouble.get(row.name)))

    return LoggedTable(SIGNING_KEY.name, Kept.ALL, names.__contains__, rows)


def _row_key() -> LoggedTable:
    def rows(connection: Connection) -> Iterator[StoredRow]:
        for row in connection.execute(select(ROW_KEY)):
            state = rowkey.RowKeyState(
                row.generation, WrappedKey(row.provider, bytes(row.wrapped)), bytes(row.commitment)
            )
            # A second row would be nobody's.
            change = state.change if row.id == 1 else Change(f"row_key/{row.id}", 0, "")
            yield StoredRow(change)

    return LoggedTable(ROW_KEY.name, Kept.NEWEST, lambda name: name == rowkey.OBJECT, rows)


def _each(connection: Connection, table: Table) -> Iterator[Row[Any]]:
    """Every row, read a few at a time."""
    query = select(table).order_by(*table.primary_key.columns)
    yield from connection.execute(query.execution_options(yield_per=ROWS_AT_ONCE))


def _raise(error: CaiError | None) -> None:
    if error is not None:
        raise error
