"""``kbs db`` as a person types it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kbs.postgres import Cluster
from tests.kbs.world import Site


def kbs_db(*arguments: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kbs", "db", *map(str, arguments)], cwd=cwd, capture_output=True,
        text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), **env},
    )  # fmt: skip


def told(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    value: dict[str, Any] = json.loads(done.stdout)
    return value


def test_from_sqlite_to_postgresql(allowed: Site, postgres: Cluster, tmp_path: Path) -> None:
    data = allowed.settings.data
    tmp_path = tmp_path / "empty"
    tmp_path.mkdir()
    name = postgres.create(empty=True)
    there = ("--database", postgres.url(name))
    assert told(kbs_db("check", "--data", data, "--json", cwd=tmp_path))["schema"]
    saved = told(kbs_db("backup", "out", "--data", data, "--json", cwd=tmp_path))
    assert saved["leaves"] == len(allowed.audit())
    early = kbs_db("restore", "out", *there, cwd=tmp_path, **postgres.environment)
    assert (early.returncode, "kbs db upgrade" in early.stderr) == (2, True)
    assert kbs_db("check", *there, cwd=tmp_path, **postgres.environment).returncode == 2
    upgraded = told(kbs_db("upgrade", *there, "--json", cwd=tmp_path, **postgres.environment))
    assert upgraded["before"] is None
    again = kbs_db("upgrade", *there, cwd=tmp_path, **postgres.environment)
    assert "unchanged" in again.stdout
    done = kbs_db("restore", "out", *there, "--json", cwd=tmp_path, **postgres.environment)
    assert "revocations" in done.stderr
    assert told(done)["realm"] == "simulated"
    checked = kbs_db("check", *there, cwd=tmp_path, **postgres.environment)
    assert checked.returncode == 0
    twice = kbs_db("restore", "out", *there, cwd=tmp_path, **postgres.environment)
    assert (twice.returncode, "not empty" in twice.stderr) == (4, True)
    assert all(
        postgres.password not in item.stdout + item.stderr for item in (early, again, done, checked)
    )
    assert not (tmp_path / "kbs-data").exists()


def test_the_configuration_says_where_it_is(allowed: Site, tmp_path: Path) -> None:
    (tmp_path / "kbs.toml").write_text(f'data = "{allowed.settings.data}"\n')
    found = told(kbs_db("check", "--config", "kbs.toml", "--json", cwd=tmp_path))
    assert str(allowed.settings.data) in found["database"]


def test_a_table_that_somebody_changed_is_named(
    allowed: Site, postgres: Cluster, tmp_path: Path
) -> None:
    name = postgres.create()
    postgres.run("ALTER TABLE policy ADD COLUMN surprise text", database=name)
    done = kbs_db(
        "check", "--database", postgres.url(name), cwd=tmp_path, **postgres.environment
    )
    assert (done.returncode, "surprise" in done.stderr) == (3, True)


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["check"], 3),
        (["upgrade"], 3),
        (["backup", "out"], 3),
        (["restore", "missing"], 3),
        (["check", "--database", "postgresql://kbs:secret@localhost/kbs"], 2),
        (["check", "--database", "sqlite:///x"], 2),
        (["check", "--config", "missing.toml"], 3),
        (["restore", "missing", "--checkpoint", "missing"], 3),
    ],
)
def test_bad_use_is_one_line_and_a_status(
    tmp_path: Path, arguments: list[str], status: int
) -> None:
    done = kbs_db(*arguments, cwd=tmp_path)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("kbs: ")
    assert "secret" not in done.stderr
    assert not (tmp_path / "out").exists()
