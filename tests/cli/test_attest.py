"""``cai attest``: evidence, verdict, diagnosis and reference values of this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from hashlib import sha384
from pathlib import Path
from typing import Any

import pytest

from cai.attest.evidence_file import decode_evidence
from cai.attest.policy import VerificationPolicy
from cai.attest.tdx.quote import parse_quote

ordinary_machine = pytest.mark.skipif(
    Path("/sys/devices/virtual/misc/tdx_guest").exists(), reason="this machine is a TDX guest"
)


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cai", "attest", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def sim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from cai.attest.sim import SimulatedPlatform

    directory = tmp_path_factory.mktemp("sim")
    SimulatedPlatform.create(directory, now=datetime.now(UTC))
    return directory


@pytest.fixture
def launch(tmp_path: Path) -> Path:
    path = tmp_path / "launch.json"
    path.write_bytes(b'{"launch":1}')
    return path


def tee(sim: Path) -> list[str | Path]:
    return ["--unsafe-simulated-tee", sim / "platform"]


def last(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(done.stdout)
    return value


def test_own_verdict(sim: Path, tmp_path: Path) -> None:
    done = run(*tee(sim), "--output", tmp_path / "evidence.json", "--json")
    assert done.returncode == 0, done.stderr
    answer = last(done)
    assert (answer["decision"], answer["simulated"]) == ("pass", True)
    assert "SIMULATED" in done.stderr
    file = decode_evidence((tmp_path / "evidence.json").read_bytes(), where="x")
    assert parse_quote(file.evidence.quote).body["report_data"] == file.report_data
    assert len(file.evidence.devices) == 1
    text = run(*tee(sim), "--no-gpu")
    assert text.returncode == 0
    assert "PASS [SIMULATED]" in text.stdout
    assert "fmspc" in text.stdout


def test_an_evidence_file_is_not_overwritten(sim: Path, tmp_path: Path) -> None:
    (tmp_path / "evidence.json").write_text("mine")
    done = run(*tee(sim), "--output", tmp_path / "evidence.json")
    assert done.returncode == 2
    assert (tmp_path / "evidence.json").read_text() == "mine"


def test_nothing_to_verify_with(sim: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = run(*tee(sim), "--collateral", tmp_path / "empty", "--json")
    assert (done.returncode, last(done)["decision"]) == (20, "undecided")
    done = run(*tee(sim), "--rims", tmp_path / "empty", "--json")
    assert (done.returncode, last(done)["decision"]) == (10, "fail")


@ordinary_machine
def test_no_tee_on_this_machine() -> None:
    done = run("--no-gpu")
    assert done.returncode == 3
    assert "configfs" in done.stderr
    assert "--doctor" in done.stderr


@ordinary_machine
def test_doctor() -> None:
    done = run("--doctor", "--json")
    assert done.returncode == 10
    answer = last(done)
    assert {"host.configfs", "gpu.nvml"} <= set(answer["missing"])
    text = run("--doctor")
    assert "host.configfs: " in text.stdout
    assert "FAIL" in text.stdout


def test_reference_of_this_guest(sim: Path, tmp_path: Path, launch: Path) -> None:
    policy, rego = tmp_path / "policy.toml", tmp_path / "release.rego"
    done = run("reference", *tee(sim), "--launch", launch, "-o", policy, "--rego", rego, "--json")
    assert done.returncode == 0, done.stderr
    answer = last(done)
    parsed = VerificationPolicy.parse(policy.read_bytes(), where="policy")
    assert (answer["digest"], answer["simulated"]) == (parsed.digest, True)
    assert parsed.guest.launch_digest == (sha384(launch.read_bytes()).hexdigest(),)
    assert parsed.gpu.count == 1
    assert parsed.unsafe == ()
    assert "package policy" in rego.read_text()
    again = run("reference", *tee(sim), "--launch", launch, "-o", policy, "--rego", rego)
    assert again.returncode == 2


def test_reference_needs_a_launch(sim: Path, tmp_path: Path) -> None:
    done = run("reference", *tee(sim), "-o", tmp_path / "policy.toml")
    assert done.returncode == 2
    assert "--launch" in done.stderr
    assert not (tmp_path / "policy.toml").exists()


def test_reference_of_what_does_not_verify(sim: Path, tmp_path: Path, launch: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = run("reference", *tee(sim), "--launch", launch, "--collateral", tmp_path / "empty",
               "-o", tmp_path / "policy.toml")  # fmt: skip
    assert done.returncode == 7
    assert not (tmp_path / "policy.toml").exists()


def test_reference_of_measurements(tmp_path: Path) -> None:
    values = {name: ["ab" * 48] for name in ("mr_td", "rtmr0", "rtmr1", "rtmr2", "launch_digest")}
    body = {**values, "xfam": ["e702060000000000"], "profile": "sealed", "rtmr3_events": True,
            "gpu": {"count": 8}}  # fmt: skip
    (tmp_path / "boot.json").write_text(json.dumps(body))
    done = run(
        "reference", "--measurements", tmp_path / "boot.json", "-o", tmp_path / "policy.toml",
        "--rego", tmp_path / "release.rego", "--resource", "default/key/model",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    parsed = VerificationPolicy.parse((tmp_path / "policy.toml").read_bytes(), where="policy")
    assert (parsed.profile.value, parsed.gpu.count) == ("sealed", 8)
    assert "model" in (tmp_path / "release.rego").read_text()
    (tmp_path / "boot.json").write_text("{}")
    done = run("reference", "--measurements", tmp_path / "boot.json")
    assert done.returncode == 2
