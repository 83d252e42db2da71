"""Who judges a peer's evidence: this process, or (later) an attestation service.

A judge turns the claim of a handshake into a verdict and raises when it does not pass. It runs the
pure verification in a worker thread, because a quote takes milliseconds of CPU.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import httpx

from cai import jcs
from cai.attest.channel import MAX_GPU_AGE_S, ChannelEvidence, verify_channel
from cai.attest.statement import ChannelStatement
from cai.attest.ticket import Ticket
from cai.attest.verdict import Verdict
from cai.errors import PeerError, PeerUnreachable
from tng.channel.handshake import Claim
from tng.channel.renewal import MAX_DRAIN_S, MAX_SESSION_AGE_S
from tng.config.trust import BuiltinVerify, ServiceVerify
from tng.peers.references import References
from tng.streams import Proven

MIN_SESSION_AGE_S = 5.0
"""A session may open streams for at least this long after its proof, seconds, so that the request
that asked for it is served even when the GPU evidence was just young enough."""

SERVICE_TIMEOUT_S = 5.0
"""Longest wait for an attestation service to answer, seconds."""


class BuiltinJudge:
    """Verification in this process against pinned roots and the owner's policy.

    Args:
        settings: the ``verify`` of an entry.
        references: what its files hold.
    """

    kind = "builtin"

    def __init__(self, settings: BuiltinVerify, references: References) -> None:
        self._expect = settings.expect
        self._kbs_key = settings.kbs_key
        self._references = references

    @property
    def key(self) -> str:
        """What a verdict depends on besides the peer: policy, expectation, broker's key."""
        expect = self._expect
        members = (expect.launch, expect.service, expect.owner, expect.model_root)
        policy = self._references.policy.digest
        return jcs.canonical([policy, *members, expect.content_root, self._kbs_key]).decode()

    @property
    def simulated(self) -> bool:
        """Whether it trusts a simulated root."""
        return self._references.anchors.simulated

    @property
    def unsafe(self) -> tuple[str, ...]:
        """The ``unsafe_…`` settings in force."""
        return (*self._references.unsafe, *self._references.policy.unsafe)

    async def judge(self, claim: Claim, subject: str) -> Proven:
        """Verify a claim.

        Raises:
            EvidenceRefused: naming every failed check, with the verdict.
        """
        verdict = await asyncio.to_thread(self._verify, claim.leaf, claim.evidence, subject)
        verdict.require()
        return proven(verdict, claim.evidence, asks_ticket=bool(self._kbs_key))

    def _verify(self, leaf: bytes, evidence: ChannelEvidence, subject: str) -> Verdict:
        verdict, _facts = verify_channel(
            evidence,
            leaf,
            subject=subject,
            policy=self._references.policy,
            expect=self._expect,
            anchors=self._references.anchors,
            collateral=self._references.collateral,
            now=datetime.now(UTC),
            rims=self._references.rims,
            ocsp=self._references.ocsp,
            ticket_keys=ticket_keys(self._kbs_key),
        )
        if self.simulated and "unsafe_simulated_root" not in verdict.unsafe:
            return verdict.extended((), unsafe=("unsafe_simulated_root", *verdict.unsafe))
        return verdict


async def also_service(error: PeerError, settings: ServiceVerify) -> PeerError:
    """A peer's error, and what is wrong with the attestation service beside it."""
    other = await probe_service(settings)
    if other is None:
        return error
    hints = [item.hint for item in (error, other) if item.hint]
    return type(error)(f"{error.message}; {other.message}", hint="; ".join(hints) or None)


async def probe_service(settings: ServiceVerify) -> PeerError | None:
    """Whether an attestation service answers ``GET {as_addr}certificate``; ``None`` if so."""
    url = settings.as_addr + "certificate"
    name = f"attestation service {settings.as_addr}"
    hint = "start the attestation service, or check verify.as_addr"
    try:
        # trust_env off: an http_proxy variable could point at this very proxy.
        async with (
            asyncio.timeout(SERVICE_TIMEOUT_S),
            httpx.AsyncClient(trust_env=False, timeout=SERVICE_TIMEOUT_S) as client,
            client.stream("GET", url, headers=list(settings.as_headers)) as response,
        ):
            status = response.status_code
    except (httpx.HTTPError, httpx.InvalidURL, OSError, TimeoutError, UnicodeError) as error:
        reason = str(error) or "no answer in time"
        return PeerUnreachable(f"{name} cannot be reached: {reason}", hint=hint)
    if status != 200:
        return PeerError(f"{name} answers HTTP {status} to GET {url}", hint=hint)
    return None


def ticket_keys(kbs_key: str) -> tuple[bytes, ...]:
    """The broker's key that ``verify.kbs_key`` names; none asks for no ticket."""
    return (bytes.fromhex(kbs_key),) if kbs_key else ()


def proven(verdict: Verdict, evidence: ChannelEvidence, *, asks_ticket: bool) -> Proven:
    """What evidence that passed gives: until when, and with which drain (spec-channel §4.3)."""
    age = max_age(evidence)
    if not asks_ticket:
        return Proven(verdict, age)
    # Verified before; so it parses.
    claims = Ticket.parse(evidence.ticket).claims
    left = (claims.expires - datetime.now(UTC)).total_seconds()
    return Proven(verdict, max(0.0, min(age, left)), min(MAX_DRAIN_S, float(claims.drain_s)))


def max_age(evidence: ChannelEvidence) -> float:
    """The session may open streams until the GPU evidence is too old (spec-channel §4.3)."""
    age = MAX_SESSION_AGE_S
    if evidence.evidence.devices:
        # Verified before; so it decodes.
        statement = ChannelStatement.decode(evidence.statement)
        age = min(age, max(MIN_SESSION_AGE_S, MAX_GPU_AGE_S - statement.gpu.age_s))
    return age
