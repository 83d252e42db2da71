"""The walk on PostgreSQL: every table of a filled broker, and what a superuser edits there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kbs.logged import verify_log
from kbs.server.service import open_broker
from tests.kbs.audit.conftest import fill, settings_in
from tests.kbs.postgres import Cluster
from tests.kbs.world import Clock, Site, Visitor


@pytest.fixture
def shared(
    postgres: Cluster, tmp_path: Path, platform_dir: Path, visitor: Visitor
) -> Iterator[tuple[Site, str]]:
    name = postgres.create()
    settings = replace(settings_in(tmp_path, platform_dir), database=postgres.settings(name))
    clock = Clock()
    site = Site(open_broker(settings, clock=clock), settings, clock)
    site.allow(visitor)
    fill(site)
    yield site, name
    site.broker.close()


def test_what_is_edited_there_is_named(shared: tuple[Site, str], postgres: Cluster) -> None:
    site, name = shared
    core = site.broker.core
    held = core.checkpoints.latest()
    verdict = verify_log(core, held=held)
    assert verdict.passed, verdict.failures
    for statement, blamed in (
        ("UPDATE resource SET wrapped = decode('00', 'hex') WHERE path = 'models/other/key'",
         "resource/models/other/key version 1"),
        ("DELETE FROM policy WHERE path = 'verification/default'", "policy/verification/default"),
        ("UPDATE audit SET object = 'x' WHERE seq = 7", "leaf 7"),
        ("DELETE FROM audit_node WHERE level = 1 AND position = 2", "node 2 of level 1"),
        ("DELETE FROM audit_checkpoint WHERE size = (SELECT min(size) FROM audit_checkpoint)",
         "it is gone"),
        ("UPDATE audit SET leaf = leaf || decode('20', 'hex') WHERE seq = 3", "leaf 3"),
    ):  # fmt: skip
        postgres.run(statement, database=name)
        reasons = "; ".join(item.reason or "" for item in verify_log(core, held=held).failures)
        assert blamed in reasons, statement
