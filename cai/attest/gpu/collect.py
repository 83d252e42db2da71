"""Collecting GPU evidence through NVML: reports, certificate chains and guest facts.

CC mode and DevTools mode are not in a report, so the measured guest itself asks for them and states
them (evidence.md §5.1). NVML is an extra (``pip install cai-confidential[host]``) and is imported
only here, when it is used. All access goes through ``GpuDriver``, so that tests play the driver.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from cai.attest.evidence import DeviceEvidence
from cai.attest.gpu.report import NONCE_SIZE
from cai.errors import CaiError, FormatError, InputMissing, Refused, StorageError

MAX_DEVICES = 16
"""Most GPUs of one guest."""

ARCHITECTURES = {9: "HOPPER", 10: "BLACKWELL"}
"""NVML's architecture number to the label in evidence."""

MULTI_GPU_MODES = {0: "none", 1: "protected_pcie", 2: "nvlink_encryption"}
"""NVML's multi-GPU mode to the guest fact."""

HINT_NVML = "install the NVIDIA driver and `pip install cai-confidential[host]`"

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class ConfidentialMode:
    """What the driver says of confidential computing on this machine.

    Attributes:
        cc_feature: 1 when on.
        devtools: 1 when on: then the GPU hides nothing from its host.
        multi_gpu: 0 none, 1 protected PCIe, 2 NVLink encryption.
    """

    cc_feature: int
    devtools: int
    multi_gpu: int


class GpuDriver(Protocol):
    """The few things that the GPU driver is asked for; raises errors of ``cai.errors``."""

    def count(self) -> int:
        """How many GPUs the guest has."""

    def architecture(self, place: int) -> int:
        """NVML's number: 9 Hopper, 10 Blackwell."""

    def uuid(self, place: int) -> str:
        """``GPU-…``."""

    def report(self, place: int, nonce: bytes) -> bytes:
        """Attestation report under a 32-byte nonce, exactly."""

    def certificates(self, place: int) -> bytes:
        """PEM chain, leaf first."""

    def mode(self) -> ConfidentialMode:
        """CC feature, DevTools and multi-GPU mode."""

    def version(self) -> str:
        """Driver version."""

    def ready(self) -> bool:
        """Whether the GPUs accept work."""

    def set_ready(self, *, ready: bool) -> None:
        """Let the GPUs accept work, or not."""


class NvidiaDevices:
    """The GPUs of this guest; a ``DeviceSource``.

    Args:
        driver: NVML by default.
    """

    simulated = False

    def __init__(self, driver: GpuDriver | None = None) -> None:
        self._driver: GpuDriver = driver or NvmlDriver()

    def collect(self, nonce: bytes) -> tuple[DeviceEvidence, ...]:
        """Reports of all devices under one 32-byte nonce.

        Raises:
            FormatError: the nonce is not 32 bytes, or a device answers with nothing.
            Refused: more devices than are supported, or one of an unknown architecture.
            InputMissing, StorageError: NVML is not usable.
        """
        if len(nonce) != NONCE_SIZE:
            raise FormatError(f"GPU nonce of {len(nonce)} bytes, expected {NONCE_SIZE}")
        count = self._driver.count()
        if count > MAX_DEVICES:
            raise Refused(f"{count} GPUs, at most {MAX_DEVICES} are supported")
        return tuple(self._device(place, nonce) for place in range(count))

    def facts(self) -> dict[str, str]:
        """Guest facts: ``cc_feature``, ``devtools``, ``multi_gpu_mode``, ``count``, ``driver``."""
        mode = self._driver.mode()
        return {
            "cc_feature": "on" if mode.cc_feature == 1 else "off",
            # Anything but a clear "off" counts as on: that is the answer that refuses.
            "devtools": "off" if mode.devtools == 0 else "on",
            "multi_gpu_mode": MULTI_GPU_MODES.get(mode.multi_gpu, f"unknown-{mode.multi_gpu}"),
            "count": str(self._driver.count()),
            "driver": self._driver.version(),
        }

    def require_confidential(self) -> None:
        """Demand CC mode on and DevTools off before anything is asked of a key broker.

        Raises:
            Refused: naming what is wrong and how it is set right.
        """
        facts = self.facts()
        if facts["cc_feature"] != "on":
            raise Refused("CC mode of the GPU is off", hint=FIX_CC_MODE)
        if facts["devtools"] != "off":
            raise Refused("DevTools mode of the GPU is on", hint=FIX_DEVTOOLS)

    def set_ready(self) -> None:
        """Let the GPUs accept work; only after this guest verified them itself (decisions §2.5)."""
        self._driver.set_ready(ready=True)

    def _device(self, place: int, nonce: bytes) -> DeviceEvidence:
        number = self._driver.architecture(place)
        arch = ARCHITECTURES.get(number)
        if arch is None:
            raise Refused(f"GPU {place}: architecture {number} cannot attest",
                          hint="Hopper and Blackwell GPUs can")  # fmt: skip
        report = self._driver.report(place, nonce)
        chain = self._driver.certificates(place)
        if not report or not chain:
            raise FormatError(f"GPU {place} gave an empty report or certificate chain")
        return DeviceEvidence(arch, self._driver.uuid(place), report, chain)


class NoDevices:
    """A guest without GPUs; a ``DeviceSource``. Whether that is enough is a policy's question."""

    simulated = False

    def collect(self, nonce: bytes) -> tuple[DeviceEvidence, ...]:
        """Nothing."""
        if len(nonce) != NONCE_SIZE:
            raise FormatError(f"GPU nonce of {len(nonce)} bytes, expected {NONCE_SIZE}")
        return ()

    def facts(self) -> dict[str, str]:
        """Guest facts: that there is no GPU."""
        return {"count": "0"}


FIX_CC_MODE = (
    "on the host, with the GPU unbound: nvidia_gpu_tools.py --set-cc-mode=on"
    " --reset-after-cc-mode-switch; then restart the guest"
)
FIX_DEVTOOLS = (
    "on the host: nvidia_gpu_tools.py --set-cc-mode=on (not devtools)"
    " --reset-after-cc-mode-switch; then restart the guest"
)


class NvmlDriver:
    """``GpuDriver`` over NVML; the library is initialised at first use and kept."""

    def __init__(self) -> None:
        self._library: Any = None
        self._starting = threading.Lock()

    def count(self) -> int:
        """How many GPUs the guest has."""
        return int(self._ask("count GPUs", lambda nvml: nvml.nvmlDeviceGetCount()))

    def architecture(self, place: int) -> int:
        """NVML's number: 9 Hopper, 10 Blackwell."""
        return int(
            self._ask(
                f"GPU {place}: architecture",
                lambda nvml: nvml.nvmlDeviceGetArchitecture(nvml.nvmlDeviceGetHandleByIndex(place)),
            )
        )

    def uuid(self, place: int) -> str:
        """``GPU-…``."""
        return str(
            self._ask(
                f"GPU {place}: UUID",
                lambda nvml: nvml.nvmlDeviceGetUUID(nvml.nvmlDeviceGetHandleByIndex(place)),
            )
        )

    def report(self, place: int, nonce: bytes) -> bytes:
        """Attestation report: exactly ``attestationReportSize`` bytes of NVML's buffer."""

        def ask(nvml: Any) -> bytes:
            handle = nvml.nvmlDeviceGetHandleByIndex(place)
            answer = nvml.nvmlDeviceGetConfComputeGpuAttestationReport(handle, nonce)
            return _cut(answer.attestationReport, answer.attestationReportSize, f"GPU {place}")

        return self._ask(f"GPU {place}: attestation report", ask)

    def certificates(self, place: int) -> bytes:
        """PEM chain, leaf first: exactly ``attestationCertChainSize`` bytes."""

        def ask(nvml: Any) -> bytes:
            handle = nvml.nvmlDeviceGetHandleByIndex(place)
            answer = nvml.nvmlDeviceGetConfComputeGpuCertificate(handle)
            size = answer.attestationCertChainSize
            # Some drivers count the terminating NUL.
            return _cut(answer.attestationCertChain, size, f"GPU {place}").rstrip(b"\x00")

        return self._ask(f"GPU {place}: certificate chain", ask)

    def mode(self) -> ConfidentialMode:
        """CC feature, DevTools and multi-GPU mode."""

        def ask(nvml: Any) -> ConfidentialMode:
            settings = nvml.c_nvmlSystemConfComputeSettings_v1_t()
            status = nvml.nvmlSystemGetConfComputeSettings(ctypes.byref(settings))
            if status != nvml.NVML_SUCCESS:
                raise nvml.NVMLError(status)
            return ConfidentialMode(
                int(settings.ccFeature), int(settings.devToolsMode), int(settings.multiGpuMode)
            )

        return self._ask("confidential-computing settings", ask)

    def version(self) -> str:
        """Driver version."""
        return str(self._ask("driver version", lambda nvml: nvml.nvmlSystemGetDriverVersion()))

    def ready(self) -> bool:
        """Whether the GPUs accept work."""
        return bool(
            self._ask("ready state", lambda nvml: nvml.nvmlSystemGetConfComputeGpusReadyState())
        )

    def set_ready(self, *, ready: bool) -> None:
        """Let the GPUs accept work, or not."""
        self._ask(
            "set the ready state",
            lambda nvml: nvml.nvmlSystemSetConfComputeGpusReadyState(int(ready)),
        )

    def _ask(self, what: str, question: Callable[[Any], _T]) -> _T:
        nvml = self._nvml()
        try:
            return question(nvml)
        except nvml.NVMLError as error:
            raise _failed(what, nvml, error) from error

    def _nvml(self) -> Any:
        with self._starting:
            if self._library is None:
                try:
                    import pynvml
                except ImportError as error:
                    raise InputMissing("NVML is not installed", hint=HINT_NVML) from error
                try:
                    pynvml.nvmlInit()
                except pynvml.NVMLError as error:
                    raise InputMissing(
                        f"NVML does not start: {error}", hint=HINT_NVML
                    ) from error
                self._library = pynvml
            return self._library


def _cut(buffer: Any, size: int, what: str) -> bytes:
    data = bytes(buffer)
    if not 0 < size <= len(data):
        raise FormatError(f"{what}: the driver names {size} bytes of a buffer of {len(data)}")
    return data[:size]


def _failed(what: str, nvml: Any, error: Exception) -> CaiError:
    if isinstance(error, nvml.NVMLError_NotSupported):
        return Refused(f"NVML: {what}: not supported", hint=FIX_CC_MODE)
    return StorageError(f"NVML: {what}: {error}", hint="look at nvidia-smi and dmesg")
