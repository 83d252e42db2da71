"""``cai pull`` as a program: what it says, what it refuses, kill -9 at any moment."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cai.model import SealOptions, check, seal
from cai.store import StoreOptions, open_store, push
from tests.cli.test_push import cai, surroundings
from tests.oss_server.server import OssServer
from tests.store.conftest import (
    Sealed,
    contents,
    environment,
    sealed,  # noqa: F401 - a fixture
)

KILLS = int(os.environ.get("CAI_KILLS", "6"))


@pytest.fixture
def server(sealed: Sealed, tmp_path: Path) -> Iterator[OssServer]:  # noqa: F811
    with OssServer(tmp_path / "oss", buckets=["models"]) as running:
        options = StoreOptions(environment=environment(running))
        push(sealed.path, open_store("oss://models/m", options))
        yield running


def test_pull_says_what_it_knows(
    sealed: Sealed, server: OssServer, tmp_path: Path  # noqa: F811
) -> None:
    values = environment(server)
    done = cai(tmp_path, "pull", "models:/m", **values)
    assert done.returncode == 0, done.stderr
    assert "complete, not authenticated" in done.stdout
    assert contents(tmp_path / "m") == sealed.files()
    again = cai(
        tmp_path, "pull", "models:/m", "out", "--json", "--index-sha256",
        sealed.report.index_sha256, **values,
    )
    told = json.loads(again.stdout)
    assert told["authenticated"] is True
    assert told["fetched_bytes"] == told["total_bytes"]
    named = cai(
        tmp_path, "pull", "models:/m", "out", "--index-sha256", sealed.report.index_sha256,
        **values,
    )
    assert "complete and authenticated" in named.stdout
    assert ", 0 bytes" not in named.stdout
    assert "; 0 fetched" in named.stdout


@pytest.mark.parametrize(("arguments", "status", "words"), [
    (["models:/nothing", "out"], 3, "no sealed model"),
    (["models:/m", "out", "--index-sha256", "0" * 64], 6, "not the expected one"),
    (["models:/m", "out", "--index-sha256", "xyz"], 2, "64 lower-case"),
    (["models:/m", "full"], 2, "something else"),
    (["models:/"], 2, "no name"),
    (["elsewhere", "out"], 2, "not the URI"),
])
def test_refusals(
    server: OssServer, tmp_path: Path, arguments: list[str], status: int, words: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    done = cai(tmp_path, "pull", *arguments, **environment(server))
    assert (done.returncode, words in done.stderr) == (status, True), done.stderr
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*partial*"))


def test_damage_is_named(server: OssServer, tmp_path: Path) -> None:
    largest = max(server.storage.root.rglob("*.object"), key=lambda path: path.stat().st_size)
    with largest.open("r+b") as file:
        file.seek(6_000_000)
        file.write(b"?")
    done = cai(tmp_path, "pull", "models:/m", "out", **environment(server))
    assert done.returncode == 6
    assert "piece 1 is not the listed one" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_new_revision_takes_the_place_of_the_old_one(
    sealed: Sealed, server: OssServer, tmp_path: Path  # noqa: F811
) -> None:
    values = environment(server)
    cai(tmp_path, "pull", "models:/m", "out", **values)
    second = tmp_path / "second"
    plain = sealed.path.parent / "plain"
    report = seal(
        plain, second, sealed.kek,
        options=SealOptions(model_id=sealed.report.model_id, revision=2, workers=2),
    )
    store = open_store("oss://models/m", StoreOptions(environment=values))
    pushed = push(second, store, prune=True)
    assert set(pushed.removed) == {
        name for name in sealed.files() if name.startswith("objects/")
    }
    done = cai(tmp_path, "pull", "models:/m", "out", **values)
    assert done.returncode == 0, done.stderr
    assert check(tmp_path / "out", sealed.kek).root == report.root
    assert not list(tmp_path.glob("*partial*"))


def test_two_pulls_do_not_fill_one_place(
    sealed: Sealed, server: OssServer, tmp_path: Path  # noqa: F811
) -> None:
    values = environment(server)
    with subprocess.Popen(
        [sys.executable, "-m", "cai", "pull", "models:/m", "out", "--limit", "3M"], cwd=tmp_path,
        env=surroundings(tmp_path, **values), stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as first:
        deadline = time.monotonic() + 20
        while not (tmp_path / "out.partial-pull").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        second = cai(tmp_path, "pull", "models:/m", "out", **values)
        assert second.returncode == 2
        assert "another pull" in second.stderr
        first.terminate()
    assert first.returncode == 143
    assert cai(tmp_path, "pull", "models:/m", "out", **values).returncode == 0
    assert contents(tmp_path / "out") == sealed.files()


@pytest.mark.parametrize("fresh", [True, False], ids=["into-nothing", "over-the-old-revision"])
@pytest.mark.timeout(600)
def test_kill_at_any_moment(
    sealed: Sealed, server: OssServer, tmp_path: Path, fresh: bool  # noqa: F811
) -> None:
    """However often a pull is killed, OUT is never half of anything, and the next one continues."""
    values, out = environment(server), tmp_path / "out"
    old: dict[str, bytes] = {}
    if not fresh:
        plain = sealed.path.parent / "plain"
        seal(plain, out, sealed.kek,
             options=SealOptions(model_id=sealed.report.model_id, workers=2))
        old = contents(out)
    generator = random.Random(12)
    command = [sys.executable, "-m", "cai", "pull", "models:/m", str(out), "--limit", "60M"]
    for _ in range(KILLS):
        with subprocess.Popen(
            command, env=surroundings(tmp_path, **values), cwd=tmp_path,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        ) as process:
            time.sleep(generator.uniform(0.3, 1.6))
            process.send_signal(signal.SIGKILL)
        if out.exists():
            assert contents(out) in (old, sealed.files())
        else:
            assert not old
    done = cai(tmp_path, "pull", "models:/m", out, **values)
    assert done.returncode == 0, done.stderr
    assert contents(out) == sealed.files()
    assert check(out, sealed.kek).root == sealed.report.root
    assert {path.name for path in tmp_path.iterdir()} == {"oss", "out"}
