"""The proofs at the start of a session, run over a link (spec-channel §4).

Both ends run the same steps: each may demand a proof and owe one. ``prove_session`` returns only
when everything that was demanded has verified; before that no stream frame is accepted from the
peer and none is sent. What it returns goes on to prove the running session again (``Proofs``).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from cai.attest.agent_client import Busy, ProofRequest, SessionProof
from cai.attest.channel import Role
from cai.errors import CaiError, FormatError, PeerError, PeerWithoutEvidence, Refused
from tng.channel.frames import Frame, FrameType, parse_reason
from tng.channel.handshake import Claim, SessionProver, SessionVerifier
from tng.channel.link import Link
from tng.streams import Code, Proven

PROOF_TIMEOUT_S = 20.0
"""Longest time from the end of the TLS handshake to READY of both ends, seconds; each agent may
take 10 of them."""

Agent = Callable[[ProofRequest], Awaitable[SessionProof]]
"""Turns a session's leaf into evidence."""

Judge = Callable[[Claim], Awaitable[Proven]]
"""Verifies a claim; raises a ``CaiError`` to refuse it."""


class EvidenceRefusedByPeer(Refused):
    """The verifier at the other end does not accept this end's evidence."""

    code = "evidence-refused-by-peer"


@dataclass(frozen=True, slots=True)
class Owes:
    """How this end proves itself.

    Attributes:
        agent: makes the evidence.
        spki: DER SubjectPublicKeyInfo of the certificate that this end presents.
        key: SHA-256 of it.
        source: for whom, as the agent counts who waits.
    """

    agent: Agent
    spki: bytes
    key: bytes
    source: str = ""


class Proofs:
    """Every proof of one session, in both directions.

    Args:
        link: TLS session, the handshake done.
        role: this end's.
        owes: how this end proves itself; ``None`` when it does not.
        judge: verifies the other end; ``None`` demands nothing of it.

    Raises:
        PeerWithoutEvidence: a proof is demanded, and the peer presented no usable certificate.

    Attributes:
        proven: what the last proof of the peer gave; ``None`` when none is demanded.
        given_for_s: how long this end may serve on its last proof, by its lease, seconds.
    """

    def __init__(self, link: Link, role: Role, owes: Owes | None, judge: Judge | None) -> None:
        other = Role.CLIENT if role is Role.SERVER else Role.SERVER
        export = link.tls.export
        self.judge = judge
        self.owes = owes
        self.verifier = (
            SessionVerifier(other, export, link.tls.peer_spki()) if judge is not None else None
        )
        self.prover = SessionProver(role, export, owes.spki) if owes is not None else None
        self.proven: Proven | None = None
        self.given_for_s = math.inf

    def answer(self, link: Link, prove: bytes, *, renewal: bool) -> ProofRequest:
        """Answer a PROVE with an ACK.

        Returns:
            What to ask the agent for, by ``give``.

        Raises:
            FormatError: it is out of turn.
            PeerWithoutEvidence: this end proves nothing.
            PeerError: the session ended.
        """
        if self.prover is None or self.owes is None:
            raise PeerWithoutEvidence("a proof is demanded of this end, which has no agent")
        answer = self.prover.on_prove(prove)
        link.send_soon(Frame(FrameType.ACK, 0, answer.ack))
        return ProofRequest(answer.leaf, self.owes.source, renewal, self.owes.key)

    async def give(self, link: Link, request: ProofRequest) -> None:
        """Get the evidence from the agent and send it.

        Raises:
            PeerError: the session ended.
            CaiError: the agent's error.
        """
        assert self.prover is not None  # noqa: S101 - by answer()
        assert self.owes is not None  # noqa: S101
        proof = await self.owes.agent(request)
        payload = self.prover.evidence(proof.evidence)
        await link.send(Frame(FrameType.EVIDENCE, 0, payload))
        self.given_for_s = proof.good_for_s

    async def take(self, claim: Claim) -> Proven:
        """Verify the peer's claim.

        Raises:
            CaiError: it does not pass.
        """
        assert self.judge is not None  # noqa: S101 - a claim has a verifier
        self.proven = await self.judge(claim)
        return self.proven


async def prove_session(
    link: Link, role: Role, *, owes: Owes | None, judge: Judge | None
) -> Proofs:
    """Run every proof that both ends demand, and open the session.

    Args:
        link: TLS session, the handshake done.
        role: this end's; a server always owes a proof.
        owes: how this end proves itself.
        judge: verifies the other end; ``None`` demands nothing of it.

    Raises:
        PeerWithoutEvidence: the peer gives no proof, or not in time, with its reason.
        EvidenceRefusedByPeer: the peer does not accept this end's evidence.
        PeerError: the peer left.
        FormatError, LimitExceeded, SettingError: the peer breaks the protocol; it has been told.
        CaiError: whatever judge or agent raised; the peer has been told.
    """
    try:
        async with asyncio.timeout(PROOF_TIMEOUT_S):
            return await _Opening(link, role, owes, judge).run()
    except TimeoutError as error:
        link.abort()
        if judge is None:
            raise PeerError(f"no proof was agreed within {PROOF_TIMEOUT_S:g} s") from error
        raise PeerWithoutEvidence(f"peer gave no proof within {PROOF_TIMEOUT_S:g} s") from error
    except FormatError as error:
        await link.refuse(Code.PROTOCOL, error.message)
        raise
    except BaseException:
        link.close()
        raise


class _Opening:
    """The state of one end before the session is open."""

    def __init__(self, link: Link, role: Role, owes: Owes | None, judge: Judge | None) -> None:
        self._link = link
        self._role = role
        self._owes = owes
        self._judge = judge
        self._asked: bytes | None = None
        self._given = False
        self._sent_ready = False
        self._got_ready = False

    async def run(self) -> Proofs:
        try:
            proofs = Proofs(self._link, self._role, self._owes, self._judge)
        except PeerWithoutEvidence:
            await self._link.refuse(Code.NO_PROOF, "a proof of this end is demanded")
            raise
        if proofs.verifier is None:
            await self._ready()
        else:
            await self._link.send(Frame(FrameType.PROVE, 0, proofs.verifier.prove()))
        while not self._open:
            await self._step(proofs, await self._link.next_frame())
        return proofs

    @property
    def _open(self) -> bool:
        owed = self._role is Role.SERVER and not self._given
        return self._sent_ready and self._got_ready and not owed

    async def _step(self, proofs: Proofs, frame: Frame) -> None:
        if frame.type is FrameType.PROVE and not self._got_ready and self._asked is None:
            self._asked = frame.payload
            # A client shows nothing of itself to a server that has not proven itself yet.
            if self._role is Role.SERVER or proofs.prover is None or self._sent_ready:
                await self._give(proofs)
        elif frame.type is FrameType.ACK and proofs.verifier is not None:
            proofs.verifier.on_ack(frame.payload)
        elif frame.type is FrameType.EVIDENCE and proofs.verifier is not None:
            await self._take(proofs, proofs.verifier.on_evidence(frame.payload))
        elif frame.type is FrameType.READY and self._may_be_ready:
            self._got_ready = True
        else:
            raise _unexpected(frame)

    @property
    def _may_be_ready(self) -> bool:
        return not self._got_ready and (self._given or self._role is Role.CLIENT)

    async def _take(self, proofs: Proofs, claim: Claim) -> None:
        try:
            await proofs.take(claim)
        except CaiError:
            # Why is the verifier's business; the prover learns that it was not accepted.
            await self._link.refuse(Code.EVIDENCE_REFUSED, "evidence refused")
            raise
        await self._ready()
        if self._asked is not None and not self._given:
            await self._give(proofs)

    async def _give(self, proofs: Proofs) -> None:
        assert self._asked is not None  # noqa: S101 - by the callers
        try:
            request = proofs.answer(self._link, self._asked, renewal=False)
        except PeerWithoutEvidence:
            await self._link.refuse(Code.NO_PROOF, "this end has no attestation agent")
            raise
        try:
            await _unless_gone(self._link, proofs.give(self._link, request))
        except CaiError as error:
            # The message may name paths of this host; the code is enough for a stranger.
            code = Code.BUSY if isinstance(error, Busy) else Code.NO_PROOF
            await self._link.refuse(code, f"attestation agent: {error.machine_code}")
            raise
        self._given = True

    async def _ready(self) -> None:
        self._sent_ready = True
        await self._link.send(Frame(FrameType.READY))


async def _unless_gone(link: Link, work: Awaitable[None]) -> None:
    """Do this while the peer is there: nobody's leaf takes a place in a tree."""
    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(link.gone())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            gone.result()
        await task
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


def _unexpected(frame: Frame) -> CaiError:
    if frame.type is not FrameType.REFUSE:
        return FormatError(f"{frame.type.name} frame before the session is proven")
    code, text = parse_reason(frame.payload)
    if code is Code.EVIDENCE_REFUSED:
        return EvidenceRefusedByPeer(f"the peer refuses the evidence: {text}")
    if code is Code.BUSY:
        return PeerWithoutEvidence(
            f"the peer has no room for a proof now: {text} (its own words)", hint="try again later"
        )
    return PeerWithoutEvidence(
        f"the peer gives no evidence: {text} (its own words)",
        hint="look at the attestation agent on the serving host",
    )
