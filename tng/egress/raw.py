"""The plain backend: each stream is one connection to an upstream, bytes as they are."""

from __future__ import annotations

import contextlib

from cai.errors import FormatError, PeerError, PeerUnreachable
from tng.egress.upstreams import Upstreams
from tng.operation.journal import Journal
from tng.relay import relay
from tng.streams import ByteStream, Caller, Code


class RawBackend:
    """Relays to fixed upstreams, which a client cannot choose.

    Args:
        upstreams: of this guest.
        journal: where its lines go.
        unsafe: the ``unsafe_…`` settings of the entry.
    """

    def __init__(self, upstreams: Upstreams, journal: Journal, unsafe: tuple[str, ...]) -> None:
        self._upstreams = upstreams
        self._journal = journal
        self._unsafe = unsafe

    @property
    def unsafe(self) -> tuple[str, ...]:
        """The ``unsafe_…`` settings in force."""
        return self._unsafe

    @property
    def ready(self) -> bool:
        """Whether an upstream is believed to live."""
        return self._upstreams.ready

    def status(self) -> dict[str, object]:
        """What the control interface shows."""
        return {"upstreams": self._upstreams.status()}

    def leave(self) -> None:
        """Take no further request: the sessions see to that."""

    async def close(self) -> None:
        """End what runs in the background."""
        await self._upstreams.close()

    async def carry(self, stream: ByteStream, caller: Caller) -> None:
        """Serve one stream to its end."""
        try:
            lease = await self._upstreams.connect()
        except PeerUnreachable as error:
            # The client learns that there is none, not where it would have been.
            stream.reset(Code.UPSTREAM, "the upstream of this egress does not answer")
            self._journal.line(f"{caller.name}: {error.message}")
            return
        try:
            await stream.accept()
            sent, received = await relay(stream, lease.reader, lease.writer)
            self._journal.line(f"{caller.name} done, {sent} B in, {received} B out")
        except (PeerError, FormatError) as error:
            self._journal.line(f"{caller.name} ended: {error.message}")
        finally:
            lease.close()
            with contextlib.suppress(OSError):
                await lease.writer.wait_closed()
