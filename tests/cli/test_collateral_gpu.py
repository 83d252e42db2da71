"""``cai collateral gpu`` against the simulated vendors' services."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import typer

from cai.attest.evidence import Evidence
from cai.attest.evidence_file import EvidenceFile
from cai.attest.gpu.ocsp_store import load_ocsp
from cai.attest.gpu.rim_store import load_rims
from cai.cli.collateral_gpu import gpu
from cai.terminal import run_app

if TYPE_CHECKING:
    from cai.attest.sim import SimulatedPlatform

Run = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> SimulatedPlatform:
    from cai.attest.sim import SimulatedPlatform

    directory = tmp_path_factory.mktemp("simulated")
    return SimulatedPlatform.create(directory, now=datetime.now(UTC))


@pytest.fixture
def evidence(platform: SimulatedPlatform, tmp_path: Path) -> Path:
    path = tmp_path / "evidence.json"
    devices = platform.devices(2).collect(bytes(32))
    path.write_bytes(EvidenceFile(Evidence(b"not a quote", devices)).encode())
    return path


@pytest.fixture
def run(
    platform: SimulatedPlatform, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:  # fmt: skip
    """Run the command; its exit status and what it printed as JSON."""
    from cai.attest.sim.endpoints import SimulatedVendors

    def command(*options: object, broken: bool = False) -> tuple[int, dict[str, Any]]:
        app = typer.Typer()
        app.command("gpu")(gpu)
        with SimulatedVendors(platform) as vendors:
            if broken:
                vendors.failures["/v1/rim/NV_GPU_DRIVER"] = 404
            where = ["--rim-service", vendors.url, "--responder", f"{vendors.url}/ocsp",
                     "--unsafe-simulated-root", str(platform.anchors)]  # fmt: skip
            arguments = ["cai", *where, *map(str, options), "--json"]
            monkeypatch.setattr("sys.argv", arguments)
            status = run_app("cai", app)
        printed = capsys.readouterr().out
        return status, json.loads(printed) if printed.strip() else {}

    return command


def test_directories_are_filled(run: Run, evidence: Path, tmp_path: Path) -> None:
    rims, answers = tmp_path / "rims", tmp_path / "ocsp"
    status, body = run("--evidence", evidence, "--rims", rims, "--ocsp", answers)
    assert status == 0, body
    assert len(body["rims"]) == 2
    assert body["missing"] == []
    assert len(load_rims(rims).files) == 2
    assert len(load_ocsp(answers).answers) == body["answers"]


def test_what_is_missing_shows(run: Run, evidence: Path, tmp_path: Path) -> None:
    status, body = run("--evidence", evidence, "--rims", tmp_path / "rims", broken=True)
    assert status == 20
    assert len(body["rims"]) == 1
    assert any("404" in text for text in body["missing"])
    assert len(list((tmp_path / "rims").iterdir())) == 1


def test_bad_usage(run: Run, evidence: Path, tmp_path: Path) -> None:
    assert run("--evidence", evidence)[0] == 2
    quote = tmp_path / "quote"
    quote.write_bytes(b"\x04\x00")
    assert run("--evidence", quote, "--rims", tmp_path / "rims")[0] == 2
    assert run("--evidence", tmp_path / "none", "--rims", tmp_path / "rims")[0] == 3
    assert not (tmp_path / "rims").exists()


def test_devices_of_others(
    run: Run, evidence: Path, tmp_path: Path, platform: SimulatedPlatform
) -> None:
    from cai.attest.sim.devices import DeviceFailure, DeviceSettings

    settings = DeviceSettings(failure=DeviceFailure.FOREIGN)
    devices = platform.devices(1, settings).collect(bytes(32))
    evidence.write_bytes(EvidenceFile(Evidence(b"x", devices)).encode())
    status, _ = run("--evidence", evidence, "--rims", tmp_path / "rims")
    assert status == 7
    assert not (tmp_path / "rims").exists()
