"""Resources and rotation on PostgreSQL: the same as on SQLite, with two replicas."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from kbs.keys.settings import FileSettings, KeySettings
from kbs.resources.retention import sweep
from kbs.server.service import ServeSettings, open_broker
from tests.kbs.keys.conftest import secret_file
from tests.kbs.keys.test_rotation import FILLED, everything, fill, rotate
from tests.kbs.postgres import Cluster
from tests.kbs.world import SECRET_TEXT, URI, Clock, Site, Visitor


@pytest.fixture
def replicas(
    postgres: Cluster, tmp_path: Path, platform_dir: Path, clock: Clock
) -> Iterator[tuple[Site, Site]]:
    secret_file(tmp_path, "new-kek", "ab" * 32)
    keys = KeySettings("file", {"new": FileSettings(tmp_path / "new-kek")})
    settings = ServeSettings(
        tmp_path / "kbs-data", "127.0.0.1:0", "127.0.0.1:0", keys=keys,
        unsafe_simulated_root=platform_dir / "anchors",
        database=postgres.settings(postgres.create()),
    )
    second = replace(settings, data=tmp_path / "second-data",
                     kek=tmp_path / "kbs-data-kek" / "kek")
    with (
        closing(open_broker(settings, clock=clock)) as one,
        closing(open_broker(second, clock=clock)) as two,
    ):
        yield Site(one, settings, clock), Site(two, settings, clock)


def test_versions_rotation_and_retention(
    replicas: tuple[Site, Site], visitor: Visitor, clock: Clock
) -> None:
    one, two = replicas
    one.allow(visitor)
    fill(one)
    assert everything(two) == FILLED
    _, cookie = visitor.attested(one)
    assert rotate(two, "new").json()["data_keys"] == 9
    assert visitor.open(one.get(cookie)) == SECRET_TEXT
    assert everything(one) == FILLED
    listed = two.admin("GET", "resources?prefix=a").json()
    assert [item["resource_tag"] for item in listed] == ["c"]
    assert [item["intact"] for item in listed] == [True]
    one.admin("POST", f"resource/{URI}", b"second")
    assert two.admin("DELETE", f"resource/{URI}").status_code == 200
    assert one.get(cookie).status_code == 404
    assert one.admin("POST", f"resource-restore/{URI}").json() == {"version": 4}
    assert visitor.open(two.get(cookie)) == b"second"
    two.admin("DELETE", "resource/a/b/c")
    clock.ahead = timedelta(days=31)
    assert sweep(one.broker.core) == 1
    assert sweep(two.broker.core) == 0
    status = one.admin("GET", "key").json()
    assert sum(item["keys"] for item in status["providers"] if item["in_force"]) == 8
