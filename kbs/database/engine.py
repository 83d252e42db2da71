"""All state of the key broker in one SQL database: SQLite by default, PostgreSQL for replicas.

Three kinds of transaction, the same on both. ``read`` sees one moment. ``write`` is for rows that
only their owner changes (protocol sessions). ``decide`` is for everything that ends in the audit
log; it holds the log's head row from its start, so decisions and administrative changes of all
replicas happen one after another and what one reads stays true until it commits (decisions §6).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from sqlalchemy import Connection, Engine, create_engine, event, select
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import DBAPIError

from cai.secret import Secret
from kbs.database.tables import AUDIT_HEAD
from kbs.database.trouble import is_passing, translated

BUSY_SECONDS: Final = 15
"""How long a transaction waits for a lock that another holds, seconds."""

PATIENCE_SECONDS: Final = 10
"""How long the start of a transaction is repeated while the server is away, seconds."""

IDLE_SECONDS: Final = 30
"""PostgreSQL ends a transaction whose replica has said nothing for so long, seconds; a frozen
replica must not hold the head for the others."""

CONNECT_SECONDS: Final = 5
"""How long one attempt to reach a server takes at most, seconds."""

FIRST_PAUSE: Final = 0.05
"""Pause before the second attempt, seconds; it doubles up to one second."""

_READ, _WRITE, _DECIDE = "read", "write", "decide"


class Database:
    """One open database.

    Args:
        engine: to a database whose tables are there, or are about to be made.

    Attributes:
        engine: for migrations and tests.
        where: its address as it may be shown.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.where = engine.url.render_as_string(hide_password=True)

    @classmethod
    def open(cls, url: str | URL, *, password: Secret | None = None, pool: int = 12) -> Database:
        """Connect to a database; its tables are not looked at.

        Args:
            url: ``sqlite:///PATH`` or ``postgresql+psycopg://…``, without a password.
            password: for PostgreSQL; ``None`` leaves it to libpq.
            pool: most connections of this process.

        Raises:
            StorageError: it cannot be opened.
            Unavailable: nobody answers there.
            FormatError: it is not a database.
        """
        address = make_url(url)
        options: dict[str, Any] = {"hide_parameters": True, "pool_size": pool, "max_overflow": 0,
                                   "pool_timeout": BUSY_SECONDS}  # fmt: skip
        if address.get_backend_name() == "sqlite":
            engine = create_engine(address, connect_args={"timeout": BUSY_SECONDS}, **options)
            event.listen(engine, "connect", _prepare_sqlite)
            event.listen(engine, "begin", _begin_sqlite)
        else:
            engine = create_engine(
                address, connect_args=_postgresql_arguments(address, password),
                pool_pre_ping=True, pool_recycle=3600, **options,
            )  # fmt: skip
        database = cls(engine)
        try:
            with translated(f"open database {database.where}"):
                database._begin(_READ).close()
        except BaseException:
            engine.dispose()
            raise
        return database

    @property
    def is_shared(self) -> bool:
        """Whether it is a server that several machines may use."""
        return self.engine.dialect.name != "sqlite"

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction for rows that only their owner changes; committed at the end.

        Whatever appends to the audit log uses ``decide``: taking the head row late, with other
        rows already locked, would let two replicas wait for each other.

        Raises:
            Unavailable: it may succeed later; nothing of it stays.
            StorageError, NoSpace: the database refused; nothing of it stays.
        """
        with translated("write to the database"), self._begin(_WRITE) as connection:
            yield connection
            connection.commit()

    @contextmanager
    def decide(self) -> Iterator[Connection]:
        """A transaction of a decision or an administrative change: one at a time, everywhere.

        Nothing slow belongs inside: every other decision waits.

        Raises:
            Unavailable: it may succeed later; nothing of it stays, unless the connection broke
                while it was committed.
            StorageError, NoSpace: the database refused; nothing of it stays.
        """
        with translated("write to the database"), self._begin(_DECIDE) as connection:
            yield connection
            connection.commit()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A consistent view of one moment.

        Raises:
            Unavailable, StorageError: the database refused.
        """
        with translated("read the database"), self._begin(_READ) as connection:
            yield connection

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()

    def _begin(self, kind: str) -> Connection:
        """A connection whose transaction has begun; repeated while the server is away.

        Only the beginning is repeated, never what the caller did in it.
        """
        until = time.monotonic() + PATIENCE_SECONDS
        pause = FIRST_PAUSE
        while True:
            try:
                return self._begin_once(kind)
            except DBAPIError as error:
                if not self.is_shared or not is_passing(error) or time.monotonic() > until:
                    raise
            time.sleep(pause)
            pause = min(2 * pause, 1.0)

    def _begin_once(self, kind: str) -> Connection:
        connection = self.engine.connect()
        try:
            connection.execution_options(cai_write=kind != _READ)
            if self.is_shared and kind == _READ:
                connection.execution_options(
                    isolation_level="REPEATABLE READ", postgresql_readonly=True
                )
            connection.begin()
            if self.is_shared and kind == _DECIDE:
                connection.execute(_HEAD)
        except BaseException:
            connection.close()
            raise
        return connection


_HEAD: Final = select(AUDIT_HEAD.c.id).where(AUDIT_HEAD.c.id == 1).with_for_update()


def _postgresql_arguments(address: URL, password: Secret | None) -> dict[str, Any]:
    session = {
        "lock_timeout": BUSY_SECONDS,
        "idle_in_transaction_session_timeout": IDLE_SECONDS,
        # A replica whose machine is gone sends no word; the server has to notice.
        "tcp_keepalives_idle": 10,
        "tcp_keepalives_interval": 5,
        "tcp_keepalives_count": 3,
    }
    timed = {"lock_timeout", "idle_in_transaction_session_timeout"}
    arguments: dict[str, Any] = {
        "options": " ".join(
            f"-c {name}={value}{'s' if name in timed else ''}" for name, value in session.items()
        ),
        "application_name": "kbs",
    }
    if "connect_timeout" not in address.query:
        arguments["connect_timeout"] = CONNECT_SECONDS
    if password is not None:
        arguments["password"] = password.reveal().decode("utf-8", "replace").removesuffix("\n")
    return arguments


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
