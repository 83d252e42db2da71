"""``cai verify`` of a guest with GPUs, against reference files and revocation answers."""

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
from cai.attest.tdx.quote import parse_quote
from cai.cli.verify import verify
from cai.terminal import run_app

if TYPE_CHECKING:
    from cai.attest.sim import SimulatedPlatform

POLICY = """
version = 1
profile = "operated"

[tdx]
mr_td = ["{mr_td}"]
rtmr0 = ["{rtmr_0}"]
rtmr1 = ["{rtmr_1}"]
rtmr2 = ["{rtmr_2}"]
rtmr3 = ["{rtmr_3}"]
xfam = ["{xfam}"]

[gpu]
count = 2

[guest]
unsafe_any_launch_digest = true
unsafe_without_facts = true
"""

Run = Callable[..., tuple[int, dict[str, str]]]


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> SimulatedPlatform:
    from cai.attest.sim import SimulatedPlatform

    directory = tmp_path_factory.mktemp("simulated")
    return SimulatedPlatform.create(directory, now=datetime.now(UTC))


@pytest.fixture
def run(
    platform: SimulatedPlatform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:  # fmt: skip
    """Verify the guest's evidence; exit status and outcomes by check."""
    from cai.attest.sim import GuestSettings

    quote = platform.guest(GuestSettings()).quote(bytes(64))
    devices = platform.devices(2).collect(bytes(32))
    file = EvidenceFile(Evidence(quote, devices), report_data=bytes(64), gpu_nonce=bytes(32))
    (tmp_path / "evidence.json").write_bytes(file.encode())
    body = {name: value.hex() for name, value in parse_quote(quote).body.items()}
    (tmp_path / "policy.toml").write_text(POLICY.format(**body))

    def command(*options: object) -> tuple[int, dict[str, str]]:
        app = typer.Typer()
        app.command()(verify)
        monkeypatch.setattr("sys.argv", [
            "cai", "--evidence", str(tmp_path / "evidence.json"),
            "--policy", str(tmp_path / "policy.toml"), "--report-data", "00" * 64,
            "--collateral", str(platform.anchors / "collateral"),
            "--unsafe-simulated-root", str(platform.anchors), "--json", *map(str, options),
        ])  # fmt: skip
        status = run_app("cai", app)
        body = json.loads(capsys.readouterr().out)
        return status, {item["name"]: item["outcome"] for item in body["checks"]}

    return command


def files(platform: SimulatedPlatform, directory: Path, without: str = "none") -> Path:
    directory.mkdir(exist_ok=True)
    for name, data in platform.rims().items():
        if without not in name:
            (directory / f"{name}.xml").write_bytes(data)
    return directory


def answers(platform: SimulatedPlatform, directory: Path, **settings: Any) -> Path:
    from cai.attest.sim.revocation import OcspSettings

    directory.mkdir(exist_ok=True)
    responder = platform.responder(OcspSettings(**settings))
    for serial, (certificate, _) in responder.links.items():
        data = responder.about(certificate, now=datetime.now(UTC))
        (directory / f"{serial:x}.der").write_bytes(data)
    return directory


def test_pass(run: Run, platform: SimulatedPlatform, tmp_path: Path) -> None:
    rims, ocsp = files(platform, tmp_path / "rims"), answers(platform, tmp_path / "ocsp")
    status, checks = run("--rims", rims, "--ocsp", ocsp)
    assert status == 0, checks
    assert checks["gpu.1.rim"] == checks["gpu.1.ocsp"] == "pass"


def test_cannot_decide(run: Run, platform: SimulatedPlatform, tmp_path: Path) -> None:
    rims, ocsp = files(platform, tmp_path / "rims"), answers(platform, tmp_path / "ocsp")
    for options in ((), ("--rims", rims), ("--ocsp", ocsp)):
        assert run(*options)[0] == 20
    some = files(platform, tmp_path / "some", without="DRIVER")
    assert run("--rims", some, "--ocsp", ocsp)[0] == 20
    none = tmp_path / "empty"
    none.mkdir()
    assert run("--rims", rims, "--ocsp", none)[0] == 20


def test_fail(run: Run, platform: SimulatedPlatform, tmp_path: Path) -> None:
    rims = files(platform, tmp_path / "rims")
    revoked = answers(platform, tmp_path / "ocsp", status={"HCC RIM L4 Signer": "revoked"})
    status, checks = run("--rims", rims, "--ocsp", revoked)
    assert (status, checks["gpu.0.ocsp"]) == (10, "fail")
    for path in rims.glob("NV_GPU_DRIVER_GH100*"):
        path.write_bytes(path.read_bytes().replace(b'active="True"', b'active="False"', 1))
    status, checks = run("--rims", rims)
    assert (status, checks["gpu.0.rim_driver"]) == (10, "fail")
