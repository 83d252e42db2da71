"""Transactions: what they hold, what others see meanwhile, and what passing trouble becomes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Connection, insert, select, text, update

from cai.errors import FormatError, SettingError, StorageError, Unavailable
from cai.secret import Secret
from kbs.database import engine as engine_module
from kbs.database.engine import Database
from kbs.database.opening import connect, open_database
from kbs.database.schema import upgrade
from kbs.database.settings import DatabaseSettings
from kbs.database.tables import AUDIT_HEAD, INSTANCE, SECRET
from tests.kbs.postgres import Cluster


def with_head(database: Database) -> Database:
    with database.write() as connection:
        row = {"id": 1, "size": 0} | {
            column.name: 0 for column in AUDIT_HEAD.c
            if column.name not in ("id", "size") and not column.nullable
            and column.type.python_type is int
        } | {
            column.name: b"" for column in AUDIT_HEAD.c
            if not column.nullable and column.type.python_type is bytes
        }  # fmt: skip
        connection.execute(insert(AUDIT_HEAD).values(**row))
    return database


@pytest.fixture(params=["sqlite", "postgresql"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Database, Database]]:
    """Two programs' views of one database."""
    if request.param == "sqlite":
        settings = DatabaseSettings()
        first, second = open_database(tmp_path, settings), open_database(tmp_path, settings)
    else:
        cluster: Cluster = request.getfixturevalue("postgres")
        settings = cluster.settings(cluster.create())
        first, second = open_database(tmp_path, settings), open_database(tmp_path, settings)
    with_head(first)
    yield first, second
    first.close()
    second.close()


@pytest.fixture
def server(postgres: Cluster, tmp_path: Path) -> Iterator[tuple[Database, Cluster, str]]:
    name = postgres.create()
    database = with_head(open_database(tmp_path, postgres.settings(name)))
    yield database, postgres, name
    database.close()


def end_connections(cluster: Cluster, name: str) -> None:
    cluster.run(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")


def size(database: Database) -> int:
    with database.read() as connection:
        value: int = connection.execute(select(AUDIT_HEAD.c.size)).scalar_one()
        return value


def test_decisions_follow_one_another(pair: tuple[Database, Database]) -> None:
    def work(database: Database) -> None:
        for _ in range(20):
            with database.decide() as connection:
                # A read and a write that depends on it: any overlap would lose one.
                found = connection.execute(select(AUDIT_HEAD.c.size)).scalar_one()
                connection.execute(update(AUDIT_HEAD).values(size=found + 1))

    threads = [threading.Thread(target=work, args=(pair[item % 2],)) for item in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert size(pair[0]) == 80


def fail(connection: Connection) -> None:
    connection.execute(update(AUDIT_HEAD).values(size=7))
    raise StorageError("the caller's own trouble")


def test_what_fails_leaves_nothing(pair: tuple[Database, Database]) -> None:
    for begin in (pair[0].write, pair[0].decide):
        with pytest.raises(StorageError), begin() as connection:
            fail(connection)
    assert size(pair[1]) == 0


def test_a_reader_sees_one_moment(pair: tuple[Database, Database]) -> None:
    with pair[0].read() as connection:
        before = connection.execute(select(AUDIT_HEAD.c.size)).scalar_one()
        with pair[1].decide() as other:
            other.execute(update(AUDIT_HEAD).values(size=9))
        assert connection.execute(select(AUDIT_HEAD.c.size)).scalar_one() == before
    assert size(pair[0]) == 9


def test_a_reader_of_a_server_cannot_write(server: tuple[Database, Cluster, str]) -> None:
    with pytest.raises(StorageError), server[0].read() as connection:
        connection.execute(update(AUDIT_HEAD).values(size=7))
    assert size(server[0]) == 0


def test_rows_of_their_own_do_not_wait_for_a_decision(
    server: tuple[Database, Cluster, str]
) -> None:
    with server[0].decide(), server[0].write() as connection:
        connection.execute(insert(SECRET).values(path="a", version=1, sealed=b"x"))


@pytest.mark.parametrize("kind", ["write", "decide"])
def test_a_lock_that_is_held_too_long_is_unavailable(
    pair: tuple[Database, Database], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    if pair[1].is_shared and kind == "write":
        pytest.skip("rows of their own do not wait")
    monkeypatch.setattr(engine_module, "PATIENCE_SECONDS", 0)
    monkeypatch.setattr(engine_module, "BUSY_SECONDS", 1)
    late = Database.open(pair[1].engine.url)
    with pair[0].decide(), pytest.raises(Unavailable) as caught, getattr(late, kind)():
        pass
    assert caught.value.http_status == 503
    late.close()


def test_lost_connections_are_made_again(server: tuple[Database, Cluster, str]) -> None:
    database, cluster, name = server
    for begin in (database.read, database.write, database.decide):
        assert size(database) == 0
        end_connections(cluster, name)
        with begin() as connection:
            assert connection.execute(select(AUDIT_HEAD.c.size)).scalar_one() == 0


def test_a_connection_lost_in_the_middle_is_unavailable(
    server: tuple[Database, Cluster, str]
) -> None:
    database, cluster, name = server

    def lose(connection: Connection) -> None:
        connection.execute(update(AUDIT_HEAD).values(size=7))
        end_connections(cluster, name)
        connection.execute(update(AUDIT_HEAD).values(size=8))

    with pytest.raises(Unavailable), database.decide() as connection:
        lose(connection)
    assert size(database) == 0


def test_a_decision_waits_for_a_server_that_is_away(
    server: tuple[Database, Cluster, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    database, cluster, name = server
    cluster.run(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    end_connections(cluster, name)
    back = threading.Timer(
        0.5, cluster.run, (f"ALTER DATABASE {name} ALLOW_CONNECTIONS true",)
    )
    back.start()
    with database.decide() as connection:
        assert connection.execute(select(AUDIT_HEAD.c.size)).scalar_one() == 0
    back.join()


def test_nobody_there_is_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "PATIENCE_SECONDS", 0)
    with pytest.raises(Unavailable):
        Database.open(f"postgresql+psycopg://kbs@/none?host={tmp_path}")


def test_every_connection_in_use_is_unavailable(
    postgres: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "BUSY_SECONDS", 1)
    database = connect(tmp_path, postgres.settings(postgres.create(), pool=1))
    with database.read(), pytest.raises(Unavailable, match="in use"), database.read():
        pass
    database.close()


def test_a_wrong_password_is_no_passing_trouble(postgres: Cluster, tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("not-the-password\n")
    file.chmod(0o600)
    settings = DatabaseSettings(postgres.url("postgres"), file)
    with pytest.raises(StorageError) as caught:
        connect(tmp_path, settings)
    assert not isinstance(caught.value, Unavailable)
    assert "not-the-password" not in str(caught.value)
    file.write_text(postgres.password + "\n")
    connect(tmp_path, settings).close()


def test_the_password_is_not_shown(postgres: Cluster, tmp_path: Path) -> None:
    database = Database.open(
        postgres.url("postgres"), password=Secret(postgres.password.encode())
    )
    shown = repr(database.engine) + database.where + repr(postgres.settings("postgres"))
    assert postgres.password not in shown
    database.close()


def test_postgresql_with_another_schema_is_refused(postgres: Cluster, tmp_path: Path) -> None:
    settings = postgres.settings(postgres.create(empty=True))
    with pytest.raises(SettingError, match="schema is empty") as caught:
        open_database(tmp_path, settings)
    assert caught.value.hint == "kbs db upgrade"
    database = connect(tmp_path, settings)
    upgrade(database)
    open_database(tmp_path, settings).close()
    for found, error in (("9999", FormatError), ("0000", FormatError)):
        with database.write() as connection:
            connection.execute(text(f"UPDATE alembic_version SET version_num = '{found}'"))
        with pytest.raises(error, match=found):
            open_database(tmp_path, settings)
        with pytest.raises(error, match=found):
            upgrade(database)
    database.close()


def test_two_upgrades_at_once(postgres: Cluster, tmp_path: Path) -> None:
    for settings in (postgres.settings(postgres.create(empty=True)), DatabaseSettings()):
        opened = [connect(tmp_path, settings) for _ in range(2)]
        done: list[object] = []

        def work(database: Database, done: list[object] = done) -> None:
            done.append(upgrade(database)[0])

        threads = [threading.Thread(target=work, args=(item,)) for item in opened]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert sorted(map(str, done)) == ["0001", "None"]
        with opened[0].read() as connection:
            assert connection.execute(select(INSTANCE)).all() == []
        for item in opened:
            item.close()
