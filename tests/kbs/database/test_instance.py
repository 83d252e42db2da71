"""One database is one key broker, whoever starts first."""

from __future__ import annotations

import threading
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import func, select

from cai.errors import CaiError, InputMissing, SettingError, WrongKey
from kbs.audit.log import read_leaves
from kbs.database.settings import DatabaseSettings
from kbs.database.tables import AUDIT_HEAD, INSTANCE, SIGNING_KEY
from kbs.instance import Instance, open_instance
from kbs.names import Realm
from kbs.server.service import open_broker
from tests.kbs.postgres import Cluster
from tests.kbs.replicas import Replica
from tests.kbs.world import Site, Visitor

AT_ONCE = 6


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest) -> DatabaseSettings:
    if request.param == "sqlite":
        return DatabaseSettings()
    cluster: Cluster = request.getfixturevalue("postgres")
    return cluster.settings(cluster.create(), pool=2)


def start(data: Path, kek: Path, place: DatabaseSettings) -> Instance:
    return open_instance(data, kek, Realm.PRODUCTION, now=datetime.now(UTC), database=place)


def test_of_several_that_start_at_once_one_creates(
    place: DatabaseSettings, tmp_path: Path
) -> None:
    gate, opened = threading.Barrier(AT_ONCE), list[Instance]()
    troubles: list[BaseException] = []

    def run(number: int) -> None:
        # On PostgreSQL each replica has its own data directory; the key is shared.
        data = tmp_path / (f"data-{number}" if place.parsed else "data")
        gate.wait(30)
        try:
            opened.append(start(data, tmp_path / "kek" / "kek", place))
        except BaseException as error:
            troubles.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(AT_ONCE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert troubles == []
    assert len({instance.id for instance in opened}) == 1
    database = opened[0].database
    with database.read() as connection:
        for table in (INSTANCE, AUDIT_HEAD):
            assert connection.execute(select(func.count()).select_from(table)).scalar_one() == 1
        keys = connection.execute(select(SIGNING_KEY.c.name)).scalars().all()
    assert len(keys) == len(set(keys))
    _, leaves = read_leaves(database, start=0, limit=100)
    assert sum(b'"instance.create"' in leaf for leaf in leaves) == 1
    assert len(list(tmp_path.glob("data*/admin.key"))) == 1
    for instance in opened:
        instance.database.close()


def test_a_replica_without_the_key_makes_none(postgres: Cluster, tmp_path: Path) -> None:
    place = postgres.settings(postgres.create())
    start(tmp_path / "one", tmp_path / "one-kek" / "kek", place).database.close()
    with pytest.raises(InputMissing) as caught:
        start(tmp_path / "two", tmp_path / "two-kek" / "kek", place)
    assert "copy it from the replica" in str(caught.value.hint)
    assert not (tmp_path / "two-kek").exists()
    assert not (tmp_path / "two" / "admin.key").exists()


def test_a_replica_with_another_key_is_refused(postgres: Cluster, tmp_path: Path) -> None:
    place = postgres.settings(postgres.create())
    start(tmp_path / "one", tmp_path / "one-kek" / "kek", place).database.close()
    start(tmp_path / "other", tmp_path / "other-kek" / "kek", DatabaseSettings()).database.close()
    with pytest.raises(WrongKey):
        start(tmp_path / "two", tmp_path / "other-kek" / "kek", place)


def test_the_other_realm_is_refused(place: DatabaseSettings, tmp_path: Path) -> None:
    kek = tmp_path / "kek" / "kek"
    start(tmp_path / "data", kek, place).database.close()
    with pytest.raises(SettingError, match="production") as caught:
        open_instance(
            tmp_path / "data", kek, Realm.SIMULATED, now=datetime.now(UTC), database=place
        )
    assert "pgpass" not in str(caught.value) or "passfile" in str(caught.value)


def test_a_creation_that_fails_leaves_nothing(
    place: DatabaseSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kbs import instance as module

    def broken(*_: object, **__: object) -> None:
        raise CaiError("the provider does not answer")

    kek = tmp_path / "kek" / "kek"
    with monkeypatch.context() as patch:
        patch.setattr(module, "new_row_key", broken)
        with pytest.raises(CaiError, match="provider"):
            start(tmp_path / "data", kek, place)
    instance = start(tmp_path / "data", kek, place)
    _, leaves = read_leaves(instance.database, start=0, limit=100)
    assert b'"seq":0' in leaves[0]
    assert b'"instance.create"' in leaves[0]
    instance.database.close()


def test_two_programs_that_start_at_once(
    postgres: Cluster, tmp_path: Path, platform_dir: Path
) -> None:
    name = postgres.create()
    replicas = [
        Replica(
            tmp_path / f"r{number}", "--database", postgres.url(name),
            "--kek", tmp_path / "kek" / "kek",
            "--unsafe-simulated-root", platform_dir / "anchors", env=postgres.environment,
        )
        for number in (1, 2)
    ]  # fmt: skip
    try:
        for replica in replicas:
            replica.wait()
    finally:
        said = [replica.stop() for replica in replicas]
    assert said == [143, 143]
    assert postgres.run("SELECT count(*) FROM instance", database=name) == [(1,)]
    assert all(postgres.password not in replica.said() for replica in replicas)


def test_what_one_replica_stores_the_other_serves(
    site: Site, visitor: Visitor, postgres: Cluster, tmp_path: Path
) -> None:
    place = postgres.settings(postgres.create())
    settings = replace(
        site.settings, data=tmp_path / "a", kek=tmp_path / "k" / "kek", database=place
    )
    first = Site(open_broker(settings, clock=site.clock), settings, site.clock)
    settings = replace(settings, data=tmp_path / "b")
    second = Site(open_broker(settings, clock=site.clock), settings, site.clock)
    first.allow(visitor)
    nonce, cookie = first.auth()
    assert second.attest(cookie, visitor.body(nonce)).status_code == 200
    again = first.attest(cookie, visitor.but(gpus=2).body(nonce))
    assert again.status_code == 200  # the session's token, not another evidence
    assert visitor.open(first.get(cookie))
    assert second.audit() == first.audit()
    for each in (first, second):
        each.broker.close()
