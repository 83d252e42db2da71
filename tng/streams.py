"""The seam between modes and dialects: attested bytes in both directions, however they travel.

A mode (``http_proxy``, ``mapping``, ``socks5``, …) asks ``Peers`` for a stream to a destination and
relays; a dialect (``cai/1``, RATS-TLS, OHTTP) makes such streams. On the egress it is the other way
round: a dialect accepts streams, and a ``Backend`` carries each one to the guest's service.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol, runtime_checkable

from cai.attest.verdict import Verdict
from cai.errors import PeerError
from tng.peers.destination import Destination


class Code(IntEnum):
    """Why a session is refused or a stream reset (spec-channel §3)."""

    PROTOCOL = 1
    BUSY = 2
    NO_PROOF = 3
    EVIDENCE_REFUSED = 4
    UPSTREAM = 5
    CANCELLED = 6
    SHUTTING_DOWN = 7
    INTERNAL = 8


class StreamReset(PeerError):
    """The other end gave the stream up."""

    code = "stream-reset"

    def __init__(self, reset_code: Code, text: str) -> None:
        super().__init__(text or reset_code.name.lower().replace("_", " "))
        self.reset_code = reset_code


class ByteStream(Protocol):
    """Bytes in both directions, each of which ends on its own."""

    async def opened(self) -> None:
        """Wait until the far end's upstream is connected, as far as the dialect can tell.

        Raises:
            StreamReset, PeerError: it is not, or the session ended.
        """

    async def read(self) -> bytes:
        """The next bytes; empty at the end of this direction.

        Raises:
            StreamReset, PeerError: the stream ended in another way.
        """

    async def write(self, data: bytes) -> None:
        """Send bytes, waiting for as long as the far end takes none.

        Raises:
            StreamReset, PeerError: the stream or session ended.
        """

    async def accept(self) -> None:
        """Tell the other end that the upstream is connected (egress)."""

    async def finish(self) -> None:
        """End this direction; the other one goes on."""

    def reset(self, code: Code = Code.CANCELLED, text: str = "") -> None:
        """Give the stream up, unless it is over."""


@runtime_checkable
class DirectStream(Protocol):
    """A stream that can also carry bytes without a task in between, for the sake of latency."""

    def deliver_to(self, sink: Callable[[bytes], bool] | None) -> None:
        """Offer bytes to ``sink`` as they arrive; what it does not take waits for ``read``."""

    def write_now(self, data: bytes) -> bool:
        """Send bytes if nothing has to be waited for; else send none of them."""


@dataclass(frozen=True, slots=True)
class Proven:
    """A peer that passed.

    Attributes:
        verdict: every check.
        max_age_s: how long its session may open streams, from now, seconds.
        drain_s: how long running streams may go on after that, seconds.
    """

    verdict: Verdict
    max_age_s: float
    drain_s: float = 300.0


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is at the far end of a stream that an egress accepted.

    Attributes:
        name: for the log, e.g. ``egress[0] 192.0.2.7:40312``.
        session: random or derived id of the attested session, hex; stable while it lives.
        client_key: SHA-256 of the client's proven channel key, hex; empty when it proved nothing.
        statement: the guest's channel statement of that session; empty where it gave none.
    """

    name: str
    session: str
    client_key: str = ""
    statement: bytes = b""


class Peers(Protocol):
    """The attested peers of one ingress entry, in whatever dialect."""

    async def open(self, destination: Destination) -> tuple[ByteStream, Proven]:
        """A stream to a proven peer.

        Raises:
            DestinationRefused: the address may not be gone to.
            PeerUnreachable, PeerWithoutEvidence, EvidenceRefused, CaiError: no proven channel.
        """

    @property
    def unsafe(self) -> tuple[str, ...]:
        """The ``unsafe_…`` settings in force."""

    def status(self) -> dict[str, object]:
        """What the control interface shows."""

    def leave(self) -> None:
        """Take no new streams."""

    async def close(self) -> None:
        """End every session and attempt now."""


class Acceptor(Protocol):
    """The egress's end of a dialect: accepts connections, hands their streams to a backend."""

    async def serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, backend: Backend
    ) -> None:
        """Serve one connection to its end."""

    def status(self) -> dict[str, object]:
        """What the control interface shows."""

    def leave(self) -> None:
        """Take no new sessions and streams."""

    async def close(self) -> None:
        """End every session now."""


class Backend(Protocol):
    """Where the streams of an egress end."""

    async def carry(self, stream: ByteStream, caller: Caller) -> None:
        """Serve one stream to its end; never raises for what the caller or the backend did."""

    @property
    def unsafe(self) -> tuple[str, ...]:
        """The ``unsafe_…`` settings in force."""

    @property
    def ready(self) -> bool:
        """Whether its service is believed to live."""

    def status(self) -> dict[str, object]:
        """What the control interface shows."""

    def leave(self) -> None:
        """Take no further request."""

    async def close(self) -> None:
        """End what runs in the background."""
