"""The attestation agent as its callers see it: a Unix socket per purpose, spoken to by ttrpc.

The socket sets the purpose and the agent fills every member of the statement from its own state;
a caller hands over a 32-byte leaf and nothing else, so no caller can make a quote say something of
its own choosing (decisions §2.2).
"""

from __future__ import annotations

import asyncio
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
"""Request field 1: leaf hash, 32 bytes. Response field 1: encoded channel evidence."""

PROOF_WAIT_S = 10.0
"""Longest wait for a proof, seconds (decisions §4, batching)."""


class ChannelAgent:
    """Asks the agent behind one channel socket for proofs.

    Args:
        socket: path of the Unix socket.
    """

    def __init__(self, socket: Path) -> None:
        self._socket = socket

    async def prove(self, leaf: bytes) -> ChannelEvidence:
        """Evidence whose session tree holds ``leaf``.

        Args:
            leaf: leaf hash of the session, 32 bytes (``cai.merkle.leaf_hash``).

        Raises:
            PeerUnreachable: no agent answers, or not within ``PROOF_WAIT_S``.
            Refused: the agent will not prove now, with its reason.
            FormatError, LimitExceeded: the answer is malformed.
        """
        request = ttrpc.Request(
            CHANNEL_SERVICE,
            PROVE,
            ttrpc.bytes_field(1, leaf),
            timeout_nano=int(PROOF_WAIT_S * 1_000_000_000),
        )
        try:
            async with asyncio.timeout(PROOF_WAIT_S):
                response = await call(self._socket, request)
        except (OSError, EOFError, TimeoutError) as error:
            raise PeerUnreachable(
                f"attestation agent at {self._socket} does not answer",
                hint="start it with `cai host up`",
            ) from error
        if response.status != ttrpc.Status.OK:
            raise Refused(f"attestation agent: {response.message or 'refused'}")
        encoded = dict(ttrpc.read_fields(response.payload)).get(1)
        if not isinstance(encoded, bytes):
            raise FormatError("attestation agent: answer without evidence")
        return ChannelEvidence.decode(encoded)


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


def parse_prove(payload: bytes) -> bytes:
    """The leaf hash out of a ``Prove`` request.

    Raises:
        FormatError: not exactly 32 bytes.
    """
    leaf = dict(ttrpc.read_fields(payload)).get(1)
    if not isinstance(leaf, bytes) or len(leaf) != HASH_SIZE:
        raise FormatError(f"a leaf hash has {HASH_SIZE} bytes")
    return leaf


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
