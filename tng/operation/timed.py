"""Judges and agents whose answers are timed, and the probe that tells whether an agent proves."""

from __future__ import annotations

import secrets
import time
from pathlib import Path

from cai.attest.agent_client import (
    ChannelAgent,
    Dialect,
    ProofRequest,
    SessionProof,
    dialects_of,
)
from cai.attest.channel import MAX_GPU_AGE_S
from cai.attest.statement import ChannelStatement
from cai.errors import Refused
from cai.merkle import HASH_SIZE
from tng.channel.handshake import Claim
from tng.operation.metrics import Meters
from tng.peers.pool import SessionJudge
from tng.stock.agent import StockAgent
from tng.streams import Proven

READINESS = "readiness"
"""For whom the probe asks; the agent limits what one source may have waiting."""


class TimedJudge:
    """A judge of sessions whose verdicts are timed.

    Args:
        judge: that decides.
        name: of the entry.
        meters: that count.
    """

    def __init__(self, judge: SessionJudge, name: str, meters: Meters) -> None:
        self._judge = judge
        self._name = name
        self._meters = meters
        self.kind = judge.kind

    @property
    def unsafe(self) -> tuple[str, ...]:
        """The ``unsafe_…`` settings in force."""
        return self._judge.unsafe

    async def judge(self, claim: Claim, subject: str) -> Proven:
        """Verify a claim.

        Raises:
            CaiError: as the judge does.
        """
        started = time.monotonic()
        try:
            return await self._judge.judge(claim, subject)
        finally:
            self._meters.attestation.observe(time.monotonic() - started, self._name)


class TimedAgent(ChannelAgent):
    """An agent whose proofs are timed, and the age of the last one kept.

    Args:
        agent: that proves.
        name: of the entry.
        meters: that count.
    """

    def __init__(self, agent: ChannelAgent, name: str, meters: Meters) -> None:
        self._agent = agent
        self._name = name
        self._meters = meters
        self._proven_at: float | None = None
        self._age_s = 0.0
        self._statement = b""
        meters.evidence_age.source(self._age)

    async def prove(self, request: ProofRequest) -> SessionProof:
        """Evidence whose session tree holds the leaf.

        Raises:
            CaiError: as the agent does.
        """
        started = time.monotonic()
        try:
            proof = await self._agent.prove(request)
        finally:
            self._meters.attestation.observe(time.monotonic() - started, self._name)
        # Every session of one batch has the same statement, which takes a while to read.
        if proof.evidence.statement != self._statement:
            self._statement = proof.evidence.statement
            self._proven_at, self._age_s = time.monotonic(), age_of(proof)
        return proof

    def _age(self) -> list[tuple[tuple[str, ...], float]]:
        if self._proven_at is None:
            return []
        return [((self._name,), self._age_s + time.monotonic() - self._proven_at)]


def age_of(proof: SessionProof) -> float:
    """Age of the oldest evidence in a proof, seconds: the quote is new, the GPU's may not be."""
    if not proof.evidence.evidence.devices:
        return 0.0
    return float(ChannelStatement.decode(proof.evidence.statement).gpu.age_s)


async def demand_fresh(agent: ChannelAgent) -> None:
    """Have the agent prove the leaf of no session.

    Raises:
        CaiError: it does not prove, or with evidence that a verifier would refuse as too old.
    """
    proof = await agent.prove(ProofRequest(secrets.token_bytes(HASH_SIZE), READINESS))
    age = age_of(proof)
    if age > MAX_GPU_AGE_S:
        raise Refused(f"GPU evidence is {age:.0f} s old, and {MAX_GPU_AGE_S} s is the most")
    if proof.good_for_s <= 0:
        raise Refused("the guest's lease has ended")


async def demand_proof_of(socket: Path) -> None:
    """The same of whatever agent serves a socket: ours, or a stock one.

    Raises:
        CaiError: it does not prove.
    """
    if Dialect.SESSION in await dialects_of(socket):
        await demand_fresh(ChannelAgent(socket))
    else:
        await StockAgent(socket).collect('{"readiness":"' + secrets.token_hex(16) + '"}')
