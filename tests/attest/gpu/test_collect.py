"""Collection through NVML, with a driver that plays recorded bytes."""

from __future__ import annotations

import builtins
import ctypes
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from cai.attest.evidence import DeviceSource
from cai.attest.gpu.collect import ConfidentialMode, NoDevices, NvidiaDevices, NvmlDriver
from cai.attest.gpu.report import parse_report
from cai.errors import FormatError, InputMissing, Refused, StorageError
from tests.attest.gpu.driver import Recorded

VECTORS = Path(os.environ.get("CAI_VECTORS", "../shared/vectors")) / "evidence" / "gpu"
NONCE = bytes(range(32))


def recorded(name: str) -> bytes:
    path = VECTORS / name
    if not path.exists():
        pytest.skip(f"no shared vector {path}")
    return path.read_bytes()


def test_every_device_is_asked_under_one_nonce() -> None:
    driver = Recorded(reports=[b"one", b"two"])
    source: DeviceSource = NvidiaDevices(driver)
    devices = source.collect(NONCE)
    assert [(item.arch, item.uuid, item.report, item.chain) for item in devices] == [
        ("HOPPER", "GPU-0", b"one", b"chain"), ("HOPPER", "GPU-1", b"two", b"chain"),
    ]  # fmt: skip
    assert driver.nonces == [NONCE, NONCE]
    assert not source.simulated


@pytest.mark.parametrize("size", [0, 31, 33, 48])
def test_nonce_is_32_bytes(size: int) -> None:
    with pytest.raises(FormatError):
        NvidiaDevices(Recorded()).collect(bytes(size))


def test_no_device_is_an_answer_and_many_are_not() -> None:
    assert NvidiaDevices(Recorded(reports=[])).collect(NONCE) == ()
    with pytest.raises(Refused, match="17"):
        NvidiaDevices(Recorded(reports=[b"x"] * 17)).collect(NONCE)


@pytest.mark.parametrize(("number", "arch"), [(9, "HOPPER"), (10, "BLACKWELL")])
def test_architectures(number: int, arch: str) -> None:
    assert NvidiaDevices(Recorded(number=number)).collect(NONCE)[0].arch == arch


@pytest.mark.parametrize("number", [0, 7, 8, 11, 255])
def test_other_architectures_cannot_attest(number: int) -> None:
    with pytest.raises(Refused, match=str(number)):
        NvidiaDevices(Recorded(number=number)).collect(NONCE)


@pytest.mark.parametrize("driver", [Recorded(reports=[b""]), Recorded(chain=b"")])
def test_empty_answers(driver: Recorded) -> None:
    with pytest.raises(FormatError, match="empty"):
        NvidiaDevices(driver).collect(NONCE)


@pytest.mark.parametrize(("state", "expected"), [
    (ConfidentialMode(1, 0, 0), ("on", "off", "none")),
    (ConfidentialMode(0, 0, 0), ("off", "off", "none")),
    (ConfidentialMode(1, 1, 1), ("on", "on", "protected_pcie")),
    (ConfidentialMode(2, 7, 2), ("off", "on", "nvlink_encryption")),
    (ConfidentialMode(1, 0, 9), ("on", "off", "unknown-9")),
])  # fmt: skip
def test_facts(state: ConfidentialMode, expected: tuple[str, str, str]) -> None:
    facts = NvidiaDevices(Recorded(state=state)).facts()
    assert (facts["cc_feature"], facts["devtools"], facts["multi_gpu_mode"]) == expected
    assert (facts["count"], facts["driver"]) == ("1", "580.95.05")


@pytest.mark.parametrize(("state", "what"), [
    (ConfidentialMode(0, 0, 0), "CC mode"), (ConfidentialMode(1, 1, 0), "DevTools")
])  # fmt: skip
def test_an_open_gpu_is_refused_with_the_way_out(state: ConfidentialMode, what: str) -> None:
    with pytest.raises(Refused, match=what) as caught:
        NvidiaDevices(Recorded(state=state)).require_confidential()
    assert "--set-cc-mode=on" in (caught.value.hint or "")
    NvidiaDevices(Recorded()).require_confidential()


def test_no_devices() -> None:
    source: DeviceSource = NoDevices()
    assert (source.collect(NONCE), source.facts()) == ((), {"count": "0"})
    with pytest.raises(FormatError):
        source.collect(b"")


def test_ready_state() -> None:
    driver = Recorded()
    NvidiaDevices(driver).set_ready()
    assert driver.is_ready


class TestNvml:
    """``NvmlDriver`` against the real binding, whose library calls are replaced."""

    @pytest.fixture
    def nvml(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        library = pytest.importorskip("pynvml")
        monkeypatch.setattr(library, "nvmlInit", lambda: None)
        monkeypatch.setattr(library, "nvmlDeviceGetHandleByIndex", lambda place: place)
        monkeypatch.setattr(library, "nvmlDeviceGetCount", lambda: 1)
        monkeypatch.setattr(library, "nvmlDeviceGetArchitecture", lambda _handle: 9)
        monkeypatch.setattr(library, "nvmlDeviceGetUUID", lambda _handle: "GPU-1")
        monkeypatch.setattr(library, "nvmlSystemGetDriverVersion", lambda: "580.95.05")
        return library

    def test_recorded_bytes_come_back_exactly(
        self, nvml: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        report = recorded("reports/hopper-580.95.05-coco.bin")
        chain = recorded("chains/hopper-580.95.05-coco.pem").rstrip(b"\x00")

        def give_report(_handle: int, nonce: bytes) -> Any:
            answer = nvml.c_nvmlConfComputeGpuAttestationReport_t()
            answer.attestationReportSize = len(report)
            ctypes.memmove(answer.attestationReport, report, len(report))
            assert len(nonce) == 32
            return answer

        def give_chain(_handle: int) -> Any:
            answer = nvml.c_nvmlConfComputeGpuCertificate_t()
            answer.attestationCertChainSize = len(chain) + 1
            ctypes.memmove(answer.attestationCertChain, chain + b"\x00", len(chain) + 1)
            return answer

        monkeypatch.setattr(nvml, "nvmlDeviceGetConfComputeGpuAttestationReport", give_report)
        monkeypatch.setattr(nvml, "nvmlDeviceGetConfComputeGpuCertificate", give_chain)
        (device,) = NvidiaDevices().collect(NONCE)
        assert (device.report, device.chain, device.arch) == (report, chain, "HOPPER")
        assert parse_report(device.report).driver_version == "580.95.05"

    @pytest.mark.parametrize("size", [0, 0x2001, 0xFFFFFFFF])
    def test_sizes_beyond_the_buffer(
        self, nvml: Any, monkeypatch: pytest.MonkeyPatch, size: int
    ) -> None:
        def give(_handle: int, _nonce: bytes) -> Any:
            answer = nvml.c_nvmlConfComputeGpuAttestationReport_t()
            answer.attestationReportSize = size
            return answer

        monkeypatch.setattr(nvml, "nvmlDeviceGetConfComputeGpuAttestationReport", give)
        with pytest.raises(FormatError, match="buffer"):
            NvmlDriver().report(0, NONCE)

    def test_settings(self, nvml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        def give(reference: Any) -> int:
            settings = reference._obj
            assert settings.version == nvml.nvmlSystemConfComputeSettings_v1
            settings.ccFeature, settings.devToolsMode, settings.multiGpuMode = 1, 0, 2
            return 0

        monkeypatch.setattr(nvml, "nvmlSystemGetConfComputeSettings", give)
        assert NvmlDriver().mode() == ConfidentialMode(1, 0, 2)
        monkeypatch.setattr(nvml, "nvmlSystemGetConfComputeSettings",
                            lambda _reference: nvml.NVML_ERROR_NOT_SUPPORTED)  # fmt: skip
        with pytest.raises(Refused) as caught:
            NvmlDriver().mode()
        assert "cc-mode" in (caught.value.hint or "")

    def test_errors_of_the_driver_become_ours(
        self, nvml: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def lost(_handle: int) -> None:
            raise nvml.NVMLError(nvml.NVML_ERROR_GPU_IS_LOST)

        monkeypatch.setattr(nvml, "nvmlDeviceGetUUID", lost)
        with pytest.raises(StorageError, match="UUID"):
            NvmlDriver().uuid(0)

    def test_ready_state(self, nvml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        given: list[int] = []
        monkeypatch.setattr(nvml, "nvmlSystemSetConfComputeGpusReadyState", given.append)
        monkeypatch.setattr(nvml, "nvmlSystemGetConfComputeGpusReadyState", lambda: 1)
        driver = NvmlDriver()
        driver.set_ready(ready=True)
        assert given == [1]
        assert driver.ready()

    def test_no_driver(self, monkeypatch: pytest.MonkeyPatch) -> None:
        library = pytest.importorskip("pynvml")

        def fail() -> None:
            raise library.NVMLError(library.NVML_ERROR_LIBRARY_NOT_FOUND)

        monkeypatch.setattr(library, "nvmlInit", fail)
        with pytest.raises(InputMissing, match="does not start"):
            NvmlDriver().count()


def test_nvml_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name == "pynvml":
            raise ImportError(name)
        return original(name, *rest, **named)

    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputMissing) as caught:
        NvmlDriver().version()
    assert "cai-confidential[host]" in (caught.value.hint or "")
