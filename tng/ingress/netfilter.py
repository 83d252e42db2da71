"""Ingress ``netfilter``: what the kernel turned to this gateway goes, attested, where it was going.

The client speaks to an address and knows nothing of the gateway, so there is no name to check: the
address itself is the destination, and what is behind it must prove itself.
"""

from __future__ import annotations

import asyncio

from tng.config.modes import Netfilter
from tng.ingress.mapping import PortMapping
from tng.netfilter.original import demand_captured, original_destination
from tng.operation.journal import Journal, endpoint_text
from tng.peers.destination import DestinationRefused
from tng.streams import Peers


class CapturedConnections:
    """One ingress ``netfilter`` entry.

    Args:
        name: of the entry.
        mode: what it captures.
        peers: its attested peers.
        journal: where its lines go.
    """

    def __init__(self, name: str, mode: Netfilter, peers: Peers, journal: Journal) -> None:
        self._name = name
        self._mode = mode
        self._mapping = PortMapping(name, peers, journal)
        self._journal = journal

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one client connection to its end."""
        try:
            target = original_destination(writer)
            demand_captured(self._mode, target)
        except DestinationRefused as error:
            client = endpoint_text(writer.get_extra_info("peername"))
            self._journal.line(f"{self._name} {client} refused: {error.message}")
            writer.close()
            return
        await self._mapping.serve(reader, writer, [target])
