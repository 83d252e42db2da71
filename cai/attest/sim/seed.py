"""Where a simulator's keys, serial numbers and nonces come from: one seed, by name.

Two simulators of one seed and one time of making are the same hardware, byte for byte; that is what
recorded test vectors need. Without a given seed one is drawn, and nothing repeats.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from hashlib import sha512

from cryptography.hazmat.primitives.asymmetric import ec

SEED_SIZE = 32
"""Bytes of a drawn seed; a given one may have any length."""


@dataclass(frozen=True, slots=True)
class Seed:
    """A source of bytes, keys and serial numbers by label.

    Attributes:
        value: whoever has it has every simulated key.
    """

    value: bytes

    @classmethod
    def fresh(cls) -> Seed:
        """A seed that nobody has had."""
        return cls(secrets.token_bytes(SEED_SIZE))

    def __repr__(self) -> str:
        return "<simulator seed>"

    def below(self, label: str) -> Seed:
        """The seed of a part, e.g. of one device."""
        return Seed(self.bytes(f"seed {label}", SEED_SIZE))

    def bytes(self, label: str, size: int) -> bytes:
        """``size`` bytes, up to 64, for a label."""
        return sha512(b"cai/simulator/v1\x00" + self.value + b"\x00" + label.encode()).digest()[
            :size
        ]

    def key(self, label: str, curve: ec.EllipticCurve) -> ec.EllipticCurvePrivateKey:
        """A private key on P-256 or P-384."""
        # 64 bytes reduced into [1, 2^(bits-1)]: below the order of either curve.
        number = int.from_bytes(self.bytes(f"key {label}", 64), "big")
        return ec.derive_private_key(number % (1 << (curve.key_size - 1)) + 1, curve)

    def serial(self, label: str) -> int:
        """A positive certificate serial number of 18 bytes."""
        return int.from_bytes(b"\x01" + self.bytes(f"serial {label}", 17), "big")
