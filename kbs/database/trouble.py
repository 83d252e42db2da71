"""What the database's own errors mean: try again, no space, not ours, or broken.

Trouble that passes by itself (a lost connection, a server that restarts, a lock that another
replica held too long) becomes ``Unavailable``, HTTP 503: nothing of the transaction was kept, or,
if the connection broke during the commit, an answer never left. A caller may ask again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from cai.errors import CaiError, FormatError, NoSpace, StorageError, Unavailable

_PASSING: Final = ("08", "40", "53", "55P03", "57", "25P03", "25006")
"""SQLSTATEs, or their classes, of trouble that passes: connection, serialization and deadlock,
resources, lock not available, operator intervention, idle too long, read-only (a standby)."""

_NO_SPACE: Final = "53100"
_NOT_PASSING: Final = ("authentication failed", "no password supplied", "does not exist",
                       "no pg_hba.conf entry", "certificate")  # fmt: skip


def is_passing(error: DBAPIError) -> bool:
    """Whether the same transaction may succeed later."""
    state = getattr(error.orig, "sqlstate", None)
    if state == _NO_SPACE:
        return False
    if state:
        return str(state).startswith(_PASSING)
    if error.connection_invalidated:
        return True
    text = str(error.orig)
    if "locked" in text:  # SQLite, after its own wait
        return True
    if not type(error.orig).__module__.startswith("psycopg"):
        return False
    lost = isinstance(error, OperationalError | InterfaceError)
    return lost and not any(part in text for part in _NOT_PASSING)


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """Turn the database's errors into ours.

    Raises:
        Unavailable: trouble that passes.
        NoSpace, FormatError, StorageError: trouble that does not.
    """
    try:
        yield
    except CaiError:
        raise
    except DBAPIError as error:
        raise _storage_error(error, doing) from error
    except PoolTimeout as error:
        raise _unavailable(doing, "every connection is in use") from error
    except SQLAlchemyError as error:
        raise StorageError(f"{doing}: {type(error).__name__}") from error


def _storage_error(error: DBAPIError, doing: str) -> CaiError:
    # The driver's own text names no parameter; SQLAlchemy's might. One line of it is enough.
    reason = str(error.orig).partition("\n")[0]
    if "disk is full" in reason or getattr(error.orig, "sqlstate", None) == _NO_SPACE:
        return NoSpace(f"{doing}: {reason}", hint="free some space")
    if "not a database" in reason:
        return FormatError(f"{doing}: {reason}", hint="check the data directory")
    if is_passing(error):
        return _unavailable(doing, reason)
    return StorageError(f"{doing}: {reason}", hint="check the database's address, owner and mode")


def _unavailable(doing: str, reason: str) -> Unavailable:
    return Unavailable(f"{doing}: {reason}", hint="try again in a moment")
