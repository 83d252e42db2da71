"""The proof of a session, sans I/O: both ends as small state machines (spec-channel §4).

    verifier                      prover
      prove() ── PROVE ──────────▶ on_prove()
      on_ack() ◀──────────── ACK ──┘   └─ leaf hash ─▶ agent
      on_evidence() ◀── EVIDENCE ── (the agent's answer)

Each end computes the leaf from its own end of the TLS session: from the exporter and from the
certificate that the prover presented in this handshake. Nothing of it is taken from a message, so
a proof that was relayed, replayed or reflected leads to another leaf. Whether the evidence is good
is then ``cai.attest.channel.verify_channel``'s answer.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256

from cai import merkle
from cai.attest.channel import ChannelEvidence, Role, leaf_data
from cai.errors import FormatError, LimitExceeded, SettingError
from tng.channel.frames import MAX_EVIDENCE, NONCE_SIZE

EXPORTER_LABEL = b"EXPORTER-cai-channel-v1"
"""TLS exporter label (RFC 8446 §7.5)."""

EXPORTER_SIZE = 32
"""Bytes taken from the exporter."""

MAX_SEQ = 2**32 - 1
"""Highest number of a proof within one session."""

Exporter = Callable[[bytes], bytes]
"""``exporter(context)``: 32 bytes under ``EXPORTER_LABEL`` of one end's TLS session."""


def exporter_context(prove: bytes, ack: bytes) -> bytes:
    """Context of the exporter: ``SHA-256(PROVE ‖ ACK)`` over the two payloads (§4 step 3)."""
    return sha256(prove + ack).digest()


@dataclass(frozen=True, slots=True)
class Claim:
    """What a prover claims, with the leaf that the verifier computed itself.

    Attributes:
        leaf: 70 bytes of leaf data.
        evidence: as received, unverified.
    """

    leaf: bytes
    evidence: ChannelEvidence


class SessionVerifier:
    """The verifier's end of all proofs of one session.

    Args:
        prover: role of the other end.
        exporter: of this end's TLS session.
        prover_spki: DER SubjectPublicKeyInfo of the certificate that the prover presented.
        random: source of nonces; another one only in tests.
    """

    def __init__(
        self,
        prover: Role,
        exporter: Exporter,
        prover_spki: bytes,
        *,
        random: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._role = prover
        self._exporter = exporter
        self._spki = prover_spki
        self._random = random
        self._next_seq = 0
        self._prove: bytes | None = None
        self._leaf: bytes | None = None

    def prove(self) -> bytes:
        """Payload of the next PROVE (§4 step 1).

        Raises:
            FormatError: the last proof is still open, or the numbers are used up.
        """
        if self._prove is not None or self._next_seq > MAX_SEQ:
            raise FormatError("a proof is already asked for")
        self._prove = self._random(NONCE_SIZE) + self._next_seq.to_bytes(4, "big")
        return self._prove

    def on_ack(self, ack: bytes) -> None:
        """Take the ACK and compute the leaf (§4 steps 3 and 4).

        Raises:
            FormatError: no proof is open, or it has its ACK already.
        """
        if self._prove is None or self._leaf is not None or len(ack) != NONCE_SIZE:
            raise FormatError("ACK out of turn")
        ekm = self._exporter(exporter_context(self._prove, ack))
        self._leaf = leaf_data(self._role, self._next_seq, self._spki, ekm)

    def on_evidence(self, payload: bytes) -> Claim:
        """Take the EVIDENCE and close this proof (§4 step 7 is the caller's).

        Raises:
            FormatError: out of turn, or malformed.
        """
        if self._leaf is None:
            raise FormatError("EVIDENCE out of turn")
        leaf, self._leaf, self._prove = self._leaf, None, None
        self._next_seq += 1
        try:
            return Claim(leaf, ChannelEvidence.decode(payload))
        except (LimitExceeded, SettingError) as error:
            raise FormatError(error.message) from error


@dataclass(frozen=True, slots=True)
class Answer:
    """A prover's answer to one PROVE.

    Attributes:
        ack: payload of the ACK, to be sent at once.
        leaf: hash of the session's leaf, 32 bytes, for the agent.
    """

    ack: bytes
    leaf: bytes


class SessionProver:
    """The prover's end of all proofs of one session.

    Args:
        role: this end's.
        exporter: of this end's TLS session.
        own_spki: DER SubjectPublicKeyInfo of the certificate presented by this end.
        random: source of nonces; another one only in tests.
    """

    def __init__(
        self,
        role: Role,
        exporter: Exporter,
        own_spki: bytes,
        *,
        random: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._role = role
        self._exporter = exporter
        self._spki = own_spki
        self._random = random
        self._next_seq = 0
        self._open = False

    def on_prove(self, prove: bytes) -> Answer:
        """Answer a PROVE (§4 steps 1 to 5).

        Raises:
            FormatError: another proof is open, or the number is not the next one.
        """
        if self._open or len(prove) != NONCE_SIZE + 4:
            raise FormatError("PROVE out of turn")
        seq = int.from_bytes(prove[NONCE_SIZE:], "big")
        if seq != self._next_seq:
            raise FormatError(f"PROVE number {seq}, expected {self._next_seq}")
        ack = self._random(NONCE_SIZE)
        ekm = self._exporter(exporter_context(prove, ack))
        self._open = True
        return Answer(ack, merkle.leaf_hash(leaf_data(self._role, seq, self._spki, ekm)))

    def evidence(self, evidence: ChannelEvidence) -> bytes:
        """Payload of the EVIDENCE (§4 step 6).

        Raises:
            FormatError: no proof is open, or the evidence does not fit a frame.
        """
        if not self._open:
            raise FormatError("EVIDENCE without a PROVE")
        payload = evidence.encode()
        if len(payload) > MAX_EVIDENCE:
            raise FormatError(f"evidence of {len(payload)} bytes, at most {MAX_EVIDENCE}")
        self._open = False
        self._next_seq += 1
        return payload
