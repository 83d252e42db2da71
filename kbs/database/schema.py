"""Which tables a database has, and bringing an older one up to date.

Every database, new ones too, is made by the same migrations. ``kbs serve`` runs them itself on
SQLite; on PostgreSQL a person runs ``kbs db upgrade``, because other replicas may still run the
older program.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sqlalchemy import Connection, inspect, text

from cai.errors import FormatError, SettingError
from kbs.database.tables import METADATA
from kbs.database.trouble import translated

if TYPE_CHECKING:
    from alembic.config import Config

    from kbs.database.engine import Database

_MIGRATIONS: Final = Path(__file__).parent / "migrations"
_VERSION_TABLE: Final = "alembic_version"
_LOCK: Final = 0x6361692D6B6273
"""PostgreSQL's advisory lock of migrations: "cai-kbs"."""


def wanted_revision() -> str:
    """The revision that this program reads and writes."""
    from alembic.script import ScriptDirectory

    head = ScriptDirectory.from_config(_config()).get_current_head()
    if head is None:
        raise FormatError("the program has no migrations")
    return head


def found_revision(connection: Connection) -> str | None:
    """The database's revision; ``None`` when it has no tables of ours."""
    if not inspect(connection).has_table(_VERSION_TABLE):
        return None
    found = connection.execute(text(f"SELECT version_num FROM {_VERSION_TABLE}"))  # noqa: S608
    revision: str | None = found.scalar()
    return revision


def require_current(database: Database) -> None:
    """Refuse a database whose tables are not this program's.

    Raises:
        SettingError: it needs ``kbs db upgrade``.
        FormatError: a newer program made it.
    """
    with database.read() as connection, translated("read the schema"):
        found = found_revision(connection)
    wanted = wanted_revision()
    if found == wanted:
        return
    if found is not None:
        require_revision(found, where=database.where)
    raise SettingError(
        f"{database.where}: the schema is {found or 'empty'}, this program needs {wanted}",
        hint="kbs db upgrade",
    )


def require_revision(found: str, *, where: str) -> None:
    """Refuse a schema that this program does not know.

    Raises:
        FormatError: a newer program made it.
    """
    if found not in _known_revisions():
        raise FormatError(
            f"{where}: its schema {found} is not of this program, which reads {wanted_revision()}",
            hint="use the newer program that upgraded it",
        )


def upgrade(database: Database, *, to: str | None = None) -> tuple[str | None, str]:
    """Bring the tables up to date, in one transaction; two programs at once wait for each other.

    Args:
        database: empty, or of this program's schema or an older one.
        to: revision to stop at; ``None`` is this program's.

    Returns:
        The revision before and the one now.

    Raises:
        FormatError: a newer program made the database.
    """
    from alembic import command

    wanted = to or wanted_revision()
    with database.write() as connection:
        if database.is_shared:
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
        before = found_revision(connection)
        if before is not None:
            require_revision(before, where=database.where)
        if before != wanted:
            config = _config()
            config.attributes["connection"] = connection
            command.upgrade(config, wanted)
    return before, wanted


def differences(database: Database) -> list[str]:
    """How the tables differ from what the program expects; empty when they do not."""
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with database.read() as connection, translated("read the schema"):
        context = MigrationContext.configure(
            connection, opts={"compare_type": True, "target_metadata": METADATA}
        )
        return [str(item) for item in compare_metadata(context, METADATA)]


def _known_revisions() -> set[str]:
    from alembic.script import ScriptDirectory

    return {item.revision for item in ScriptDirectory.from_config(_config()).walk_revisions()}


def _config() -> Config:
    from alembic.config import Config

    # Alembic tells every step to its logger; only what goes wrong is worth a line.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    return config
