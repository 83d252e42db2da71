"""A GPU driver for tests that gives recorded bytes."""

from __future__ import annotations

from dataclasses import dataclass, field

from cai.attest.gpu.collect import ConfidentialMode


@dataclass
class Recorded:
    """A ``GpuDriver`` that gives recorded bytes."""

    reports: list[bytes] = field(default_factory=lambda: [b"report"])
    chain: bytes = b"chain"
    number: int = 9
    state: ConfidentialMode = field(default_factory=lambda: ConfidentialMode(1, 0, 0))
    is_ready: bool = False
    nonces: list[bytes] = field(default_factory=list)

    def count(self) -> int:
        return len(self.reports)

    def architecture(self, place: int) -> int:
        return self.number

    def uuid(self, place: int) -> str:
        return f"GPU-{place}"

    def report(self, place: int, nonce: bytes) -> bytes:
        self.nonces.append(nonce)
        return self.reports[place]

    def certificates(self, place: int) -> bytes:
        return self.chain

    def mode(self) -> ConfidentialMode:
        return self.state

    def version(self) -> str:
        return "580.95.05"

    def ready(self) -> bool:
        return self.is_ready

    def set_ready(self, *, ready: bool) -> None:
        self.is_ready = ready
