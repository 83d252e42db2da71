"""Rotation of the key provider: the row key and every data key, wrapped anew in one change.

The keys themselves stay, and so does every row that they seal; only their wrappings are exchanged,
so nobody who uses the broker notices, and the key encryption key before can be destroyed. All the
slow work comes first; the change is one transaction, so a crash leaves either the old wrappings or
the new ones, never a mixture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, bindparam, func, select, update

from cai.errors import CaiError, Tampered
from cai.secret import Secret
from kbs.audit.log import Change
from kbs.database.engine import Database
from kbs.database.tables import RESOURCE, ROW_KEY
from kbs.keys.keyring import Keyring
from kbs.keys.provider import COMMITMENT_SIZE, WrappedKey, require_commitment
from kbs.keys.rowkey import (
    RowKeyState,
    context_of,
    open_row_key,
    replace_row_key,
    row_key_state,
)
from kbs.resources.rows import StoredVersion, version_of
from kbs.resources.store import Stale


@dataclass(frozen=True, slots=True)
class Rewrapped:
    """Every key under its new wrapping, not yet stored.

    Attributes:
        before: the row key's state that it was made from.
        after: its new state.
        data_keys: old and new wrapping of each stored version, by path and version.
    """

    before: RowKeyState
    after: RowKeyState
    data_keys: dict[tuple[str, int], tuple[WrappedKey, WrappedKey]]


class Rotation:
    """Wraps the keys of one database anew.

    Args:
        database: for the read phase.
        keyring: the providers.
        instance: id of the database.
        realm: its realm.
    """

    def __init__(
        self, database: Database, keyring: Keyring, *, instance: str, realm: str
    ) -> None:
        self._database = database
        self._keyring = keyring
        self._instance = instance
        self._realm = realm
        # What was wrapped in a round that came too late serves the next one.
        self._done: dict[tuple[str, WrappedKey], WrappedKey] = {}

    def prepare(self, name: str) -> Rewrapped:
        """Wrap every key by the provider of this name; slow, outside any transaction.

        Each new wrapping is unwrapped again and compared before anything is stored.

        Raises:
            InputMissing: no provider is called so.
            Unavailable: a provider does not answer now.
            Tampered: a stored key does not open, or the new provider gives back another.
        """
        target = self._keyring.named(name).id
        with self._database.read() as connection:
            before = row_key_state(connection)
            rows = connection.execute(_WRAPPINGS).all()
        key = open_row_key(
            before, self._keyring, instance=self._instance, realm=self._realm
        )
        context = context_of(self._instance, self._realm)
        wrapped = self._wrap_and_try(target, key, context, "the row key")
        after = RowKeyState(before.generation + 1, wrapped, before.commitment)
        data_keys = {
            (row.path, row.version): self._rewrapped(target, row) for row in rows
        }
        return Rewrapped(before, after, data_keys)

    def apply(self, connection: Connection, rewrapped: Rewrapped) -> Change:
        """Store every new wrapping in a deciding transaction, which must log the change.

        Raises:
            Stale: a version was stored or purged, or the keys were rotated; prepare again.
        """
        if row_key_state(connection) != rewrapped.before:
            raise Stale("the keys were rotated meanwhile")
        stored = {
            (row.path, row.version): WrappedKey(row.provider, bytes(row.wrapped))
            for row in connection.execute(_WRAPPINGS)
        }
        if stored != {place: old for place, (old, _) in rewrapped.data_keys.items()}:
            raise Stale("resources were stored or purged meanwhile")
        changes = [
            {"p": path, "v": version, "provider": new.provider, "wrapped": new.blob}
            for (path, version), (_, new) in rewrapped.data_keys.items()
        ]
        if changes:
            connection.execute(
                update(RESOURCE)
                .where(RESOURCE.c.path == bindparam("p"), RESOURCE.c.version == bindparam("v"))
                .values(provider=bindparam("provider"), wrapped=bindparam("wrapped")),
                changes,
            )
        return replace_row_key(connection, rewrapped.after)

    def finish(self) -> None:
        """Forget what was kept for another round."""
        self._done.clear()

    def _rewrapped(self, target: str, row: Any) -> tuple[WrappedKey, WrappedKey]:
        stored = version_of(row, instance=self._instance, realm=self._realm)
        if stored is None:
            raise Tampered(f"resource/{row.path}: version {row.version} is not as it was stored")
        new = self._done.get((target, stored.wrapped))
        if new is None:
            new = self._rewrap(target, stored)
            self._done[target, stored.wrapped] = new
        return stored.wrapped, new

    def _rewrap(self, target: str, stored: StoredVersion) -> WrappedKey:
        identity, context = stored.identity, stored.identity.encode()
        what = f"resource/{identity.path} version {identity.version}"
        try:
            key = self._keyring.unwrap(stored.wrapped, context)
            require_commitment(
                key, context, stored.sealed, provider=stored.wrapped.provider
            )
        except Tampered as error:
            raise Tampered(
                f"{what}: {error.message}",
                hint="nothing was rotated; restore the row from a backup, or purge it",
                code=error.machine_code,
            ) from error
        return self._wrap_and_try(target, key, context, what)

    def _wrap_and_try(
        self, target: str, key: Secret, context: bytes, what: str
    ) -> WrappedKey:
        wrapped = self._keyring.wrap(target, key, context)
        if self._keyring.unwrap(wrapped, context) != key:
            raise Tampered(
                f"{what}: provider {target} does not give back what it wrapped",
                hint="nothing was rotated",
                code="another-key",
            )
        return wrapped


def wrapping_counts(connection: Connection) -> dict[str, int]:
    """How many stored keys each provider wraps, by its id; the row key counts too."""
    counts: dict[str, int] = {}
    for table in (RESOURCE, ROW_KEY):
        rows = connection.execute(
            select(table.c.provider, func.count()).group_by(table.c.provider)
        )
        for provider, count in rows:
            counts[provider] = counts.get(provider, 0) + int(count)
    return counts


def probe(keyring: Keyring, name: str) -> str:
    """Whether a provider wraps and unwraps now: empty, or what it says instead."""
    key, context = Secret(bytes(32)), b"cai/kbs probe"
    try:
        wrapped = keyring.wrap(keyring.named(name).id, key, context)
        if keyring.unwrap(wrapped, context) != key:
            return "it gives back another key"
    except CaiError as error:
        return error.message
    return ""


# The sealed bytes themselves are not needed, only the commitment that they begin with.
_WRAPPINGS = select(
    *(column for column in RESOURCE.c if column.name != "sealed"),
    func.substr(RESOURCE.c.sealed, 1, COMMITMENT_SIZE).label("sealed"),
)
