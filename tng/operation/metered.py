"""Peers and backends that count: streams, bytes, handshakes, refusals.

Counting sits at the seam (``tng.streams``), so that modes and dialects need not know of it.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

from cai.errors import CaiError
from tng.operation.journal import Journal
from tng.operation.metrics import Meters
from tng.peers.destination import Destination
from tng.streams import Backend, ByteStream, Caller, Code, DirectStream, Peers, Proven

MAX_REMEMBERED = 256
"""Most peers of an entry whose last proof is remembered, to tell a new one from a pooled one."""

INWARD, OUTWARD = "in", "out"


class CountedStream:
    """A stream whose bytes are counted.

    Args:
        stream: that carries them.
        meters: where they are counted.
        name: of the entry.
    """

    def __init__(self, stream: ByteStream, meters: Meters, name: str) -> None:
        self._stream = stream
        # Asked once: it costs as much as sending a frame.
        self._direct = stream if isinstance(stream, DirectStream) else None
        self._meters = meters
        self._name = name
        self._over = False
        meters.streams.add(1, name)
        meters.streams_active.add(1, name)

    async def opened(self) -> None:
        """Wait until the far end's upstream is connected."""
        await self._stream.opened()

    async def read(self) -> bytes:
        """The next bytes; empty at the end of this direction."""
        data = await self._stream.read()
        if data:
            self._meters.bytes.add(len(data), self._name, INWARD)
        return data

    async def write(self, data: bytes) -> None:
        """Send bytes."""
        await self._stream.write(data)
        self._meters.bytes.add(len(data), self._name, OUTWARD)

    def deliver_to(self, sink: Callable[[bytes], bool] | None) -> None:
        """Offer bytes to ``sink`` as they arrive, where the dialect can."""
        if self._direct is None:
            return
        if sink is None:
            self._direct.deliver_to(None)
            return

        def counted(data: bytes) -> bool:
            taken = sink(data)
            if taken:
                self._meters.bytes.add(len(data), self._name, INWARD)
            return taken

        self._direct.deliver_to(counted)

    def write_now(self, data: bytes) -> bool:
        """Send bytes if nothing has to be waited for; else send none of them."""
        if self._direct is None or not self._direct.write_now(data):
            return False
        self._meters.bytes.add(len(data), self._name, OUTWARD)
        return True

    async def accept(self) -> None:
        """Tell the other end that the upstream is connected."""
        await self._stream.accept()

    async def finish(self) -> None:
        """End this direction."""
        await self._stream.finish()

    def reset(self, code: Code = Code.CANCELLED, text: str = "") -> None:
        """Give the stream up, unless it is over; every mode ends with it."""
        self.over()
        self._stream.reset(code, text)

    def over(self) -> None:
        """Count it as no longer open."""
        if not self._over:
            self._over = True
            self._meters.streams_active.add(-1, self._name)


class MeteredPeers:
    """The peers of an ingress, counted.

    Args:
        peers: that are asked.
        name: of the entry.
        journal: whose meters count.
    """

    def __init__(self, peers: Peers, name: str, journal: Journal) -> None:
        self._peers = peers
        self._name = name
        self._journal = journal
        self._known: OrderedDict[Destination, tuple[Proven, float]] = OrderedDict()
        journal.meters.evidence_age.source(self._ages)

    async def open(self, destination: Destination) -> tuple[ByteStream, Proven]:
        """A stream to a proven peer.

        Raises:
            CaiError: as the peers do; counted by its code.
        """
        meters, started = self._journal.meters, time.monotonic()
        try:
            stream, proven = await self._peers.open(destination)
        except CaiError as error:
            meters.failed.add(1, self._name)
            self._journal.refused(self._name, error)
            raise
        known = self._known.get(destination)
        if known is None or known[0] is not proven:
            now = time.monotonic()
            meters.handshake.observe(now - started, self._name)
            self._known[destination] = proven, now
            if len(self._known) > MAX_REMEMBERED:
                self._known.popitem(last=False)
        return CountedStream(stream, meters, self._name), proven

    @property
    def unsafe(self) -> tuple[str, ...]:
        """The ``unsafe_…`` settings in force."""
        return self._peers.unsafe

    def status(self) -> dict[str, object]:
        """What the control interface shows."""
        return self._peers.status()

    def leave(self) -> None:
        """Take no new streams."""
        self._peers.leave()

    async def close(self) -> None:
        """End every session and attempt now."""
        await self._peers.close()

    def _ages(self) -> list[tuple[tuple[str, ...], float]]:
        # A proof that may open no stream any more is out of use, and its age says nothing.
        now = time.monotonic()
        ages = [now - at for proven, at in self._known.values() if now - at < proven.max_age_s]
        return [((self._name,), max(ages))] if ages else []


class MeteredBackend:
    """The backend of an egress, counted.

    Args:
        backend: that serves.
        name: of the entry.
        journal: whose meters count.
    """

    def __init__(self, backend: Backend, name: str, journal: Journal) -> None:
        self._backend = backend
        self._name = name
        self._journal = journal

    async def carry(self, stream: ByteStream, caller: Caller) -> None:
        """Serve one stream to its end."""
        counted = CountedStream(stream, self._journal.meters, self._name)
        try:
            await self._backend.carry(counted, caller)
        finally:
            counted.over()

    @property
    def unsafe(self) -> tuple[str, ...]:
        """The ``unsafe_…`` settings in force."""
        return self._backend.unsafe

    @property
    def ready(self) -> bool:
        """Whether its service is believed to live."""
        return self._backend.ready

    def status(self) -> dict[str, object]:
        """What the control interface shows."""
        return self._backend.status()

    def leave(self) -> None:
        """Take no further request."""
        self._backend.leave()

    async def close(self) -> None:
        """End what runs in the background."""
        await self._backend.close()
