"""``cai ls`` as a program."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from cai.store import StoreOptions, open_store, push
from tests.cli.test_push import cai
from tests.oss_server.server import OssServer
from tests.store.conftest import (
    Sealed,
    environment,
    sealed,  # noqa: F401 - a fixture
)


@pytest.fixture
def server(sealed: Sealed, tmp_path: Path) -> Iterator[OssServer]:  # noqa: F811
    with OssServer(tmp_path / "oss", buckets=["models"], public=["models"]) as running:
        options = StoreOptions(environment=environment(running))
        push(sealed.path, open_store("oss://models/a/m", options))
        yield running


def test_names(sealed: Sealed, server: OssServer, tmp_path: Path) -> None:  # noqa: F811
    values = environment(server)
    top = cai(tmp_path, "ls", "models:/", **values)
    assert top.stdout.split() == ["a/"]
    model = cai(tmp_path, "ls", "models:/a/m", **values)
    assert [line.split()[-1] for line in model.stdout.splitlines()] == [
        "cai.json", "index.cai", "manifest.cai", "objects/",
    ]
    assert "revision 1" in model.stderr
    assert "0 missing" in model.stderr
    whole = json.loads(cai(tmp_path, "ls", "-r", "--json", "models:/a/m", **values).stdout)
    assert {item["path"]: item["size"] for item in whole["files"]} == {
        path: len(data) for path, data in sealed.files().items()
    }
    assert whole["model"]["missing"] == []
    assert whole["model"]["index_sha256"] == sealed.report.index_sha256


def test_what_is_missing(server: OssServer, tmp_path: Path) -> None:
    store = open_store("oss://models/a/m", StoreOptions(environment=environment(server)))
    gone = next(item.path for item in store.names(recursive=True) if "objects" in item.path)
    store.remove(gone)
    told = json.loads(cai(tmp_path, "ls", "--json", "models:/a/m", **environment(server)).stdout)
    assert told["model"]["missing"] == [gone]


def test_a_directory_and_a_web_server(
    sealed: Sealed, server: OssServer, tmp_path: Path  # noqa: F811
) -> None:
    local = cai(tmp_path, "ls", "-r", f"file:{sealed.path}")
    assert {line.split()[-1] for line in local.stdout.splitlines()} == set(sealed.files())
    web = cai(tmp_path, "ls", f"{server.endpoint}/models/a/m")
    assert {line.split()[-1] for line in web.stdout.splitlines()} == set(sealed.files())
    nothing = cai(tmp_path, "ls", f"{server.endpoint}/models/a")
    assert nothing.returncode == 2
    assert "lists nothing" in nothing.stderr


def test_names_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "\x1b[2Jx").write_text("x")
    done = cai(tmp_path, "ls", "file:d")
    assert "\x1b" not in done.stdout
    assert "x1b[2Jx" in done.stdout


def test_refusals(tmp_path: Path) -> None:
    assert cai(tmp_path, "ls", "file:none").returncode == 3
    assert cai(tmp_path, "ls", "nonsense").returncode == 2
    assert cai(tmp_path, "ls", "models:/x").returncode == 2
