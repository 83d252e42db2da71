"""The diagnosis: whatever is missing is named, with the way to set it right."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cai.attest.doctor import KERNEL_RELEASE, SWAPS, TDX_DEVICE, diagnose
from cai.attest.gpu.collect import ConfidentialMode, NvmlDriver
from cai.attest.gpu.rim_store import RimStore, load_rims
from cai.attest.tdx.collateral import CollateralStore, load_collateral
from cai.attest.tdx.collect import CCEL_DATA, REPORTS, LinuxFiles
from cai.attest.verdict import Outcome, Verdict
from cai.errors import InputMissing, Refused, StorageError
from tests.attest.gpu.driver import Recorded
from tests.attest.tdx.kernel import FakeKernel

if TYPE_CHECKING:
    from cai.attest.sim import SimulatedPlatform

NOW = datetime.now(UTC)


class Simulated(Recorded):
    """A driver whose GPUs answer as the simulated ones do."""

    def __init__(self, platform: SimulatedPlatform) -> None:
        super().__init__()
        self.platform = platform

    def report(self, place: int, nonce: bytes) -> bytes:
        return self.platform.devices(1).collect(nonce)[place].report

    def certificates(self, place: int) -> bytes:
        return self.platform.devices(1).collect(bytes(32))[place].chain


def host(root: Path, platform: SimulatedPlatform, **settings: object) -> FakeKernel:
    """A machine on which nothing is missing."""
    from cai.attest.sim import GuestSettings

    guest = platform.guest(GuestSettings(**settings))  # type: ignore[arg-type]
    made = FakeKernel(root, guest.quote)
    for path, text in (
        (KERNEL_RELEASE, b"6.18.2-generic\n"), (SWAPS, b"Filename\tType\n"), (CCEL_DATA, b"log")
    ):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(text)
    return made


@pytest.fixture
def collateral(platform_dir: Path) -> CollateralStore:
    return load_collateral(platform_dir / "anchors" / "collateral")


@pytest.fixture(scope="module")
def rims(platform_dir: Path) -> RimStore:
    return load_rims(platform_dir / "anchors" / "rims")


def missing(verdict: Verdict) -> dict[str, str]:
    return {item.name: item.reason or "" for item in verdict.failures}


def outcomes(verdict: Verdict) -> dict[str, Outcome]:
    return {item.name: item.outcome for item in verdict.checks}


def test_nothing_is_missing(
    tmp_path: Path, platform: SimulatedPlatform, collateral: CollateralStore, rims: RimStore
) -> None:
    verdict = diagnose(
        host(tmp_path, platform), Simulated(platform), now=NOW, rims=rims, collateral=collateral
    )
    assert missing(verdict) == {}
    asked = {name for name, outcome in outcomes(verdict).items() if outcome is Outcome.PASS}
    assert {"host.quote", "host.collateral", "host.rtmr3", "gpu.cc_mode", "gpu.0.rim"} <= asked
    assert outcomes(verdict)["gpu.ready"] is Outcome.NOT_ASKED
    assert list((tmp_path / REPORTS).iterdir()) == []


def test_an_ordinary_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(_self: NvmlDriver) -> object:
        raise InputMissing("NVML is not installed", hint="pip install cai-confidential[host]")

    monkeypatch.setattr(NvmlDriver, "_nvml", absent)
    found = diagnose(LinuxFiles(tmp_path), NvmlDriver(), now=NOW)
    fixes = missing(found)
    assert fixes.keys() == {
        "host.tdx_guest", "host.configfs", "host.rtmr3", "host.event_log", "gpu.nvml"
    }
    assert "mount -t configfs" in fixes["host.configfs"]
    assert "cai-confidential[host]" in fixes["gpu.nvml"]
    assert outcomes(found)["host.quote"] is Outcome.NOT_ASKED
    assert outcomes(found)["gpu.cc_mode"] is Outcome.NOT_ASKED
    assert not found.passed


@pytest.mark.parametrize(("release", "fix"), [
    (b"5.15.0", "quotes need 6.7"), (b"6.8.0-generic", "cannot be measured"), (b"6.15", "6.16"),
])  # fmt: skip
def test_old_kernels(
    tmp_path: Path, platform: SimulatedPlatform, release: bytes, fix: str
) -> None:
    files = host(tmp_path, platform)
    (tmp_path / KERNEL_RELEASE).write_bytes(release)
    assert fix in missing(diagnose(files, Simulated(platform), now=NOW))["host.kernel"]


def test_configfs_without_tsm(tmp_path: Path, platform: SimulatedPlatform) -> None:
    files = host(tmp_path, platform)
    (tmp_path / REPORTS).rmdir()
    fixes = missing(diagnose(files, Simulated(platform), now=NOW))
    assert "CONFIG_TSM_REPORTS" in fixes["host.configfs"]
    assert "mount" not in fixes["host.configfs"]
    assert (tmp_path / TDX_DEVICE).exists()


def test_a_debug_guest(tmp_path: Path, platform: SimulatedPlatform) -> None:
    files = host(tmp_path, platform, debug=True)
    assert "debug" in missing(diagnose(files, Simulated(platform), now=NOW))["host.quote"]


def test_no_quotes(tmp_path: Path, platform: SimulatedPlatform) -> None:
    files = host(tmp_path, platform, unavailable=True)
    found = diagnose(files, Simulated(platform), now=NOW)
    assert "does not answer" in missing(found)["host.quote"]


def test_swap(tmp_path: Path, platform: SimulatedPlatform) -> None:
    files = host(tmp_path, platform)
    (tmp_path / SWAPS).write_bytes(b"Filename\n/dev/zram0 x\n")
    assert missing(diagnose(files, Simulated(platform), now=NOW)) == {}
    (tmp_path / SWAPS).write_bytes(b"Filename\n/dev/zram0 x\n/dev/sda2 partition\n")
    assert "swapoff" in missing(diagnose(files, Simulated(platform), now=NOW))["host.swap"]


def test_collateral(
    tmp_path: Path, platform: SimulatedPlatform, collateral: CollateralStore
) -> None:
    files, driver = host(tmp_path, platform), Simulated(platform)
    found = diagnose(files, driver, now=NOW, collateral=CollateralStore.empty())
    assert "cai collateral fetch --fmspc 53494d554c00" in missing(found)["host.collateral"]
    late = NOW + timedelta(days=60)
    found = diagnose(files, driver, now=late, collateral=collateral)
    assert "expired" in missing(found)["host.collateral"]


@pytest.mark.parametrize(("state", "check", "fix"), [
    (ConfidentialMode(0, 0, 0), "gpu.cc_mode", "--set-cc-mode=on"),
    (ConfidentialMode(1, 1, 0), "gpu.devtools", "--set-cc-mode=on"),
    (ConfidentialMode(1, 0, 1), "gpu.multi_gpu_mode", "NSCQ"),
    (ConfidentialMode(1, 0, 7), "gpu.multi_gpu_mode", "NVLink"),
])  # fmt: skip
def test_gpu_modes(
    tmp_path: Path, platform: SimulatedPlatform, state: ConfidentialMode, check: str, fix: str
) -> None:
    driver = Simulated(platform)
    driver.state = state
    fixes = missing(diagnose(host(tmp_path, platform), driver, now=NOW))
    assert fixes.keys() == {check}
    assert fix in fixes[check]


def test_a_gpu_without_confidential_computing(
    tmp_path: Path, platform: SimulatedPlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported() -> ConfidentialMode:
        raise Refused("NVML: settings: not supported", hint="CC mode")

    driver = Simulated(platform)
    monkeypatch.setattr(driver, "mode", unsupported)
    fixes = missing(diagnose(host(tmp_path, platform), driver, now=NOW))
    assert "not supported" in fixes["gpu.cc_mode"]


def test_old_driver_and_old_gpu(
    tmp_path: Path, platform: SimulatedPlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Simulated(platform)
    driver.number = 8
    monkeypatch.setattr(driver, "version", lambda: "535.104.05")
    fixes = missing(diagnose(host(tmp_path, platform), driver, now=NOW))
    assert {"gpu.driver", "gpu.0.architecture", "gpu.report"} <= fixes.keys()
    assert "550.90" in fixes["gpu.driver"]


def test_no_gpu_and_a_silent_one(
    tmp_path: Path, platform: SimulatedPlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, driver = host(tmp_path, platform), Simulated(platform)
    monkeypatch.setattr(driver, "count", lambda: 0)
    assert missing(diagnose(files, driver, now=NOW)).keys() == {"gpu.count"}

    def lost(_place: int, _nonce: bytes) -> bytes:
        raise StorageError("NVML: GPU is lost")

    silent = Simulated(platform)
    monkeypatch.setattr(silent, "report", lost)
    assert "lost" in missing(diagnose(files, silent, now=NOW))["gpu.report"]


def test_missing_reference_files(
    tmp_path: Path, platform: SimulatedPlatform, rims: RimStore
) -> None:
    files, driver = host(tmp_path, platform), Simulated(platform)
    fixes = missing(diagnose(files, driver, now=NOW, rims=RimStore.of([])))
    assert "v1/rim/NV_GPU_DRIVER_GH100_580.95.05" in fixes["gpu.0.rim"]
    assert "NV_GPU_VBIOS_1010_0200_882_960074001A" in fixes["gpu.0.rim"]
    only = replace(rims, files={"580.95.05": rims.files["580.95.05"]})
    assert "DRIVER" not in missing(diagnose(files, driver, now=NOW, rims=only))["gpu.0.rim"]
