"""The row key: one key for the sealed rows of a database, itself wrapped by the key provider.

Rotating the provider wraps it anew; the rows under it stay as they are.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from hashlib import sha256

from sqlalchemy import Connection, insert, select, update

from cai import jcs
from cai.errors import InputMissing, Tampered, WrongKey
from cai.secret import Secret
from kbs.audit.log import Change, newest_change
from kbs.database.tables import ROW_KEY
from kbs.keys.keyring import Keyring
from kbs.keys.provider import KEY_SIZE, WrappedKey, commitment, require_commitment

OBJECT = "secret/row-key"
"""What the audit log calls it."""


@dataclass(frozen=True, slots=True)
class RowKeyState:
    """The row key as stored.

    Attributes:
        generation: counts the rotations, from 1.
        wrapped: the wrapped key; its provider is the one that wraps what is new.
        commitment: names the key inside.
    """

    generation: int
    wrapped: WrappedKey
    commitment: bytes

    @property
    def change(self) -> Change:
        """The state as the audit log knows it."""
        value = {
            "generation": self.generation,
            "provider": self.wrapped.provider,
            "wrapped": self.wrapped.blob.hex(),
            "commitment": self.commitment.hex(),
        }
        return Change(OBJECT, self.generation, sha256(jcs.canonical(value)).hexdigest())


def context_of(instance: str, realm: str) -> bytes:
    """What the row key is for."""
    return jcs.canonical({"use": "row-key", "instance": instance, "realm": realm})


def new_row_key(keyring: Keyring, *, instance: str, realm: str) -> tuple[RowKeyState, Secret]:
    """Make a row key and wrap it by the default provider; slow, before any transaction.

    Raises:
        CaiError: the provider refuses.
    """
    key, context = Secret(os.urandom(KEY_SIZE)), context_of(instance, realm)
    wrapped = keyring.wrap(keyring.named(keyring.default).id, key, context)
    return RowKeyState(1, wrapped, commitment(key, context)), key


def store_row_key(connection: Connection, state: RowKeyState) -> Change:
    """Store the state of a new database; the caller logs the change."""
    connection.execute(insert(ROW_KEY).values(id=1, **_columns(state)))
    return state.change


def replace_row_key(connection: Connection, state: RowKeyState) -> Change:
    """Store the state after a rotation; the caller logs the change."""
    connection.execute(update(ROW_KEY).where(ROW_KEY.c.id == 1).values(**_columns(state)))
    return state.change


def row_key_state(connection: Connection) -> RowKeyState:
    """The stored state.

    Raises:
        InputMissing: there is none.
        Tampered: it is not the one in the audit log.
    """
    row = connection.execute(select(ROW_KEY).where(ROW_KEY.c.id == 1)).one_or_none()
    if row is None:
        raise InputMissing("the database has no row key", hint="restore it from a backup")
    state = RowKeyState(
        row.generation, WrappedKey(row.provider, row.wrapped), row.commitment
    )
    if newest_change(connection, OBJECT) != state.change:
        raise Tampered(
            f"{OBJECT}: the stored row is not the one in the audit log",
            hint="the database was edited; restore it from a backup",
        )
    return state


def open_row_key(state: RowKeyState, keyring: Keyring, *, instance: str, realm: str) -> Secret:
    """Unwrap the row key; slow, outside any transaction.

    Raises:
        WrongKey: the provider has another key, or the database is another's.
        Unavailable: the provider does not answer.
    """
    context = context_of(instance, realm)
    if state.wrapped.provider not in keyring.names.values():
        raise WrongKey(
            f"this database is under key provider {state.wrapped.provider}, not under"
            f" {', '.join(keyring.names.values())}",
            hint="configure the key provider that it was made with or rotated to",
        )
    try:
        key = keyring.unwrap(state.wrapped, context)
        require_commitment(key, context, state.commitment, provider=state.wrapped.provider)
    except Tampered as error:
        raise WrongKey(
            "the key encryption key does not open this database",
            hint="configure the key provider that it was made with or rotated to",
        ) from error
    return key


def _columns(state: RowKeyState) -> dict[str, object]:
    return {
        "generation": state.generation,
        "provider": state.wrapped.provider,
        "wrapped": state.wrapped.blob,
        "commitment": state.commitment,
    }
