"""``cai push`` as a program: what it says, where credentials come from, kill -9 at any moment."""

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

from cai.store import StoreOptions, open_store, pull
from tests.oss_server.server import KEY_ID, SECRET, OssServer
from tests.store.conftest import (
    Sealed,
    contents,
    environment,
    sealed,  # noqa: F401 - a fixture
)

ROOT = Path(__file__).resolve().parents[2]
KILLS = int(os.environ.get("CAI_KILLS", "6"))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[OssServer]:
    with OssServer(tmp_path / "oss", buckets=["models"]) as running:
        yield running


def surroundings(tmp_path: Path, **values: str) -> dict[str, str]:
    """The environment without anything that could be a credential."""
    kept = {
        name: value for name, value in os.environ.items()
        if not name.startswith(("MODEL_", "OSS_", "ALIBABA_", "AWS_", "CAI_STORES", "XDG_"))
    }
    return kept | {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)} | values


def cai(tmp_path: Path, *arguments: str | Path, **values: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "cai", *map(str, arguments)], cwd=tmp_path, text=True,
        env=surroundings(tmp_path, **values), capture_output=True, timeout=120, check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert SECRET not in done.stdout + done.stderr
    return done


def test_push_tells_what_it_did(
    sealed: Sealed, server: OssServer, tmp_path: Path  # noqa: F811
) -> None:
    values = environment(server)
    first = cai(tmp_path, "push", sealed.path, "models:/m", **values)
    assert first.returncode == 0, first.stderr
    assert sealed.report.index_sha256 in first.stdout
    again = cai(tmp_path, "push", "--json", sealed.path, "oss://models/m", **values)
    told = json.loads(again.stdout)
    assert told["sent_bytes"] == 0
    assert told["uri"] == "oss://models/m"
    assert told["index_sha256"] == sealed.report.index_sha256


def test_where_credentials_come_from(
    sealed: Sealed, server: OssServer, tmp_path: Path  # noqa: F811
) -> None:
    env = tmp_path / "cai.env"
    env.write_text(
        "TRUSTEE_URL=http://127.0.0.1:1\nMODEL_KEY_ID=kbs:///a/b/c\n"
        + "".join(f"{name}={value}\n" for name, value in environment(server).items())
    )
    done = cai(tmp_path, "push", sealed.path, "models:/m", "--env", env, OSS_ACCESS_KEY_ID="x")
    assert done.returncode == 0, done.stderr
    config = tmp_path / "stores.toml"
    config.write_text(
        f'[mine.oss]\nendpoint = "{server.endpoint}"\naccess_key_id = "{KEY_ID}"\n'
        f'access_key_secret = "{SECRET}"\n'
    )
    asked = ("push", sealed.path, "models:/n", "--profile", "mine", "--config", config)
    refused = cai(tmp_path, *asked)
    assert (refused.returncode, "chmod 600" in refused.stderr) == (2, True)
    config.chmod(0o600)
    assert cai(tmp_path, *asked).returncode == 0
    assert cai(tmp_path, *asked, "--env", env).returncode == 2


@pytest.mark.parametrize(("arguments", "status", "words"), [
    (["nowhere", "models:/m"], 3, "no sealed model"),
    (["SEALED", "ftp://x/y"], 2, "not the URI"),
    (["SEALED", "https://x/y"], 2, "only be read"),
    (["SEALED", "oss://a:b@models/y"], 2, "credentials"),
    (["SEALED", "models:/m", "--index-sha256", "12"], 2, "64 lower-case"),
    (["SEALED", "models:/m", "--index-sha256", "0" * 64], 6, "not the expected one"),
    (["SEALED", "models:/m", "--limit", "fast"], 2, "not a rate"),
    (["SEALED", "models:/m", "--jobs", "0"], 2, "jobs"),
    (["SEALED", "nobucket:/m"], 3, "bucket does not exist"),
])
def test_refusals(
    sealed: Sealed, server: OssServer, tmp_path: Path,  # noqa: F811
    arguments: list[str], status: int, words: str,
) -> None:
    given = [str(sealed.path) if word == "SEALED" else word for word in arguments]
    done = cai(tmp_path, "push", *given, **environment(server))
    assert (done.returncode, words in done.stderr) == (status, True), done.stderr


def test_wrong_credentials(
    sealed: Sealed, server: OssServer, tmp_path: Path  # noqa: F811
) -> None:
    values = environment(server) | {"MODEL_OSS_SECRET_ACCESS_KEY": "tellnobody"}
    done = cai(tmp_path, "push", sealed.path, "models:/m", **values)
    assert done.returncode == 7
    assert "credentials" in done.stderr
    assert "tellnobody" not in done.stderr
    missing = cai(tmp_path, "push", sealed.path, "models:/m")
    assert missing.returncode == 2
    assert "endpoint" in missing.stderr


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_it_stops_when_it_is_told(
    sealed: Sealed, server: OssServer, tmp_path: Path,  # noqa: F811
    number: signal.Signals, status: int,
) -> None:
    """However slow the limit is, nobody waits for what is not sent yet."""
    with subprocess.Popen(
        [sys.executable, "-m", "cai", "push", str(sealed.path), "models:/m", "--limit", "20k"],
        env=surroundings(tmp_path, **environment(server)), cwd=tmp_path,
        stderr=subprocess.PIPE, text=True,
    ) as process:
        deadline = time.monotonic() + 30
        while not server.faults.received and time.monotonic() < deadline:
            time.sleep(0.02)
        told = time.monotonic()
        process.send_signal(number)
        assert process.stderr
        words = process.stderr.read()
    assert time.monotonic() - told < 5
    assert process.returncode == status
    assert "Traceback" not in words


@pytest.mark.parametrize("kind", ["oss", "file"])
@pytest.mark.timeout(600)
def test_kill_at_any_moment(
    sealed: Sealed, server: OssServer, tmp_path: Path, kind: str  # noqa: F811
) -> None:
    """However often a push is killed, the next one continues and ends with the same model."""
    uri = "oss://models/m" if kind == "oss" else f"file:{tmp_path / 'shelf'}"
    store = open_store(uri, StoreOptions(environment=environment(server)))
    generator = random.Random(11)
    server.faults.pause_s = 0.004  # long enough for the moments to differ
    command = [sys.executable, "-m", "cai", "push", str(sealed.path), uri]
    command += ["--limit", "60M"] if kind == "file" else []
    for _ in range(KILLS):
        with subprocess.Popen(
            command, env=surroundings(tmp_path, **environment(server)), cwd=tmp_path,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        ) as process:
            time.sleep(generator.uniform(0.3, 1.6))
            process.send_signal(signal.SIGKILL)
        if process.returncode == 0:  # it was faster: begin again
            for item in list(store.names(recursive=True)):
                store.remove(item.path)
    server.faults.pause_s = 0.0
    done = cai(tmp_path, "push", "--verify", sealed.path, uri, **environment(server))
    assert done.returncode == 0, done.stderr
    assert not store.pending()
    assert {item.path for item in store.names(recursive=True)} == set(sealed.files())
    pull(store, tmp_path / "copy", index_sha256=sealed.report.index_sha256)
    assert contents(tmp_path / "copy") == sealed.files()
    if kind == "file":
        assert contents(tmp_path / "shelf") == sealed.files()
    else:
        assert not list(server.storage.root.rglob("*.part"))
        assert not list(server.storage.root.rglob("*.upload"))
