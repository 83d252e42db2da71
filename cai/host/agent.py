"""The attestation agent: holds what this guest may say, and says it only over its sockets.

One Unix socket per purpose. On the channel socket a caller hands over a leaf hash; every other
member of the statement comes from the agent's own state (decisions §2.2, §2.4).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cai.attest import ttrpc
from cai.attest.agent_client import CHANNEL_SERVICE, PROVE, parse_prove
from cai.attest.channel import MAX_GPU_AGE_S
from cai.attest.evidence import DeviceEvidence, DeviceSource, Evidence, QuoteSource
from cai.attest.statement import (
    ChannelStatement,
    GpuFacts,
    Purpose,
    ServedModel,
    gpu_evidence_digest,
    report_data,
)
from cai.attest.ticket import ticket_digest
from cai.errors import CaiError, FormatError, LimitExceeded, ListenerFailed, Refused
from cai.host.launch import Launch
from cai.host.quoting import QuoteQueue, SessionBatcher, SignedTree, Urgency

MAX_CALLS = 512
"""Most calls that are served at once on one socket."""

MAX_CALL_S = 30.0
"""Longest time a caller may take to send its request, seconds."""

log = logging.getLogger("cai.agent")


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
    _collected: CollectedDevices | None = None

    def __post_init__(self) -> None:
        self.quotes = QuoteQueue(self.source)
        self.batcher = SessionBatcher(self.sign_sessions)

    def guest_facts(self) -> Mapping[str, str]:
        """What this guest says of itself (spec-statement §5.1)."""
        return {"profile": self.profile, "launched_by": "agent", **self.gpus.facts()}

    async def collect_devices(self, nonce: bytes) -> tuple[DeviceEvidence, ...]:
        """Collect GPU evidence under the KBS nonce; ``keep_devices`` makes the channel use it."""
        return await asyncio.to_thread(self.gpus.collect, nonce)

    def keep_devices(self, nonce: bytes, devices: tuple[DeviceEvidence, ...], at: float) -> None:
        """Let channel statements rest on this evidence from now on."""
        self._collected = CollectedDevices(nonce, devices, at)

    def stop(self, reason: str) -> None:
        """Issue no further statement."""
        self.stopped = reason

    async def sign_sessions(self, root: bytes, size: int) -> SignedTree:
        """Statement and quote over a session tree.

        Raises:
            Refused: this guest may not prove now: stopped, nothing released, or evidence too old.
        """
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
        self.epoch += 1
        devices = [(device.report, device.chain) for device in kept.devices]
        statement = ChannelStatement(
            launch_digest=self.launch.digest,
            service_id=self.launch.service_id,
            owner_key=self.launch.owner_key,
            models=self.models,
            gpu=GpuFacts(gpu_evidence_digest(devices).hex(), kept.nonce.hex(), age),
            guest_facts=self.guest_facts(),
            ticket_digest=ticket_digest(self.ticket) if self.ticket else "",
            dialects=self.launch.dialects,
            boot_id=self.boot_id,
            epoch=self.epoch,
            session_root=root.hex(),
            session_size=size,
        ).encode()
        quote = await self.quotes.quote(report_data(statement, Purpose.CHANNEL), Urgency.CHANNEL)
        return SignedTree(statement, Evidence(quote, kept.devices, self.source.event_log()))


def now() -> float:
    """Seconds since boot, counting suspension, so that no pause makes evidence look younger."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


async def serve_channel_socket(agent: Agent, path: Path) -> asyncio.Server:
    """Serve the channel purpose on a Unix socket, mode 0600.

    Raises:
        ListenerFailed: the socket cannot be made.
    """
    calls = asyncio.Semaphore(MAX_CALLS)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with calls:
            try:
                async with asyncio.timeout(MAX_CALL_S):
                    await _serve_call(agent, reader, writer)
            except (OSError, EOFError, TimeoutError, FormatError, LimitExceeded) as error:
                log.warning("channel socket: dropped a caller: %s", error)
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()

    try:
        await asyncio.to_thread(path.unlink, missing_ok=True)
        server = await asyncio.start_unix_server(connected, path=str(path))
        await asyncio.to_thread(path.chmod, 0o600)
    except OSError as error:
        raise ListenerFailed(
            f"cannot listen on {path}: {error.strerror or error}",
            hint="choose another --run-dir; a socket path has at most 107 bytes",
        ) from error
    return server


async def _serve_call(
    agent: Agent, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    header = ttrpc.Header.decode(await reader.readexactly(ttrpc.HEADER_SIZE))
    request = ttrpc.Request.decode(await reader.readexactly(header.length))
    response = await _answer(agent, request)
    payload = response.encode()
    answer = ttrpc.Header(len(payload), header.stream, ttrpc.MessageType.RESPONSE)
    writer.write(answer.encode() + payload)
    await writer.drain()


async def _answer(agent: Agent, request: ttrpc.Request) -> ttrpc.Response:
    if (request.service, request.method) != (CHANNEL_SERVICE, PROVE):
        return ttrpc.Response(
            ttrpc.Status.UNIMPLEMENTED, "this socket proves channel sessions and nothing else", b""
        )
    try:
        evidence = await agent.batcher.prove(parse_prove(request.payload))
    except FormatError as error:
        return ttrpc.Response(ttrpc.Status.INVALID_ARGUMENT, error.message, b"")
    except Refused as error:
        return ttrpc.Response(ttrpc.Status.FAILED_PRECONDITION, error.message, b"")
    except CaiError as error:
        return ttrpc.Response(ttrpc.Status.INTERNAL, error.message, b"")
    return ttrpc.Response(ttrpc.Status.OK, "", ttrpc.bytes_field(1, evidence.encode()))
