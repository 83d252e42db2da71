"""The stock attestation agent, as TNG calls it: ttrpc on a Unix socket (reference "TNG" §2.2)."""

from __future__ import annotations

import asyncio
from hashlib import sha384
from pathlib import Path

from cai.attest import ttrpc
from cai.attest.agent_client import STOCK_SERVICE, call
from cai.errors import FormatError, PeerUnreachable, Refused
from tng.stock.certificate import CocoEvidence

CALL_TIMEOUT_S = 50.0
"""Longest wait for one call, seconds (TNG's own)."""

MAX_TEE = 32
"""Longest name of a TEE, characters."""


class StockAgent:
    """Collects evidence from one agent.

    Args:
        socket: path of the Unix socket.
    """

    def __init__(self, socket: Path) -> None:
        self._socket = socket

    async def devices(self) -> bytes:
        """Its evidence of devices (JSON); empty when it has none.

        Raises:
            PeerUnreachable, Refused, FormatError, LimitExceeded: as ``collect``.
        """
        return await self._call("GetAdditionalEvidence", b"")

    async def collect(self, runtime_data: str) -> CocoEvidence:
        """Evidence that is bound to these claims.

        Args:
            runtime_data: canonical JSON; its SHA-384 goes into the report data.

        Raises:
            PeerUnreachable: no agent answers.
            Refused: it will not, with its reason.
            FormatError, LimitExceeded: its answer is malformed.
        """
        digest = sha384(runtime_data.encode("utf-8")).digest()
        evidence = await self._call("GetEvidence", ttrpc.bytes_field(1, digest))
        tee = (await self._call("GetTeeType", b"")).decode("ascii", "replace")
        if not tee or len(tee) > MAX_TEE:
            raise FormatError("attestation agent: no name of a TEE")
        return CocoEvidence(tee, evidence, await self.devices() or None, runtime_data)

    async def _call(self, method: str, payload: bytes) -> bytes:
        request = ttrpc.Request(
            STOCK_SERVICE, method, payload, timeout_nano=int(CALL_TIMEOUT_S * 1_000_000_000)
        )
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                response = await call(self._socket, request)
        except (OSError, EOFError, TimeoutError) as error:
            raise PeerUnreachable(
                f"attestation agent at {self._socket} does not answer",
                hint="start it, or check attest.aa_addr",
            ) from error
        if response.status != ttrpc.Status.OK:
            raise Refused(f"attestation agent: {method}: {response.message or 'refused'}")
        value = dict(ttrpc.read_fields(response.payload)).get(1, b"")
        if not isinstance(value, bytes):
            raise FormatError(f"attestation agent: {method}: answer of another form")
        return value
