"""The migrations make the tables that the program expects, on both engines."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import text

from kbs.database.engine import Database
from kbs.database.schema import differences, upgrade, wanted_revision
from tests.kbs.postgres import Cluster


def sqlite(path: Path) -> Database:
    return Database.open(f"sqlite:///{path}")


def test_migrated_tables_are_the_expected_ones_sqlite(tmp_path: Path) -> None:
    database = sqlite(tmp_path / "a.sqlite")
    assert differences(database)
    assert upgrade(database) == (None, wanted_revision())
    assert differences(database) == []
    database.close()


def test_migrated_tables_are_the_expected_ones_postgresql(postgres: Cluster) -> None:
    settings = postgres.settings(postgres.create())
    assert settings.parsed is not None
    database = Database.open(settings.parsed)
    assert differences(database) == []
    database.close()


def test_a_difference_is_seen(tmp_path: Path) -> None:
    database = sqlite(tmp_path / "a.sqlite")
    upgrade(database)
    with database.write() as connection:
        connection.execute(text("ALTER TABLE secret ADD COLUMN more TEXT"))
        connection.execute(text("DROP INDEX ix_session_expires"))
    found = "\n".join(differences(database))
    assert "more" in found
    assert "ix_session_expires" in found
    database.close()
