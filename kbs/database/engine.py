"""All state of the key broker in one SQL database (SQLite by default)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, inspect
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from cai.errors import CaiError, FormatError, NoSpace, StorageError
from kbs.database.tables import INSTANCE, METADATA

BUSY_SECONDS = 15
"""How long a transaction waits for the one write lock, seconds."""

class Database:
    """One open database.

    Args:
        engine: to a database that ``create`` or ``open_file`` prepared.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @classmethod
    def open_file(cls, path: Path) -> Database:
        """Open or create an SQLite database file; the tables are made where missing.

        Raises:
            StorageError: it cannot be opened or written.
            FormatError: it is not a database.
        """
        engine = create_engine(
            f"sqlite:///{path}", connect_args={"timeout": BUSY_SECONDS}, hide_parameters=True
        )
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        database = cls(engine)
        with _translated(f"open database {path}"):
            if not inspect(engine).has_table(INSTANCE.name):
                with database.write() as connection:
                    METADATA.create_all(connection)
        return database

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that holds the write lock from its start; committed at the end.

        Raises:
            StorageError, NoSpace: the database refused; nothing of the transaction stays.
        """
        with (
            _translated("write to the database"),
            self._engine.connect().execution_options(cai_write=True) as connection,
            connection.begin(),
        ):
            yield connection

    @contextmanager
    def decide(self) -> Iterator[Connection]:
        """A transaction of a decision or an administrative change: one at a time, everywhere.

        It holds the audit head from its start, so whatever it reads (policies, blocks, the newest
        version of a resource) stays true until it commits, on every replica (decisions §6).

        Raises:
            StorageError, NoSpace: the database refused; nothing of the transaction stays.
        """
        with self.write() as connection:
            yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A consistent view.

        Raises:
            StorageError: the database refused.
        """
        with _translated("read the database"), self._engine.connect() as connection:
            yield connection

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    # Transactions are begun below, by us, not by the driver.
    connection.isolation_level = None
    cursor = connection.cursor()
    # A decision must survive a power failure once its answer has left.
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "secure_delete=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("cai_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextmanager
def _translated(doing: str) -> Iterator[None]:
    try:
        yield
    except CaiError:
        raise
    except DBAPIError as error:
        raise _storage_error(error, doing) from error
    except SQLAlchemyError as error:
        raise StorageError(f"{doing}: {type(error).__name__}") from error


def _storage_error(error: DBAPIError, doing: str) -> CaiError:
    # The driver's own text names no parameter; SQLAlchemy's might.
    reason = str(error.orig)
    if "disk is full" in reason:
        return NoSpace(f"{doing}: {reason}", hint="free some space")
    if "not a database" in reason:
        return FormatError(f"{doing}: {reason}", hint="check the data directory")
    return StorageError(f"{doing}: {reason}", hint="check the owner and mode of the data directory")
