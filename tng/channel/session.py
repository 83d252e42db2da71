"""The proofs at the start of a session, run over a link (spec-channel §4).

Both functions return only when everything that was demanded has verified; before that no stream
frame is accepted from the peer and none is sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from cai.attest.channel import ChannelEvidence, Role
from cai.errors import CaiError, FormatError, PeerError, PeerWithoutEvidence, Refused
from tng.channel.frames import Frame, FrameType, parse_reason
from tng.channel.handshake import Claim, SessionProver, SessionVerifier
from tng.channel.link import Link
from tng.streams import Code

PROOF_TIMEOUT_S = 20.0
"""Longest time from PROVE to READY, seconds; the agent may take 10 of them."""

Proven = TypeVar("Proven")


class EvidenceRefusedByPeer(Refused):
    """The verifier at the other end does not accept this end's evidence."""

    code = "evidence-refused-by-peer"


async def demand_proof(link: Link, verify: Callable[[Claim], Awaitable[Proven]]) -> Proven:
    """The client's end: demand the server's proof, verify it, open the session.

    Args:
        link: TLS session as a client.
        verify: judges the claim; raises a ``CaiError`` to refuse it.

    Returns:
        What ``verify`` returned.

    Raises:
        PeerWithoutEvidence: the peer gives no proof, or not in time, with its reason.
        FormatError, LimitExceeded, SettingError: the peer breaks the protocol.
        CaiError: whatever ``verify`` raised; the peer has been told.
    """
    try:
        async with asyncio.timeout(PROOF_TIMEOUT_S):
            return await _demand(link, verify)
    except TimeoutError as error:
        link.abort()
        raise PeerWithoutEvidence(f"peer gave no proof within {PROOF_TIMEOUT_S:g} s") from error
    except FormatError as error:
        await link.refuse(Code.PROTOCOL, error.message)
        raise
    except BaseException:
        link.close()
        raise


async def give_proof(
    link: Link, own_spki: bytes, agent: Callable[[bytes], Awaitable[ChannelEvidence]]
) -> None:
    """The server's end: prove this session, wait until the client is satisfied.

    Args:
        link: TLS session as a server.
        own_spki: DER SubjectPublicKeyInfo of the certificate this end presents.
        agent: turns a leaf hash into evidence.

    Raises:
        PeerError: the client left.
        EvidenceRefusedByPeer: the client does not accept the evidence.
        FormatError: the client breaks the protocol; it has been told.
        CaiError: the agent's error; the client has been told.
    """
    try:
        async with asyncio.timeout(PROOF_TIMEOUT_S):
            await _give(link, own_spki, agent)
    except TimeoutError as error:
        link.abort()
        raise PeerError(f"no proof was agreed within {PROOF_TIMEOUT_S:g} s") from error
    except FormatError as error:
        await link.refuse(Code.PROTOCOL, error.message)
        raise
    except BaseException:
        link.close()
        raise


async def _demand(link: Link, verify: Callable[[Claim], Awaitable[Proven]]) -> Proven:
    verifier = SessionVerifier(Role.SERVER, link.tls.export, link.tls.peer_spki())
    await link.send(Frame(FrameType.PROVE, 0, verifier.prove()))
    peer_is_ready = False
    claim: Claim | None = None
    while claim is None:
        frame = await link.next_frame()
        if frame.type is FrameType.ACK:
            verifier.on_ack(frame.payload)
        elif frame.type is FrameType.EVIDENCE:
            claim = verifier.on_evidence(frame.payload)
        elif frame.type is FrameType.READY and not peer_is_ready:
            peer_is_ready = True
        else:
            raise _unexpected(frame)
    try:
        proven = await verify(claim)
    except CaiError:
        # Why is the client's business; the server learns that it was not accepted.
        await link.refuse(Code.EVIDENCE_REFUSED, "evidence refused")
        raise
    await link.send(Frame(FrameType.READY))
    while not peer_is_ready:
        frame = await link.next_frame()
        if frame.type is not FrameType.READY:
            raise _unexpected(frame)
        peer_is_ready = True
    return proven


async def _give(
    link: Link, own_spki: bytes, agent: Callable[[bytes], Awaitable[ChannelEvidence]]
) -> None:
    # This end demands nothing of the client in version 1, so it is ready from the start.
    await link.send(Frame(FrameType.READY))
    prover = SessionProver(Role.SERVER, link.tls.export, own_spki)
    frame = await link.next_frame()
    if frame.type is not FrameType.PROVE:
        raise _unexpected(frame)
    answer = prover.on_prove(frame.payload)
    await link.send(Frame(FrameType.ACK, 0, answer.ack))
    try:
        payload = prover.evidence(await agent(answer.leaf))
    except CaiError as error:
        # The message may name paths of this host; the code is enough for a stranger.
        await link.refuse(Code.NO_PROOF, f"attestation agent: {error.machine_code}")
        raise
    await link.send(Frame(FrameType.EVIDENCE, 0, payload))
    frame = await link.next_frame()
    if frame.type is not FrameType.READY:
        raise _unexpected(frame)


def _unexpected(frame: Frame) -> CaiError:
    if frame.type is not FrameType.REFUSE:
        return FormatError(f"{frame.type.name} frame before the session is proven")
    code, text = parse_reason(frame.payload)
    if code is Code.EVIDENCE_REFUSED:
        return EvidenceRefusedByPeer(f"the peer refuses the evidence: {text}")
    return PeerWithoutEvidence(
        f"the peer gives no evidence: {text} (its own words)",
        hint="look at the attestation agent on the serving host",
    )
