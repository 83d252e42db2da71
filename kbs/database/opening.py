"""Opening the database that the settings name, with the tables that this program needs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from sqlalchemy import Connection, text

from cai.errors import from_os_error
from kbs.database.engine import Database
from kbs.database.schema import require_current, upgrade
from kbs.database.settings import DatabaseSettings
from kbs.database.tables import INSTANCE

DATABASE_NAME: Final = "kbs.sqlite"
"""The SQLite database in the data directory."""


def connect(data: Path, settings: DatabaseSettings) -> Database:
    """Connect, whatever the schema is; an SQLite file is made where missing (0600).

    Raises:
        StorageError: it cannot be opened or written.
        Unavailable: nobody answers there.
        FormatError: it is not a database.
    """
    if settings.parsed is not None:
        return Database.open(
            settings.parsed, password=settings.password(), pool=settings.pool
        )
    path = data / DATABASE_NAME
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600))
    except OSError as error:
        raise from_os_error(error, f"open database {path}") from error
    return Database.open(f"sqlite:///{path.absolute()}", pool=settings.pool)


def open_database(data: Path, settings: DatabaseSettings) -> Database:
    """Connect and see to the tables: SQLite is made and upgraded, PostgreSQL is only looked at.

    Raises:
        SettingError: PostgreSQL with an older schema; other replicas may still run its program.
        FormatError: a newer program made the tables, or it is not a database.
        StorageError, Unavailable: it cannot be opened.
    """
    database = connect(data, settings)
    try:
        if database.is_shared:
            require_current(database)
        else:
            upgrade(database)
    except BaseException:
        database.close()
        raise
    return database


def hold_creation(connection: Connection) -> None:
    """Let one program at a time fill an empty database, until this transaction ends.

    On SQLite every write transaction does that already.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text(f"LOCK TABLE {INSTANCE.name} IN SHARE ROW EXCLUSIVE MODE"))
