"""A log that was restored verifies, and says so to those who kept a checkpoint."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from cai.attest.checkpoint import read_checkpoint
from kbs.audit.proof import verify_file
from kbs.cli.audit_call import consistency_lines, export_lines, log_of
from kbs.database.backup import save
from kbs.database.settings import DatabaseSettings
from kbs.instance import default_kek
from kbs.logged import verify_log
from kbs.restore import restore
from kbs.server.service import open_broker
from tests.kbs.audit.test_audit_cli import SiteClient
from tests.kbs.world import Site

NOW = datetime.now(UTC)


@pytest.fixture
def restored(full: Site, tmp_path: Path) -> Iterator[tuple[Site, bytes, bytes]]:
    """The broker from its backup, a checkpoint from before the backup, and one from after it."""
    core = full.broker.core
    before = core.checkpoints.latest()
    save(core.database, tmp_path / "saved", now=NOW)
    for number in (3, 4, 5):
        assert full.admin("POST", "resource/models/x/key", b"%d" % number).status_code == 200
    lost = core.checkpoints.latest()
    data = tmp_path / "new-data"
    data.mkdir(mode=0o700)
    restore(tmp_path / "saved", data, DatabaseSettings(), now=NOW)
    admin = (full.settings.data / "admin.key").read_bytes()
    with os.fdopen(os.open(data / "admin.key", os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
        file.write(admin)
    settings = replace(full.settings, data=data, kek=default_kek(full.settings.data))
    broker = open_broker(settings, clock=full.clock)
    broker.core.checkpoints.interval = 0
    yield Site(broker, settings, full.clock), before, lost
    broker.close()


def test_it_verifies_and_goes_on(restored: tuple[Site, bytes, bytes]) -> None:
    site, before, _ = restored
    core = site.broker.core
    assert verify_log(core, held=before).passed
    assert site.admin("POST", "resource/models/y/key", b"new").status_code == 200
    core.checkpoints.latest()
    assert site.admin("POST", "resource/models/y/key", b"newer").status_code == 200
    core.checkpoints.latest()
    verdict = verify_log(core, held=before)
    assert verdict.passed, verdict.failures
    client = SiteClient(site)
    log = log_of(client)  # type: ignore[arg-type]
    keys = [bytes.fromhex(key) for key in log.keys]
    for start in (0, read_checkpoint(before).size, read_checkpoint(log.note).size - 1):
        _, lines = export_lines(client, log, start)  # type: ignore[arg-type]
        verdict = verify_file(lines, keys)
        assert verdict.passed, verdict.failures


def test_who_kept_a_checkpoint_of_what_is_lost_sees_it(
    restored: tuple[Site, bytes, bytes]
) -> None:
    site, _, lost = restored
    core = site.broker.core
    for _ in range(6):
        assert site.admin("POST", "resource/models/y/key", b"new").status_code == 200
    newest = core.checkpoints.latest()
    assert read_checkpoint(newest).size > read_checkpoint(lost).size
    assert {item.name for item in verify_log(core, held=lost).failures} == {"checkpoint.held"}
    client = SiteClient(site)
    lines = consistency_lines(client, lost, newest)  # type: ignore[arg-type]
    verdict = verify_file(lines, core.checkpoints.public_keys())
    assert {item.name for item in verdict.failures} == {"proof.consistency"}


def test_a_restore_that_hides_its_leaf_is_named(restored: tuple[Site, bytes, bytes]) -> None:
    site, *_ = restored
    core = site.broker.core
    core.checkpoints.latest()
    connection = sqlite3.connect(site.settings.data / "kbs.sqlite")
    connection.execute("UPDATE audit_head SET origin = ''")
    connection.execute(
        "UPDATE audit_checkpoint SET origin = ? WHERE origin LIKE '%/%/%'",
        (f"cai-kbs/{core.instance.id}",),
    )
    connection.commit()
    connection.close()
    names = {item.name for item in verify_log(core).failures}
    assert {"database.head", "database.checkpoint"} <= names
