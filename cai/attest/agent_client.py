"""The attestation agent as its callers see it: a Unix socket per purpose, spoken to by ttrpc.

The socket sets the purpose and the agent fills every member of the statement from its own state;
a caller hands over a 32-byte leaf and nothing else, so no caller can make a quote say something of
its own choosing (decisions §2.2).
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from cai.attest import ttrpc
from cai.attest.channel import ChannelEvidence
from cai.errors import FormatError, PeerUnreachable, Refused
from cai.merkle import HASH_SIZE

CHANNEL_SERVICE = "cai.agent.v1.ChannelService"
"""Served on the channel socket only."""

STOCK_SERVICE = "attestation_agent.AttestationAgentService"
"""The stock attestation agent's service."""

PROVE = "Prove"
"""Request: 1 leaf hash, 32 bytes; 2 who asks, at most ``MAX_SOURCE`` bytes; 3 whether a running
session is proven again; 4 SHA-256 of the channel key. Response: 1 encoded channel evidence; 2 for
how many seconds the guest may serve on it, absent without a lease."""

MAX_SOURCE = 64
"""Longest name of who asks for a proof, bytes."""

KEY_DIGEST_SIZE = 32
"""Bytes of the SHA-256 of a channel key's SubjectPublicKeyInfo."""

MAX_GOOD_FOR_S = 2**31
"""Longest time that an agent may give for a proof, seconds."""

PROOF_WAIT_S = 10.0
"""Longest wait for a proof, seconds (decisions §4, batching)."""


class Busy(Refused):
    """Too many sessions wait for a proof; a little later there may be room."""

    code = "proof-busy"


@dataclass(frozen=True, slots=True)
class ProofRequest:
    """What a gateway asks an agent for.

    Attributes:
        leaf: leaf hash of the session, 32 bytes (``cai.merkle.leaf_hash``).
        source: for whom, e.g. an address; so many of one source wait at once and no more.
        renewal: the session runs already, and its proof shall not wait behind new ones.
        key: SHA-256 of the channel key's SubjectPublicKeyInfo, which the admission ticket shall
            name; empty asks for no ticket about a key.
    """

    leaf: bytes
    source: str = ""
    renewal: bool = False
    key: bytes = b""

    def encode(self) -> bytes:
        """The request's protobuf bytes."""
        parts = [ttrpc.bytes_field(1, self.leaf)]
        if self.source:
            parts.append(ttrpc.bytes_field(2, self.source.encode()[:MAX_SOURCE]))
        if self.renewal:
            parts.append(ttrpc.varint_field(3, 1))
        if self.key:
            parts.append(ttrpc.bytes_field(4, self.key))
        return b"".join(parts)

    @classmethod
    def decode(cls, payload: bytes) -> ProofRequest:
        """Parse protobuf bytes.

        Raises:
            FormatError: the leaf is not 32 bytes, or another member has another form.
        """
        fields = dict(ttrpc.read_fields(payload))
        leaf, source = fields.get(1), fields.get(2, b"")
        renewal, key = fields.get(3, 0), fields.get(4, b"")
        if not isinstance(leaf, bytes) or len(leaf) != HASH_SIZE:
            raise FormatError(f"a leaf hash has {HASH_SIZE} bytes")
        if not isinstance(source, bytes) or len(source) > MAX_SOURCE:
            raise FormatError(f"a source has at most {MAX_SOURCE} bytes")
        if renewal not in (0, 1) or not isinstance(key, bytes):
            raise FormatError("a proof is asked for in another form")
        if len(key) not in (0, KEY_DIGEST_SIZE):
            raise FormatError(f"a key's digest has {KEY_DIGEST_SIZE} bytes")
        return cls(leaf, source.decode("utf-8", "replace"), bool(renewal), key)


@dataclass(frozen=True, slots=True)
class SessionProof:
    """What an agent gives for one session.

    Attributes:
        evidence: for the verifier.
        good_for_s: how long the guest may serve on it, by its lease, seconds.
    """

    evidence: ChannelEvidence
    good_for_s: float = math.inf


class ChannelAgent:
    """Asks the agent behind one channel socket for proofs.

    Args:
        socket: path of the Unix socket.
    """

    def __init__(self, socket: Path) -> None:
        self._socket = socket

    async def prove(self, request: ProofRequest) -> SessionProof:
        """Evidence whose session tree holds the leaf.

        Raises:
            PeerUnreachable: no agent answers, or not within ``PROOF_WAIT_S``.
            Busy: too many sessions wait for a proof.
            Refused: the agent will not prove now, with its reason.
            FormatError, LimitExceeded: the answer is malformed.
        """
        message = ttrpc.Request(
            CHANNEL_SERVICE, PROVE, request.encode(), timeout_nano=int(PROOF_WAIT_S * 1_000_000_000)
        )
        try:
            async with asyncio.timeout(PROOF_WAIT_S):
                response = await call(self._socket, message)
        except (OSError, EOFError, TimeoutError) as error:
            raise PeerUnreachable(
                f"attestation agent at {self._socket} does not answer",
                hint="start it with `cai host up`",
            ) from error
        if response.status == ttrpc.Status.RESOURCE_EXHAUSTED:
            raise Busy(f"attestation agent: {response.message}")
        if response.status != ttrpc.Status.OK:
            raise Refused(f"attestation agent: {response.message or 'refused'}")
        fields = dict(ttrpc.read_fields(response.payload))
        encoded, good_for = fields.get(1), fields.get(2)
        if not isinstance(encoded, bytes):
            raise FormatError("attestation agent: answer without evidence")
        evidence = ChannelEvidence.decode(encoded)
        if good_for is None:
            return SessionProof(evidence)
        if not isinstance(good_for, int) or good_for > MAX_GOOD_FOR_S:
            raise FormatError("attestation agent: a proof of another lifetime")
        return SessionProof(evidence, float(good_for))


class Dialect(StrEnum):
    """How an agent lets a gateway prove itself."""

    SESSION = "cai/1"
    STOCK = "rats-tls"


async def dialects_of(socket: Path) -> frozenset[Dialect]:
    """Which dialects the agent behind a socket serves; no quote is made for this.

    Raises:
        PeerUnreachable: no agent answers.
        FormatError, LimitExceeded: an answer is malformed.
    """
    served = set()
    for dialect, service, method in (
        (Dialect.SESSION, CHANNEL_SERVICE, PROVE),
        (Dialect.STOCK, STOCK_SERVICE, "GetTeeType"),
    ):
        try:
            async with asyncio.timeout(PROOF_WAIT_S):
                response = await call(socket, ttrpc.Request(service, method, b""))
        except (OSError, EOFError, TimeoutError) as error:
            raise PeerUnreachable(
                f"attestation agent at {socket} does not answer",
                hint="start it with `cai host up`",
            ) from error
        # An agent that knows the method finds the empty request wrong; another does not know it.
        if response.status in (ttrpc.Status.OK, ttrpc.Status.INVALID_ARGUMENT):
            served.add(dialect)
    return frozenset(served)


async def call(socket: Path, request: ttrpc.Request) -> ttrpc.Response:
    """One call on a socket of its own connection; the caller bounds the time.

    Raises:
        OSError, EOFError: nobody answers.
        FormatError, LimitExceeded: the answer is malformed.
    """
    reader, writer = await asyncio.open_unix_connection(str(socket))
    try:
        payload = request.encode()
        header = ttrpc.Header(len(payload), 1, ttrpc.MessageType.REQUEST)
        writer.write(header.encode() + payload)
        await writer.drain()
        answer = ttrpc.Header.decode(await reader.readexactly(ttrpc.HEADER_SIZE))
        if answer.type != ttrpc.MessageType.RESPONSE or answer.stream != 1:
            raise FormatError("attestation agent: not the response to this call")
        return ttrpc.Response.decode(await reader.readexactly(answer.length))
    finally:
        writer.close()
