"""The simulated GPUs and NVSwitches of one guest, with dials for whatever a test needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from cai.attest.evidence import DeviceEvidence
from cai.attest.gpu.report import NONCE_SIZE
from cai.attest.sim import nvidia
from cai.errors import FormatError, InputError, StorageError

if TYPE_CHECKING:
    from cai.attest.sim.platform import SimulatedPlatform

MAX_GPUS = 8
"""GPUs that a simulated machine has."""

MAX_SWITCHES = 4
"""NVSwitches that it has."""

GPU_LINKS = 18
"""NVLinks of one GPU; each names the switch at its other end."""

SWITCH_PORTS = 32
"""Entries of a switch's port table, as its report has them."""

NVDEC0_DISABLED = 0x55


class DeviceFailure(StrEnum):
    """Ways in which a device can be broken, forged or relayed."""

    SIGNATURE = "signature"
    """The signature is over another nonce."""
    NONCE = "nonce"
    """A properly signed report of another challenge: a replay."""
    BOOT_ROM = "boot-rom"
    """Signed by the boot ROM's key, the leaf cut off the chain."""
    FOREIGN = "foreign"
    """A device of another vendor root."""
    REPEATED = "repeated"
    """The first device again."""
    SWAPPED_CHAIN = "swapped-chain"
    """The next device's certificates."""
    TRUNCATED = "truncated"
    """The last byte of the report is missing."""
    TRAILING = "trailing"
    """A NUL follows the report, as some collectors append."""
    EXPIRED = "expired"
    """The leaf's validity is over."""
    LOST = "lost"
    """The device does not answer at all."""


@dataclass(frozen=True, slots=True)
class DeviceSettings:
    """What the devices of a guest are like.

    Attributes:
        arch: ``HOPPER`` or ``BLACKWELL``.
        protected_pcie: a protected-PCIe system: feature flag 2 and the switches beside the GPUs.
        switches: how many switches such a system shows.
        driver_version: in the reports; ``None`` is the simulator's usual one.
        vbios_version: in the GPUs' reports; ``None`` is the chip's usual one.
        feature_flag: ``None`` is the usual one for the mode.
        nvdec0: NVDEC0 status byte.
        measurements: block index (from 1) to the digest that the report shows.
        opaque: opaque fields that replace the usual ones; ``None`` leaves a field out.
        label: architecture label in the evidence; empty is the true one.
        facts: guest facts that replace the usual ones.
        failure: how devices are broken.
        failing: places of the devices to which measurements, opaque fields, label and failure
            apply; ``None`` is all of them.
    """

    arch: str = nvidia.ARCH
    protected_pcie: bool = False
    switches: int = MAX_SWITCHES
    driver_version: str | None = None
    vbios_version: str | None = None
    feature_flag: int | None = None
    nvdec0: int = NVDEC0_DISABLED
    measurements: Mapping[int, bytes] = field(default_factory=dict)
    opaque: Mapping[int, bytes | None] = field(default_factory=dict)
    label: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    failure: DeviceFailure | None = None
    failing: tuple[int, ...] | None = None


class SimulatedDevices:
    """The simulated devices of a guest; a ``DeviceSource``.

    Args:
        platform: where they are built in.
        count: how many GPUs.
        settings: the dials.

    Raises:
        InputError: the platform has not that many, or not of that kind.
    """

    simulated = True

    def __init__(
        self, platform: SimulatedPlatform, count: int, settings: DeviceSettings | None = None
    ) -> None:
        self.settings = settings or DeviceSettings()
        if not 0 <= count <= MAX_GPUS:
            raise InputError(f"a simulated platform has up to {MAX_GPUS} GPUs, not {count}")
        if self.settings.arch not in ("HOPPER", "BLACKWELL"):
            raise InputError(f"there are no simulated GPUs of {self.settings.arch!r}")
        switches = self.settings.switches if self.settings.protected_pcie else 0
        if not 0 <= switches <= MAX_SWITCHES:
            raise InputError(f"a simulated platform has up to {MAX_SWITCHES} switches")
        self._platform = platform
        self._count = count
        gpus = [platform.device(self.settings.arch, place) for place in range(count)]
        self._devices = [*gpus, *(platform.device("LS10", place) for place in range(switches))]

    def collect(self, nonce: bytes) -> tuple[DeviceEvidence, ...]:
        """Reports of all devices under one 32-byte nonce, GPUs first.

        Raises:
            FormatError: the nonce is not 32 bytes.
            StorageError: a device is dialled to be lost.
        """
        if len(nonce) != NONCE_SIZE:
            raise FormatError(f"GPU nonce of {len(nonce)} bytes, expected {NONCE_SIZE}")
        return tuple(self._evidence(place, nonce) for place in range(len(self._devices)))

    def facts(self) -> dict[str, str]:
        """Guest facts about the devices."""
        return {
            "cc_feature": "on",
            "devtools": "off",
            "multi_gpu_mode": "protected_pcie" if self.settings.protected_pcie else "none",
            "count": str(self._count),
            "driver": self.settings.driver_version or nvidia.DRIVER_VERSION,
            **self.settings.facts,
        }

    def _evidence(self, place: int, nonce: bytes) -> DeviceEvidence:
        failing = self.settings.failing
        broken = failing is None or place in failing
        failure = self.settings.failure if broken else None
        device = self._devices[0 if failure is DeviceFailure.REPEATED else place]
        shown = self._devices[(place + 1) % len(self._devices)]
        if failure is DeviceFailure.LOST:
            raise StorageError(f"device {place} does not answer")
        foundry = self._platform.foundry
        if failure is DeviceFailure.FOREIGN:
            foundry, device = self._platform.foreign_device(device.chip)
        elif failure is DeviceFailure.EXPIRED:
            device = self._platform.expired_device(device.chip, place)
        chain = nvidia.chain(foundry, shown if failure is DeviceFailure.SWAPPED_CHAIN else device)
        if failure is DeviceFailure.BOOT_ROM:
            device = nvidia.Gpu(device.boot_rom, device.boot_rom, device.chip)
            chain = chain[len(self._devices[place].leaf.pem) :]
        report = nvidia.make_report(
            device,
            bytes(32) if failure is DeviceFailure.NONCE else nonce,
            measurements=self._measurements(device.chip, changed=broken),
            opaque=self._opaque(place, device.chip, changed=broken),
            signed_nonce=bytes(32) if failure is DeviceFailure.SIGNATURE else None,
            responder=self._platform.next_responder_nonce(),
        )
        if failure is DeviceFailure.TRUNCATED:
            report = report[:-1]
        elif failure is DeviceFailure.TRAILING:
            report += b"\x00"
        return DeviceEvidence(
            arch=self.settings.label if broken and self.settings.label else device.chip.arch,
            uuid=f"GPU-SIMULATED-{place}" if place < self._count else f"SWITCH-SIMULATED-{place}",
            report=report,
            chain=chain,
        )

    def _measurements(self, chip: nvidia.Chip, *, changed: bool) -> list[bytes]:
        values = nvidia.default_measurements(chip)
        if changed:
            for index, value in self.settings.measurements.items():
                if 1 <= index <= len(values):
                    values[index - 1] = value
        return values

    def _opaque(
        self, place: int, chip: nvidia.Chip, *, changed: bool
    ) -> Mapping[int, bytes | None]:
        settings = self.settings
        fields: dict[int, bytes | None] = {}
        if chip.arch == "LS10":
            own = self._platform.pdi("LS10", place - self._count)
            fields = {22: own, 26: self._ports()}
        else:
            if settings.nvdec0 != NVDEC0_DISABLED:
                fields[11] = bytes((settings.nvdec0,))
            if settings.driver_version is not None:
                fields[3] = settings.driver_version.encode() + b"\x00"
            if settings.vbios_version is not None:
                fields[6] = nvidia.vbios_field(settings.vbios_version)
            if settings.protected_pcie:
                fields |= {21: b"\xaa", 22: self._links(), 36: b"\x02\x00"}
            if settings.feature_flag is not None:
                fields[36] = settings.feature_flag.to_bytes(2, "little")
        return {**fields, **settings.opaque} if changed else fields

    def _links(self) -> bytes:
        """For each NVLink of a GPU the switch at its other end, its identity byte-reversed."""
        count = max(1, self.settings.switches)
        switches = [self._platform.pdi("LS10", place)[::-1] for place in range(count)]
        return b"".join(switches[link % count] for link in range(GPU_LINKS))

    def _ports(self) -> bytes:
        """The GPUs that a switch sees, the rest of its table, and what its ports are for."""
        seen: Sequence[bytes] = [
            self._platform.pdi(self.settings.arch, place) for place in range(self._count)
        ]
        table = b"".join(seen).ljust(16 * 8, b"\xff")
        return table + bytes(port % 8 for port in range(SWITCH_PORTS))
