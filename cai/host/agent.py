"""The attestation agent: holds what this guest may say.

A caller hands over a leaf hash; every other member of the statement comes from the agent's own
state (decisions §2.2, §2.4). How it is asked is ``cai.host.agent_socket``.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from cai import jcs
from cai.attest.agent_client import Busy, ProofRequest, SessionProof
from cai.attest.channel import MAX_GPU_AGE_S
from cai.attest.evidence import DeviceEvidence, DeviceSource, Evidence, QuoteSource
from cai.attest.rcar import additional_evidence, encode_tdx_evidence
from cai.attest.statement import (
    ChannelStatement,
    GpuFacts,
    Purpose,
    ServedModel,
    gpu_evidence_digest,
    report_data,
    stock_report_data,
)
from cai.attest.ticket import Ticket, ticket_digest
from cai.attest.ticket_form import MAX_CHANNEL_KEYS
from cai.errors import Refused
from cai.host.launch import Launch
from cai.host.quoting import QuoteQueue, SessionBatcher, SignedTree, Urgency

MAX_WAITING_STOCK = 16
"""Most stock requests for evidence that may wait for a quote; each costs one of its own."""

ADMISSION_WAIT_S = 8.0
"""How long a first proof waits for a ticket that names its channel key, seconds."""

STOCK_DIALECT = "rats-tls"
"""Among the dialects of a launch: stock peers may ask for evidence as well (decisions §4)."""


@dataclass(frozen=True, slots=True)
class CollectedDevices:
    """GPU evidence as it was collected for the last release or renewal."""

    nonce: bytes
    devices: tuple[DeviceEvidence, ...]
    collected_at: float


@dataclass
class Agent:
    """The state behind every statement.

    Attributes:
        launch: what was measured.
        source: the TDX guest.
        gpus: its devices.
        profile: guest profile (decisions §1.1).
        models: what is served; set once it is mounted.
        channel_keys: SHA-256 of each channel key's SubjectPublicKeyInfo, hex, for the ticket.
        ticket: the admission ticket in force, canonical bytes; empty without one.
        expires_at: when the lease ends, seconds since boot; no statement is issued after it.
        stopped: why no statement is issued any more, or ``None``.
        renew: asks whoever keeps the lease for a new one soon, because a channel key is new.
    """

    launch: Launch
    source: QuoteSource
    gpus: DeviceSource
    profile: str = "operated"
    models: tuple[ServedModel, ...] = ()
    channel_keys: tuple[str, ...] = ()
    ticket: bytes = b""
    expires_at: float = math.inf
    stopped: str | None = None
    boot_id: str = field(default_factory=lambda: secrets.token_hex(16))
    epoch: int = 0
    renew: Callable[[], None] | None = None
    _collected: CollectedDevices | None = None

    def __post_init__(self) -> None:
        self.quotes = QuoteQueue(self.source)
        self.batcher = SessionBatcher(self.sign_sessions)
        self._ticket_came = asyncio.Event()
        self._asked: dict[str, float] = {}
        self._stock_waiting = 0

    def guest_facts(self) -> Mapping[str, str]:
        """What this guest says of itself (spec-statement §5.1)."""
        return {"profile": self.profile, "launched_by": "agent", **self.gpus.facts()}

    async def collect_devices(self, nonce: bytes) -> tuple[DeviceEvidence, ...]:
        """Collect GPU evidence under the KBS nonce; ``keep_devices`` makes the channel use it."""
        return await asyncio.to_thread(self.gpus.collect, nonce)

    def keep_devices(self, nonce: bytes, devices: tuple[DeviceEvidence, ...], at: float) -> None:
        """Let channel statements rest on this evidence from now on."""
        self._collected = CollectedDevices(nonce, devices, at)

    def _demand_ready(self) -> CollectedDevices:
        """What statements rest on, unless this guest may not prove now."""
        if self.stopped is not None:
            raise Refused(f"this guest proves nothing any more: {self.stopped}")
        if now() >= self.expires_at:
            # Also when the guest slept and whoever keeps the lease has not woken yet.
            raise Refused("this guest proves nothing any more: its lease has ended")
        if self._collected is None or not self.models:
            raise Refused("no model is served yet", hint="wait for `cai host up` to be ready")
        kept = self._collected
        age = int(now() - kept.collected_at)
        if age > MAX_GPU_AGE_S:
            raise Refused(f"the GPU evidence is {age} s old, at most {MAX_GPU_AGE_S} s are allowed")
        return kept

    def stop(self, reason: str) -> None:
        """Issue no further statement."""
        self.stopped = reason

    @property
    def stock(self) -> bool:
        """Whether stock peers may ask for evidence, as was measured at launch."""
        return STOCK_DIALECT in self.launch.dialects

    async def prove(self, request: ProofRequest) -> SessionProof:
        """Evidence for one session.

        Raises:
            Busy: too many sessions wait.
            Refused: this guest may not prove now.
        """
        await self._admit(request.key.hex())
        evidence = await self.batcher.prove(
            request.leaf, source=request.source, renewal=request.renewal
        )
        return SessionProof(evidence, max(0.0, self.expires_at - now()))

    def keep_ticket(self, ticket: bytes) -> None:
        """Staple this admission ticket from now on."""
        self.ticket = ticket
        self._ticket_came.set()
        self._ticket_came = asyncio.Event()

    async def _admit(self, key: str) -> None:
        """Have the broker name a channel key in its ticket; without a ticket there is no need.

        A client that asks for a ticket refuses one that does not name the key. So that no broker
        keeps everybody else waiting, a key is waited for once.
        """
        if not key or self._names(key):
            return
        if key not in self.channel_keys:
            # The oldest goes: a gateway that was started again has a new one.
            self.channel_keys = (*self.channel_keys, key)[-MAX_CHANNEL_KEYS:]
            kept = {name: at for name, at in self._asked.items() if name in self.channel_keys}
            self._asked = {**kept, key: now() + ADMISSION_WAIT_S}
            if self.renew is not None:
                self.renew()
        while not self._names(key) and (left := self._asked.get(key, 0.0) - now()) > 0:
            if self.renew is None:
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ticket_came.wait(), left)

    def _names(self, key: str) -> bool:
        """Whether the ticket in force names this key; without a ticket nothing has to."""
        return not self.ticket or key in Ticket.parse(self.ticket).claims.channel_keys

    async def stock_evidence(self, runtime_digest: bytes) -> bytes:
        """Evidence as a stock agent gives it: over the digest, then zeros (decisions §2.2).

        Raises:
            FormatError: more than 48 bytes.
            Busy: too many wait already.
            Refused: this guest may not prove now.
        """
        data = stock_report_data(runtime_digest)
        self._demand_ready()
        if self._stock_waiting >= MAX_WAITING_STOCK:
            raise Busy(f"{MAX_WAITING_STOCK} requests for evidence already wait for a quote")
        self._stock_waiting += 1
        try:
            quote = await self.quotes.quote(data, Urgency.CHANNEL)
        finally:
            self._stock_waiting -= 1
        return jcs.canonical(encode_tdx_evidence(quote, self.source.event_log()))

    def stock_devices(self) -> bytes:
        """Evidence of the devices as a stock agent gives it; empty without any.

        Raises:
            Refused: this guest may not prove now.
        """
        kept = self._demand_ready()
        return additional_evidence(kept.devices, None).encode()

    async def sign_sessions(self, root: bytes, size: int) -> SignedTree:
        """Statement and quote over a session tree.

        Raises:
            Refused: this guest may not prove now: stopped, nothing released, or evidence too old.
        """
        kept = self._demand_ready()
        age = int(now() - kept.collected_at)
        self.epoch += 1
        ticket = self.ticket
        devices = [(device.report, device.chain) for device in kept.devices]
        statement = ChannelStatement(
            launch_digest=self.launch.digest,
            service_id=self.launch.service_id,
            owner_key=self.launch.owner_key,
            models=self.models,
            gpu=GpuFacts(gpu_evidence_digest(devices).hex(), kept.nonce.hex(), age),
            guest_facts=self.guest_facts(),
            ticket_digest=ticket_digest(ticket) if ticket else "",
            dialects=self.launch.dialects,
            boot_id=self.boot_id,
            epoch=self.epoch,
            session_root=root.hex(),
            session_size=size,
        ).encode()
        quote = await self.quotes.quote(report_data(statement, Purpose.CHANNEL), Urgency.CHANNEL)
        evidence = Evidence(quote, kept.devices, self.source.event_log())
        return SignedTree(statement, evidence, ticket)


def now() -> float:
    """Seconds since boot, counting suspension, so that no pause makes evidence look younger."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
