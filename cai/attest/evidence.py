"""Evidence as it is collected and carried, before anybody has verified it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from cai.attest.statement import gpu_evidence_digest


@dataclass(frozen=True, slots=True)
class DeviceEvidence:
    """What one GPU says of itself.

    Attributes:
        arch: ``HOPPER`` or ``BLACKWELL``; unauthenticated, the certificate decides.
        uuid: as NVML names the device; unauthenticated.
        report: SPDM GET_MEASUREMENTS request and MEASUREMENTS response, exactly.
        chain: PEM certificates, leaf first, exactly as the device gave them.
    """

    arch: str
    uuid: str
    report: bytes
    chain: bytes


@dataclass(frozen=True, slots=True)
class Evidence:
    """What one guest says of itself: a TDX quote, its event log and its devices."""

    quote: bytes
    devices: tuple[DeviceEvidence, ...] = ()
    event_log: bytes | None = None

    @property
    def gpu_digest(self) -> bytes:
        """Digest of the device list as a statement binds it."""
        return gpu_evidence_digest([(device.report, device.chain) for device in self.devices])


class QuoteSource(Protocol):
    """A TDX guest that can be asked for quotes; real (configfs-tsm) or simulated."""

    simulated: bool

    def quote(self, report_data: bytes) -> bytes:
        """A quote over exactly these 64 bytes; takes tens of milliseconds, one at a time."""

    def event_log(self) -> bytes | None:
        """The CCEL and AAEL bytes, if the guest has any."""


class DeviceSource(Protocol):
    """The GPUs of a guest; real (NVML) or simulated."""

    simulated: bool

    def collect(self, nonce: bytes) -> tuple[DeviceEvidence, ...]:
        """Reports of all devices under one 32-byte nonce."""

    def facts(self) -> dict[str, str]:
        """Guest facts: ``cc_feature``, ``devtools``, ``multi_gpu_mode``, ``count``, ``driver``."""
