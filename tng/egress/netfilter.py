"""Egress ``netfilter``: attested connections to a service that keeps its port.

The kernel turns connections to the service's port to this gateway, which leads what is inside, once
the session is proven, to the address that the client dialled. That address is one of this machine,
or the entry says ``unsafe_remote_upstream`` (decisions §7, Backends).
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Callable, Iterable

from tng.config.addresses import Endpoint, Rule, TcpUpstream
from tng.config.modes import Netfilter
from tng.egress.direct import DirectForward
from tng.netfilter.original import demand_captured, is_local, original_destination
from tng.operation.journal import Journal, endpoint_text
from tng.peers.destination import Destination, DestinationRefused, demand_address
from tng.streams import Acceptor, Backend

MAX_BACKENDS = 1024
"""Most services of one entry at once."""


class CapturedService:
    """One egress ``netfilter`` entry.

    Args:
        name: of the entry.
        mode: what it captures.
        acceptor: its end of the dialects.
        make_backend: gives the backend of a service.
        remote: whether the service may be elsewhere.
        own: gives the addresses that this gateway listens on.
        journal: where its lines go.
    """

    def __init__(
        self,
        name: str,
        mode: Netfilter,
        acceptor: Acceptor,
        make_backend: Callable[[Rule], Backend],
        *,
        remote: bool,
        own: Callable[[], Iterable[tuple[str, int]]],
        journal: Journal,
    ) -> None:
        self._name = name
        self._mode = mode
        self._acceptor = acceptor
        self._make_backend = make_backend
        self._remote = remote
        self._own = own
        self._journal = journal
        self._backends: dict[TcpUpstream, Backend] = {}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection to its end."""
        try:
            target = original_destination(writer)
            backend = self._backend(target)
        except DestinationRefused as error:
            client = endpoint_text(writer.get_extra_info("peername"))
            self._journal.line(f"{self._name} {client} refused: {error.message}")
            writer.close()
            return
        if isinstance(self._acceptor, DirectForward):
            await self._acceptor.serve(reader, writer, backend, targets=(target,))
        else:
            await self._acceptor.serve(reader, writer, backend)

    def _backend(self, target: TcpUpstream) -> Backend:
        if target in self._backends:
            return self._backends[target]
        demand_captured(self._mode, target)
        address = ipaddress.ip_address(target.host)
        demand_address(Destination(target.host, target.port), address, (), self._own())
        if not self._remote and not is_local(address):
            raise DestinationRefused(
                f"{target} is not of this guest: it would get the plain text over a network",
                hint="say unsafe_remote_upstream: true if that is meant",
            )
        if len(self._backends) >= MAX_BACKENDS:
            raise DestinationRefused(f"more than {MAX_BACKENDS} services")
        listen = Endpoint(target.host, target.port)
        backend = self._make_backend(Rule(listen, (target,)))
        self._backends[target] = backend
        return backend
