"""A key broker's admission tickets, as tests want them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cai import merkle
from cai.attest.checkpoint import Checkpoint, CheckpointProof, sign_checkpoint
from cai.attest.ticket import AuditProof, Ticket, TicketClaims

KBS = "07" * 16


@dataclass
class Broker:
    """Signs tickets; ``changes`` replaces claims."""

    key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    log_key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)

    @property
    def public(self) -> str:
        return self.key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()

    def ticket(self, **changes: Any) -> bytes:
        claims = TicketClaims(
            kbs=KBS,
            realm="simulated",
            lease="08" * 16,
            nonce="09" * 32,
            channel_keys=(),
            platform="0a" * 32,
            launch_digest="ab" * 48,
            models=("01" * 32,),
            issued=datetime.now(UTC).replace(microsecond=0),
            ttl_s=900,
            drain_s=60,
            policy="0b" * 32,
        )
        claims = replace(claims, **changes)
        leaf = merkle.leaf_hash(bytes.fromhex(claims.digest))
        note = sign_checkpoint(Checkpoint(f"cai-kbs/{KBS}", 1, leaf), self.log_key)
        audit = AuditProof(leaf, CheckpointProof(note, 0, 1, ()))
        return Ticket(claims, audit).signed(self.key)
