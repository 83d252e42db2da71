"""Backups and restores, on both engines and across them."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import func, select, text

from cai import jcs
from cai.attest.checkpoint import read_checkpoint
from cai.errors import CaiError, FormatError, InputMissing, StorageError, Tampered
from kbs.database import backup as backup_module
from kbs.database.backup import Manifest, load, manifest_path, read_manifest, save
from kbs.database.engine import Database
from kbs.database.opening import DATABASE_NAME, connect, open_database
from kbs.database.settings import DatabaseSettings
from kbs.database.tables import AUDIT, METADATA, SESSION
from kbs.instance import default_kek
from kbs.restore import restore
from kbs.server.service import open_broker
from tests.kbs.postgres import Cluster
from tests.kbs.world import SECRET_TEXT, URI, Site, Visitor

NOW = datetime.now(UTC)


def nothing(_connection: object, _manifest: Manifest) -> None:
    return


@pytest.fixture
def saved(allowed: Site, visitor: Visitor, tmp_path: Path) -> Path:
    """A backup of a broker that released something."""
    _, cookie = visitor.attested(allowed)
    assert visitor.open(allowed.get(cookie)) == SECRET_TEXT
    allowed.broker.core.checkpoints.latest()
    save(allowed.broker.core.database, tmp_path / "saved", now=NOW)
    return tmp_path / "saved"


@pytest.fixture(params=["sqlite", "postgresql"])
def elsewhere(request: pytest.FixtureRequest) -> DatabaseSettings:
    """An empty database of either engine."""
    if request.param == "sqlite":
        return DatabaseSettings()
    cluster: Cluster = request.getfixturevalue("postgres")
    return cluster.settings(cluster.create())


@pytest.fixture
def new_data(tmp_path: Path) -> Path:
    directory = tmp_path / "new-data"
    directory.mkdir(mode=0o700)
    return directory


@pytest.fixture
def again(
    saved: Path, allowed: Site, elsewhere: DatabaseSettings, new_data: Path
) -> Iterator[Site]:
    """The broker restored into another database, with the key encryption key of the first."""
    restore(saved, new_data, elsewhere, now=NOW)
    settings = replace(
        allowed.settings, data=new_data, kek=default_kek(allowed.settings.data),
        database=elsewhere,
    )  # fmt: skip
    broker = open_broker(settings, clock=allowed.clock)
    (new_data / "admin.key").write_bytes((allowed.settings.data / "admin.key").read_bytes())
    (new_data / "admin.key").chmod(0o600)
    yield Site(broker, settings, allowed.clock)
    broker.close()


def counts(database: Database) -> dict[str, int]:
    with database.read() as connection:
        return {
            table.name: connection.execute(select(func.count()).select_from(table)).scalar_one()
            for table in METADATA.sorted_tables
        }


def test_a_restored_broker_releases_as_before(again: Site, visitor: Visitor) -> None:
    _, cookie = visitor.attested(again)
    assert visitor.open(again.get(cookie)) == SECRET_TEXT


def test_nothing_is_lost_but_what_lives_for_minutes(
    allowed: Site, saved: Path, again: Site
) -> None:
    before, after = counts(allowed.broker.core.database), counts(again.broker.core.database)
    assert before.pop("session") > 0
    assert after.pop("session") == 0
    assert after.pop("audit") == before.pop("audit") + 1
    for volatile in ("audit_node", "audit_head"):
        assert after.pop(volatile) >= before.pop(volatile)
    assert after == before
    old = allowed.audit()
    assert again.audit()[: len(old)] == old


def test_a_restore_starts_a_new_origin(allowed: Site, saved: Path, again: Site) -> None:
    old = read_checkpoint(allowed.broker.core.checkpoints.latest())
    new = read_checkpoint(again.broker.core.checkpoints.latest())
    assert new.origin != old.origin
    assert new.origin.startswith(old.origin + "/")
    assert new.instance == old.instance
    leaf = again.last("audit.origin")
    assert leaf["details"]["origin"] == new.origin
    assert read_checkpoint(leaf["details"]["previous"].encode()) == old
    assert leaf["details"]["backup"] == read_manifest(saved).sha256


def test_two_restores_have_two_origins(saved: Path, tmp_path: Path) -> None:
    origins = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir(mode=0o700)
        done = restore(saved, tmp_path / name, DatabaseSettings(), now=NOW)
        origins.add(done.origin)
    assert len(origins) == 2


def test_the_newest_checkpoint_that_is_known_is_named(
    allowed: Site, saved: Path, new_data: Path
) -> None:
    assert allowed.admin("POST", "resource/models/minilm/other", b"x").status_code == 200
    allowed.broker.core.checkpoints.interval = 0.0
    later = allowed.broker.core.checkpoints.latest()
    done = restore(saved, new_data, DatabaseSettings(), now=NOW, newest=later)
    assert done.previous == read_checkpoint(later)
    assert done.previous.size > read_manifest(saved).leaves


def test_a_checkpoint_of_another_broker_is_refused(
    saved: Path, new_data: Path, other_site: Site
) -> None:
    foreign = other_site.broker.core.checkpoints.latest()
    with pytest.raises(Tampered, match="another broker"):
        restore(saved, new_data, DatabaseSettings(), now=NOW, newest=foreign)


def test_a_backup_holds_no_secret_and_nobody_else_reads_it(
    allowed: Site, saved: Path
) -> None:
    for path in (saved, manifest_path(saved)):
        assert path.stat().st_mode & 0o777 == 0o600
    contents = saved.read_bytes() + manifest_path(saved).read_bytes()
    assert SECRET_TEXT not in contents
    kek = default_kek(allowed.settings.data).read_text().strip()
    assert kek.encode() not in contents
    assert bytes.fromhex(kek) not in contents
    assert not [path for path in saved.parent.iterdir() if "partial" in path.name]
    assert not saved.with_name("saved-wal").exists()


def test_a_backup_of_a_server_is_of_one_moment(
    saved: Path, elsewhere: DatabaseSettings, new_data: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    restore(saved, new_data, elsewhere, now=NOW)
    database = open_database(new_data, elsewhere)
    copy_rows = backup_module._copy_rows

    def meddling(*arguments: object) -> int:
        with database.decide() as connection:
            connection.execute(text("DELETE FROM policy"))
            connection.execute(text("DELETE FROM audit"))
        return copy_rows(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(backup_module, "_copy_rows", meddling)
    manifest = save(database, tmp_path / "second", now=NOW)
    assert manifest.rows["policy"] > 0
    assert manifest.rows["audit"] == manifest.leaves
    database.close()


def test_the_same_rows_make_the_same_backup_of_either_engine(
    saved: Path, elsewhere: DatabaseSettings, new_data: Path, tmp_path: Path
) -> None:
    database = connect(new_data, elsewhere)
    if not database.is_shared:
        database.close()
        database = open_database(new_data, elsewhere)
    load(saved, database, nothing)
    manifest = save(database, tmp_path / "second", now=NOW)
    database.close()
    assert replace(manifest, sha256="", size=0) == replace(read_manifest(saved), sha256="", size=0)
    assert dump(tmp_path / "second") == dump(saved)


def dump(path: Path) -> list[str]:
    connection = sqlite3.connect(path)
    lines = list(connection.iterdump())
    connection.close()
    return lines


def test_nothing_is_overwritten(allowed: Site, saved: Path, new_data: Path) -> None:
    database = allowed.broker.core.database
    for name in ("saved", "other"):
        (saved.parent / "other.json").touch()
        with pytest.raises(StorageError, match="exists already"):
            save(database, saved.parent / name, now=NOW)
    before = counts(database)
    with pytest.raises(StorageError, match="not empty"):
        restore(saved, allowed.settings.data, DatabaseSettings(), now=NOW)
    assert counts(database) == before
    restore(saved, new_data, DatabaseSettings(), now=NOW)
    with pytest.raises(StorageError, match="not empty"):
        restore(saved, new_data, DatabaseSettings(), now=NOW)


def test_a_session_alone_keeps_a_restore_out(saved: Path, new_data: Path) -> None:
    database = open_database(new_data, DatabaseSettings())
    with database.write() as connection:
        row = {
            column.name: 1 if column.type.python_type is int else ""
            for column in SESSION.c if column.type.python_type is not bytes
        }  # fmt: skip
        connection.execute(SESSION.insert().values(**row))
    database.close()
    with pytest.raises(StorageError, match="session has rows"):
        restore(saved, new_data, DatabaseSettings(), now=NOW)


@pytest.mark.parametrize("place", [0, 100, -1])
def test_a_damaged_backup_is_refused(saved: Path, new_data: Path, place: int) -> None:
    contents = bytearray(saved.read_bytes())
    contents[place] ^= 1
    saved.write_bytes(contents)
    with pytest.raises(Tampered, match="not the file of its manifest"):
        restore(saved, new_data, DatabaseSettings(), now=NOW)


@pytest.mark.parametrize("change", ["short", "long", "gone", "manifest-gone"])
def test_a_cut_backup_is_refused(saved: Path, new_data: Path, change: str) -> None:
    match change:
        case "short":
            saved.write_bytes(saved.read_bytes()[:-1])
        case "long":
            saved.write_bytes(saved.read_bytes() + b"\0")
        case "gone":
            saved.unlink()
        case _:
            manifest_path(saved).unlink()
    with pytest.raises((Tampered, InputMissing)):
        restore(saved, new_data, DatabaseSettings(), now=NOW)
    database = open_database(new_data, DatabaseSettings())
    assert not any(counts(database).values())
    database.close()


def signed_again(saved: Path, **changes: object) -> None:
    """The manifest of whatever the file is now: what an editor of backups would write."""
    from hashlib import sha256

    data = saved.read_bytes()
    value = json.loads(manifest_path(saved).read_bytes())
    value |= {"size": len(data), "sha256": sha256(data).hexdigest()} | changes
    manifest_path(saved).write_bytes(jcs.canonical(value) + b"\n")


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("UPDATE audit SET leaf = x'00' WHERE seq = 2", "checkpoint signs"),
        ("DELETE FROM audit WHERE seq = 2", "lacks leaf 2"),
        ("DELETE FROM audit WHERE seq = (SELECT max(seq) FROM audit)", "head"),
        ("UPDATE audit_head SET size = size - 1", "head"),
        ("UPDATE instance SET id = 'another'", "another key broker"),
        ("UPDATE instance SET realm = 'production'", "another key broker"),
        ("UPDATE alembic_version SET version_num = '9999'", "9999"),
    ],
)
def test_an_edited_backup_is_refused(
    saved: Path, new_data: Path, statement: str, said: str
) -> None:
    with sqlite3.connect(saved) as connection:
        connection.execute(statement)
    connection.close()
    signed_again(saved)
    with pytest.raises(CaiError, match=said):
        restore(saved, new_data, DatabaseSettings(), now=NOW)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{}", b"[]", b"null", b'{"cai-kbs-backup":2}', b'{"cai-kbs-backup":1}',
        b"\xff", b'{"cai-kbs-backup":1,"rows":1}', b'{"cai-kbs-backup": 1}', b"[" * 5000,
    ],
)  # fmt: skip
def test_manifests_of_another_form_are_refused(data: bytes) -> None:
    with pytest.raises(CaiError):
        Manifest.parse(data)


@pytest.mark.parametrize(
    "change",
    [{"size": "1"}, {"size": True}, {"rows": {"a": "b"}}, {"leaves": None}, {"more": 1}],
)
def test_manifests_with_other_members_are_refused(change: dict[str, object]) -> None:
    whole = Manifest("i", "simulated", "0001", "t", 1, "00", {"audit": 1}, 1, "")
    assert Manifest.parse(whole.encode()) == whole
    with pytest.raises(FormatError):
        Manifest.parse(jcs.canonical(json.loads(whole.encode()) | change))


def test_an_empty_database_has_no_backup(tmp_path: Path, new_data: Path) -> None:
    database = connect(new_data, DatabaseSettings())
    with pytest.raises(InputMissing):
        save(database, tmp_path / "out", now=NOW)
    database.close()
    database = open_database(new_data, DatabaseSettings())
    with pytest.raises(InputMissing):
        save(database, tmp_path / "out", now=NOW)
    database.close()
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.json").exists()


def test_rows_that_live_for_minutes_are_not_in_it(saved: Path) -> None:
    short = {table.name for table in METADATA.sorted_tables if table.info.get("short-lived")}
    assert "session" in short
    assert not short & set(read_manifest(saved).rows)
    with sqlite3.connect(saved) as connection:
        for name in short:
            assert connection.execute(f"SELECT count(*) FROM {name}").fetchone() == (0,)
    connection.close()
    assert URI
    assert AUDIT.name in read_manifest(saved).rows
    assert DATABASE_NAME
