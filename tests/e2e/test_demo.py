"""The main end-to-end test: ``cai demo`` plays every act, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cai.demo.model import find_model
from cai.demo.parties import mounts_under
from cai.errors import InputMissing

pytestmark = [pytest.mark.timeout(280), pytest.mark.xdist_group("demo")]

ACTS = ["Take", "Seal", "Prove", "Serve", "Ask", "Refuse", "Afterwards"]
REFUSED = {
    "other-measurement": "mr_td",
    "debug-guest": "debug",
    "replayed-quote": "nonce",
    "replayed-quote-new-nonce": "",
    "flipped-bit": "objects/",
    "flipped-bit-read": "",
    "peer-without-evidence": "",
    "plain-request": "",
}


def command(*options: str) -> list[str]:
    return [sys.executable, "-m", "cai", "demo", *options]


def processes_under(directory: Path) -> list[str]:
    """Command lines of processes that work in a directory."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if (entry / "cwd").readlink().is_relative_to(directory):
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


@pytest.fixture(scope="module")
def short() -> Iterator[Path]:
    """A directory whose path leaves room for the demo's sockets."""
    try:
        find_model(None)
    except InputMissing as error:
        pytest.skip(f"{error.message}: {error.hint}")
    with tempfile.TemporaryDirectory(prefix="cai-") as directory:
        yield Path(directory)


@pytest.fixture(scope="module")
def work(short: Path) -> Path:
    return short / "kept"


@pytest.fixture(scope="module")
def story(work: Path) -> dict[str, Any]:
    """The demo's one document."""
    ended = subprocess.run(
        command("--json", "--keep", str(work)), capture_output=True, text=True, timeout=240
    )
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
    (document,) = ended.stdout.splitlines()
    value: dict[str, Any] = json.loads(document)
    return value


def act(story: dict[str, Any], title: str) -> dict[str, Any]:
    (found,) = [item for item in story["acts"] if item["title"] == title]
    facts: dict[str, Any] = found["facts"]
    return facts


def test_every_act_is_played_in_under_three_minutes(story: dict[str, Any]) -> None:
    assert [item["title"] for item in story["acts"]] == ACTS
    assert all(item["ok"] for item in story["acts"])
    assert (story["ok"], story["simulated"]) == (True, True)
    assert story["seconds"] < 180


def test_acts_that_rest_on_the_simulator_say_so(story: dict[str, Any]) -> None:
    marked = {item["title"]: item["simulated"] for item in story["acts"]}
    assert marked == {title: title not in ("Take", "Serve") for title in ACTS}


def test_a_real_model_was_sealed(story: dict[str, Any], work: Path) -> None:
    assert act(story, "Take")["name"] == "all-MiniLM-L6-v2"
    assert act(story, "Take")["bytes"] > 90_000_000
    assert act(story, "Seal")["objects"] >= 1
    stored = {path.name for path in (work / "sealed").rglob("*")}
    assert not stored & {"model.safetensors", "config.json", "1_Pooling"}


def test_the_key_was_refused_without_a_policy(story: dict[str, Any]) -> None:
    assert "policy" in act(story, "Prove")["refused_without_policy"].lower()


def test_the_embeddings_are_those_of_the_plain_model(story: dict[str, Any]) -> None:
    assert act(story, "Ask")["plain"].startswith("identical, float by float")
    pairs = act(story, "Ask")["pairs"]
    assert all(pair["cosine"] > 0.5 for pair in pairs if pair["related"])
    assert all(pair["cosine"] < 0.2 for pair in pairs if not pair["related"])


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_for_its_own_reason(story: dict[str, Any], name: str) -> None:
    (refusal,) = [item for item in story["refusals"] if item["name"] == name]
    assert refusal["refused"] is True
    assert refusal["reason"]
    assert REFUSED[name] in refusal["reason"].lower()


def test_nothing_else_was_tried(story: dict[str, Any]) -> None:
    assert [item["name"] for item in story["refusals"]] == list(REFUSED)


def test_every_decision_is_in_the_audit_log(story: dict[str, Any]) -> None:
    rows = story["audit"]
    assert [row["seq"] for row in rows] == list(range(len(rows)))
    assert all(row["realm"] == "simulated" for row in rows)
    released = [row for row in rows if row["action"] == "release" and row["decision"] == "allow"]
    assert released
    assert all(row["simulated"] for row in released)


def test_the_commands_are_there_to_repeat(story: dict[str, Any]) -> None:
    programs = {line.split()[0] for line in story["by_hand"]}
    assert {"cai", "kbs", "tng"} <= programs
    assert any(" curl " in line and line.startswith("http_proxy=") for line in story["by_hand"])


def test_no_process_and_no_mount_is_left(story: dict[str, Any], work: Path) -> None:
    assert story["kept"] == str(work)
    assert processes_under(work) == []
    assert mounts_under(work) == []
    assert not (work / "run" / "channel.sock").exists()


def test_no_log_holds_the_key_or_a_sentence(story: dict[str, Any], work: Path) -> None:
    del story
    key = (work / "model.key").read_text().strip()
    for log in (work / "logs").iterdir():
        text = log.read_text(errors="replace")
        assert key not in text, log.name
        assert "kitten naps" not in text, log.name


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_nothing(
    short: Path, number: signal.Signals
) -> None:
    keep = short / f"interrupted-{number}"
    process = subprocess.Popen(
        command("--keep", str(keep)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        deadline = time.monotonic() + 120
        while not (keep / "logs" / "host.out").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert b"Traceback" not in stderr
    assert processes_under(keep) == []
    assert mounts_under(keep) == []


def test_real_vllm_serves_the_same_embeddings() -> None:
    python = os.environ.get("CAI_VLLM_PYTHON")
    if not python:
        pytest.skip("CAI_VLLM_PYTHON names no interpreter that has vLLM")
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1"} | os.environ
    ended = subprocess.run(
        command("--json", "--engine", "vllm", "--vllm-python", python),
        capture_output=True, text=True, timeout=270, env=environment,
    )
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    story = json.loads(ended.stdout)
    assert act(story, "Serve")["engine"] == "vLLM"
    assert "cosine" in act(story, "Ask")["plain"]
    assert [item["name"] for item in story["refusals"]] == list(REFUSED)


@pytest.mark.parametrize(
    ("options", "status"),
    [
        (["--model", "none"], 3),
        (["--model", "file"], 3),
        (["--engine", "other"], 2),
        (["--engine", "vllm"], 2),
        (["--vllm-python", "python"], 2),
        (["--keep", "file"], 3),
    ],
)
def test_bad_options_end_before_anything_starts(
    tmp_path: Path, options: list[str], status: int
) -> None:
    (tmp_path / "file").touch()
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    ended = subprocess.run(
        command(*options), cwd=tmp_path, capture_output=True, text=True, timeout=60, env=environment
    )
    assert ended.returncode == status
    assert ended.stdout == ""
    assert ended.stderr.startswith("cai: ")
    assert "Traceback" not in ended.stderr
