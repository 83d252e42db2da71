"""One running gateway: its listeners, and the orderly way to end them."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Awaitable, Callable
from typing import Any

from cai.attest.agent_client import ChannelAgent
from cai.errors import ListenerFailed
from tng.config.addresses import Endpoint
from tng.config.entries import Config, EgressMapping, HttpProxyIngress, MappingIngress
from tng.egress.raw import RawBackend
from tng.egress.sessions import SessionEgress
from tng.ingress.http_proxy import HttpProxy
from tng.ingress.mapping import PortMapping
from tng.operation.control import Control
from tng.operation.journal import Journal
from tng.peers.pool import SessionPeers

DRAIN_S = 10.0
"""How long running requests may go on after the gateway was asked to stop, seconds."""

BACKLOG = 256
"""Connections that may wait to be accepted."""

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Gateway:
    """Everything that one configuration asks for.

    Args:
        config: what to do.
        journal: where its lines go.
        agent: source of proofs for every egress; by default each entry's own.

    Raises:
        CaiError: a file that the configuration names is missing or malformed.
    """

    def __init__(
        self, config: Config, journal: Journal, agent: ChannelAgent | None = None
    ) -> None:
        self._config = config
        self._journal = journal
        self._servers: list[asyncio.Server] = []
        self._own: list[tuple[str, int]] = []
        self._connections: set[asyncio.Task[Any]] = set()
        self._leaving = False
        self._listen: dict[str, list[str]] = {}
        self._proxies: list[HttpProxy] = []
        self._peers = {
            entry.name: SessionPeers(
                entry.name,
                entry.verify,
                filters=entry.filters if isinstance(entry, HttpProxyIngress) else (),
                padding=entry.padding,
                journal=journal,
                own=lambda: self._own,
            )
            for entry in config.ingress
        }
        self._egress = {
            entry.name: SessionEgress(entry, journal, agent) for entry in config.egress
        }

    async def start(self) -> dict[str, list[str]]:
        """Open every listener; the real addresses by entry name.

        Raises:
            ListenerFailed: one cannot be opened; none is left open.
        """
        try:
            for entry in self._config.ingress:
                await self._start_ingress(entry)
            for egress in self._config.egress:
                await self._start_egress(egress)
            if self._config.control:
                control = Control(lambda: not self._leaving, self.status)
                await self._open("control_interface", self._config.control, control.serve)
        except BaseException:
            await self.close()
            raise
        return self._listen

    @property
    def unsafe(self) -> tuple[str, ...]:
        """The ``unsafe_…`` settings in force."""
        found = [name for peers in self._peers.values() for name in peers.unsafe]
        found += [name for entry in self._config.egress for name in entry.unsafe]
        return tuple(dict.fromkeys(found))

    def status(self) -> dict[str, object]:
        """What the control interface shows."""
        return {
            "ready": not self._leaving,
            "listen": self._listen,
            "unsafe": list(self.unsafe),
            "ingress": {name: peers.status() for name, peers in self._peers.items()},
            "egress": {
                entry.name: {
                    "mode": "mapping",
                    **self._egress[entry.name].status(),
                    "unsafe": list(entry.unsafe),
                }
                for entry in self._config.egress
            },
        }

    async def drain(self) -> None:
        """Stop taking work, let what runs end within ``DRAIN_S``, then close."""
        self._leaving = True
        for server in self._servers:
            server.close()
        for proxy in self._proxies:
            proxy.leave()
        for egress in self._egress.values():
            egress.leave()
        for peers in self._peers.values():
            peers.leave()
        if self._connections:
            await asyncio.wait(set(self._connections), timeout=DRAIN_S)
        await self.close()

    async def close(self) -> None:
        """End everything now."""
        self._leaving = True
        for server in self._servers:
            server.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        for peers in self._peers.values():
            await peers.close()
        for egress in self._egress.values():
            await egress.close()

    async def _start_ingress(self, entry: HttpProxyIngress | MappingIngress) -> None:
        peers = self._peers[entry.name]
        if isinstance(entry, HttpProxyIngress):
            proxy = HttpProxy(entry, peers, self._journal)
            self._proxies.append(proxy)
            await self._open(entry.name, entry.listen, proxy.serve)
            return
        mapping = PortMapping(entry, peers, self._journal)
        for listen, target in entry.rules:
            await self._open(
                entry.name, listen, functools.partial(mapping.serve, target=target)
            )

    async def _start_egress(self, entry: EgressMapping) -> None:
        egress = self._egress[entry.name]
        for listen, upstream in entry.rules:
            backend = RawBackend(upstream, self._journal, entry.unsafe)
            await self._open(
                entry.name, listen, functools.partial(egress.serve, backend=backend)
            )

    async def _open(self, name: str, where: Endpoint, serve: Serve) -> None:
        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None  # noqa: S101 - asyncio runs this in a task
            self._connections.add(task)
            try:
                await serve(reader, writer)
            except asyncio.CancelledError:
                # The gateway is closing; the connection ends with it.
                with contextlib.suppress(OSError):
                    writer.transport.abort()
            except Exception as error:
                # A fault of our own ends one connection, not the gateway; its text may quote a
                # request, so only its kind is told.
                self._journal.line(f"{name} fault of our own: {type(error).__name__}")
                writer.transport.abort()
            finally:
                self._connections.discard(task)

        try:
            server = await asyncio.start_server(
                connected, where.host, where.port, backlog=BACKLOG
            )
        except (OSError, UnicodeError, OverflowError) as error:
            raise ListenerFailed(
                f"{name} cannot listen on {where}: {getattr(error, 'strerror', None) or error}",
                hint="choose a free port, or stop what holds it",
            ) from error
        self._servers.append(server)
        for bound in server.sockets:
            host, port = bound.getsockname()[:2]
            self._own.append((host.partition("%")[0], port))
            self._listen.setdefault(name, []).append(str(Endpoint(host, port)))
