"""One log for all who write it: order, proofs, checkpoints, on SQLite and on PostgreSQL."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import func, insert, select

from cai import merkle
from cai.attest.checkpoint import open_checkpoint, read_checkpoint
from cai.errors import CaiError, InputMissing, StorageError, Tampered
from kbs.audit import failures
from kbs.audit.checkpoint import Checkpoints
from kbs.audit.leaf import ORIGIN_ACTION, parse_leaf
from kbs.audit.log import (
    FAILURE_ACTION,
    AuditLog,
    Change,
    Entry,
    changes,
    logged_change,
    newest_change,
    read_head,
    read_leaves,
)
from kbs.audit.stored import Kept, LoggedTable
from kbs.audit.walk import verify_database
from kbs.core import Core
from kbs.database.engine import Database
from kbs.database.opening import open_database
from kbs.database.settings import DatabaseSettings
from kbs.database.tables import AUDIT, AUDIT_CHECKPOINT, AUDIT_HEAD, INSTANCE
from tests.kbs.postgres import Cluster
from tests.kbs.world import Site

ID = "ab" * 16
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
NEW_KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
LOG = AuditLog(ID, "production")
ANYTHING = LoggedTable("any", Kept.UNTIL_ENDED, lambda _name: True, lambda _connection: ())
"""These tests store no rows besides the log's own."""


class Replica:
    """One process's view of a log."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.keys = [KEY]
        self.checkpoints = Checkpoints(database, instance=ID, signers=lambda _: self.keys)
        self.checkpoints.interval = 0

    def add(self, count: int = 1, *, change: Change | None = None, action: str = "test") -> int:
        seq = -1
        for _ in range(count):
            with self.database.decide() as connection:
                entry = Entry(action, {"kind": "system"}, "00" * 16, allowed=True, change=change)
                seq = LOG.append(connection, entry, NOW)
        return seq

    def verify(self, held: bytes | None = None) -> list[str]:
        with self.database.read() as connection:
            verdict = verify_database(
                connection, instance=ID, realm="production", tables=(ANYTHING,), held=held,
                keys=self.checkpoints.public_keys(),
            )  # fmt: skip
        return [f"{item.name}: {item.reason}" for item in verdict.failures]


def prepare(database: Database) -> None:
    with database.write() as connection:
        connection.execute(
            insert(INSTANCE).values(id=ID, realm="production", created="2026-01-02T03:04:05Z")
        )
        connection.execute(insert(AUDIT_HEAD).values(id=1, size=0))


@pytest.fixture
def replica(tmp_path: Path) -> Iterator[Replica]:
    database = open_database(tmp_path, DatabaseSettings())
    prepare(database)
    yield Replica(database)
    database.close()


@pytest.fixture
def replicas(postgres: Cluster, tmp_path: Path) -> Iterator[list[Replica]]:
    settings = postgres.settings(postgres.create())
    databases = [open_database(tmp_path, settings) for _ in range(2)]
    prepare(databases[0])
    yield [Replica(database) for database in databases]
    for database in databases:
        database.close()


def test_proofs_of_every_leaf_at_every_size(replica: Replica) -> None:
    for size in range(1, 20):
        replica.add()
        _, leaves = read_leaves(replica.database, start=0, limit=100)
        hashes = [merkle.leaf_hash(leaf) for leaf in leaves]
        note = replica.checkpoints.latest()
        assert read_checkpoint(note).root == merkle.root(hashes)
        for index in range(size):
            proof = replica.checkpoints.covering(index)
            assert proof.size == size
            assert proof.verify(hashes[index], [KEY.public_key().public_bytes_raw()], instance=ID)
        for old in range(size + 1):
            path = replica.checkpoints.consistency(old, size)
            assert list(path) == merkle.consistency_path(hashes, old)
    assert replica.verify() == []
    older = replica.checkpoints.inclusion(2, 5)
    assert (older.index, older.size) == (2, 5)


@pytest.mark.parametrize(("index", "size"), [(5, 5), (0, 4), (-1, 5), (9, None), (-1, None)])
def test_there_is_no_proof_of_what_is_not_there(
    replica: Replica, index: int, size: int | None
) -> None:
    replica.add(5)
    replica.checkpoints.latest()
    replica.add(1)
    with pytest.raises(InputMissing):
        replica.checkpoints.inclusion(index, size)
    for old, new in ((3, 2), (-1, 2), (2, 7)):
        with pytest.raises(InputMissing):
            replica.checkpoints.consistency(old, new)


def test_changes_are_counted(replica: Replica) -> None:
    replica.add(2)
    with replica.database.read() as connection:
        assert changes(connection) == 0
    replica.add(change=Change("resource/a", 1, "aa"))
    replica.add(change=Change("resource/a", 2, "bb"))
    replica.add()
    replica.add(change=Change("resource/a", 3, ""))
    with replica.database.read() as connection:
        assert changes(connection) == 3
        assert newest_change(connection, "resource/a") == Change("resource/a", 3, "")
        assert logged_change(connection, "resource/a", 1) == Change("resource/a", 1, "aa")
        assert logged_change(connection, "resource/a", 2) == Change("resource/a", 2, "bb")
        assert logged_change(connection, "resource/a", 4) is None
        assert newest_change(connection, "resource/b") is None


def test_what_is_rolled_back_leaves_no_trace(replica: Replica) -> None:
    replica.add(3)

    def fail() -> None:
        with replica.database.decide() as connection:
            LOG.append(connection, Entry("test", {}, "00" * 16, allowed=True), NOW)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert replica.add() == 3
    assert replica.verify() == []


def test_an_index_that_names_another_leaf_is_refused(replica: Replica) -> None:
    replica.add(change=Change("resource/a", 1, "aa"))
    with replica.database.write() as connection:
        connection.execute(AUDIT.update().values(object="resource/b", version=2))
    with replica.database.read() as connection:
        with pytest.raises(Tampered):
            newest_change(connection, "resource/b")
        with pytest.raises(Tampered):
            logged_change(connection, "resource/b", 2)


def test_without_a_head_nothing_is_appended(replica: Replica) -> None:
    with replica.database.write() as connection:
        connection.execute(AUDIT_HEAD.delete())
    with pytest.raises(StorageError):
        replica.add()
    with replica.database.read() as connection, pytest.raises(StorageError):
        changes(connection)


def test_checkpoints_come_at_most_once_in_the_interval(replica: Replica) -> None:
    replica.checkpoints.interval = 0.3
    replica.add()
    began = time.monotonic()
    assert replica.checkpoints.covering(0).size == 1  # the first comes at once
    assert time.monotonic() - began < 0.25
    replica.add()
    wait = replica.checkpoints.attempt(1)
    assert isinstance(wait, float)
    assert 0 < wait <= 0.3
    replica.add(3)
    proof = replica.checkpoints.covering(1)
    assert proof.size == 5  # those who waited share it
    assert time.monotonic() - began >= 0.3
    assert len(stored(replica)) == 2


def test_the_newest_checkpoint_is_given_while_it_is_too_early(replica: Replica) -> None:
    replica.checkpoints.interval = 60
    replica.add()
    first = replica.checkpoints.latest()
    replica.add()
    assert replica.checkpoints.latest() == first


def test_threads_that_wait_share_a_checkpoint(replica: Replica) -> None:
    replica.checkpoints.interval = 0.2
    replica.add()
    replica.checkpoints.latest()
    sizes: list[int] = []

    def work() -> None:
        sizes.append(replica.checkpoints.covering(replica.add()).size)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(sizes) == 8
    assert len(stored(replica)) <= 3
    assert replica.verify() == []


def test_a_new_key_signs_and_the_old_one_still_verifies(replica: Replica) -> None:
    replica.add()
    replica.checkpoints.latest()
    replica.keys = [NEW_KEY, KEY]
    replica.add()
    note = replica.checkpoints.latest()
    assert open_checkpoint(note, [NEW_KEY.public_key().public_bytes_raw()]).size == 2
    assert replica.verify() == []
    replica.keys = [NEW_KEY]
    assert any("checkpoint of 1 leaves" in line for line in replica.verify())


def test_a_key_that_never_signed_signs_no_extension(replica: Replica) -> None:
    replica.add()
    replica.checkpoints.latest()
    replica.keys = [NEW_KEY]
    replica.add()
    with pytest.raises(Tampered):
        replica.checkpoints.latest()


def test_after_a_restore_checkpoints_have_another_origin(replica: Replica) -> None:
    replica.add(3)
    first = replica.checkpoints.latest()
    origin = f"cai-kbs/{ID}/0011"
    with replica.database.decide() as connection:
        entry = Entry(
            ORIGIN_ACTION, {"kind": "system"}, "00" * 16, allowed=True,
            details={"origin": origin, "previous": first.decode()},
        )  # fmt: skip
        LOG.append(connection, entry, NOW)
    replica.add(2)
    second = read_checkpoint(replica.checkpoints.latest())
    assert (second.origin, second.size, second.instance) == (origin, 6, ID)
    assert replica.verify() == []
    replica.add()
    replica.checkpoints.latest()
    assert replica.verify() == []
    assert replica.verify(first) == []


def test_an_origin_without_its_leaf_is_named(replica: Replica) -> None:
    replica.add(2)
    with replica.database.write() as connection:
        connection.execute(AUDIT_HEAD.update().values(origin=f"cai-kbs/{ID}/0011"))
    replica.checkpoints.latest()
    found = replica.verify()
    assert any("checkpoint.origin" in line for line in found)
    assert any("database.head: its origin" in line for line in found)


def test_replicas_write_one_log(replicas: list[Replica]) -> None:
    """Two pools of connections and eight threads: no gap, no fork, one root for a size."""
    trouble: list[BaseException] = []

    def work(mine: Replica) -> None:
        try:
            for _ in range(12):
                seq = mine.add(change=Change("resource/a", 1, "aa"))
                proof = mine.checkpoints.covering(seq)
                _, leaves = read_leaves(mine.database, start=seq, limit=1)
                public = KEY.public_key().public_bytes_raw()
                proof.verify(merkle.leaf_hash(leaves[0]), [public], instance=ID)
        except BaseException as error:
            trouble.append(error)

    for replica in replicas:
        replica.checkpoints.interval = 0.05
    threads = [threading.Thread(target=work, args=(replicas[n % 2],)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert trouble == []
    with replicas[0].database.read() as connection:
        head = read_head(connection)
        assert (head.size, head.changes) == (96, 96)
        assert connection.execute(select(func.count()).select_from(AUDIT)).scalar_one() == 96
    assert replicas[1].verify() == []


def test_replicas_keep_the_interval_together(replicas: list[Replica]) -> None:
    for replica in replicas:
        replica.checkpoints.interval = 0.4
    began = time.monotonic()
    while time.monotonic() - began < 1.5:
        for replica in replicas:
            replica.add()
            replica.checkpoints.latest()
    assert 2 <= len(stored(replicas[0])) <= 4


def test_a_checkpoint_of_one_size_is_stored_once(replica: Replica) -> None:
    replica.add()
    replica.checkpoints.latest()
    replica.checkpoints.latest()
    assert len(stored(replica)) == 1
    with replica.database.read() as connection:
        row = connection.execute(select(AUDIT_CHECKPOINT)).one()
    again = insert(AUDIT_CHECKPOINT).values(**row._mapping)
    with pytest.raises(CaiError), replica.database.write() as connection:
        connection.execute(again)


def stored(replica: Replica) -> list[int]:
    with replica.database.read() as connection:
        return list(connection.execute(select(AUDIT_CHECKPOINT.c.size)).scalars())


def test_failures_of_all_replicas_make_one_leaf_a_minute(site: Site) -> None:
    """A second broker on the same database: what it counts waits for the next minute."""
    first = site.broker.core
    second = Core(first.instance, site.clock)
    for core in (first, second, first, second):
        core.count_failure("session")
    rows = [row for row in site.audit() if row["action"] == "unauthenticated"]
    assert [row["details"] for row in rows] == [{"session": 1}]
    site.clock.ahead += timedelta(seconds=61)
    second.count_failure("token")
    rows = [row for row in site.audit() if row["action"] == "unauthenticated"]
    assert [row["details"] for row in rows] == [{"session": 1}, {"session": 2, "token": 1}]
    second.rego.close()


def counted(replica: Replica) -> list[dict[str, int]]:
    _, leaves = read_leaves(replica.database, start=0, limit=100)
    found = [parse_leaf(leaf) for leaf in leaves]
    return [leaf["details"] for leaf in found if leaf["action"] == FAILURE_ACTION]


def test_what_was_counted_is_written_when_the_minute_is_over(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else has to fail for it."""
    monkeypatch.setattr(failures, "FAILURE_SECONDS", 0.3)
    counting = failures.Failures(replica.database, LOG, lambda: datetime.now(UTC))
    for kind in ("session", "session", "token"):
        counting.count(kind)
    assert counted(replica) == [{"session": 1}]
    until = time.monotonic() + 10
    while len(counted(replica)) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    assert counted(replica) == [{"session": 1}, {"session": 1, "token": 1}]
    counting.count("token")
    counting.close()
    assert counted(replica)[2:] == [{"token": 1}]
    counting.close()
    assert len(counted(replica)) == 3


def test_strangers_in_a_hurry_make_one_leaf(replica: Replica) -> None:
    counting = failures.Failures(replica.database, LOG, lambda: NOW)
    threads = [threading.Thread(target=counting.count, args=("session",)) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(counted(replica)) == 1
    counting.close()
    assert sum(leaf["session"] for leaf in counted(replica)) == 40


def test_a_count_that_cannot_be_written_is_kept(replica: Replica) -> None:
    counting = failures.Failures(replica.database, LOG, lambda: NOW)
    with replica.database.write() as connection:
        head = connection.execute(select(AUDIT_HEAD)).one()
        connection.execute(AUDIT_HEAD.delete())
    with pytest.raises(StorageError):
        counting.count("session")
    with replica.database.write() as connection:
        connection.execute(insert(AUDIT_HEAD).values(**head._mapping))
    counting.count("session")
    assert counted(replica) == [{"session": 2}]
    counting.close()
