"""One running gateway: its listeners, and the orderly way to end them."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from cai.attest.agent_client import ChannelAgent
from cai.errors import ListenerFailed, SettingError
from tng.config import modes
from tng.config.addresses import Endpoint, Rule, TcpUpstream, Upstream
from tng.config.entries import Config, Egress, Ingress
from tng.config.transport import RatsTls
from tng.egress.direct import DirectForward
from tng.egress.netfilter import CapturedService
from tng.guard.addresses import AddressRefused, may_connect
from tng.guard.desk import BootKeys
from tng.ingress.direct import DirectPeers
from tng.ingress.http_proxy import HttpProxy
from tng.ingress.mapping import PortMapping
from tng.ingress.netfilter import CapturedConnections
from tng.ingress.socks5 import SocksProxy
from tng.netfilter.capture import Captures
from tng.netfilter.marks import mark_connections
from tng.netfilter.original import leads_to
from tng.operation.assembly import make_acceptor, make_backend, make_desk, make_peers
from tng.operation.control import Control
from tng.operation.journal import Journal, endpoint_text
from tng.operation.metered import MeteredBackend, MeteredPeers
from tng.operation.readiness import Readiness
from tng.operation.telemetry import Exporters
from tng.operation.timed import demand_fresh, demand_proof_of
from tng.streams import Acceptor, Backend

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
        agent: source of proofs for every entry; by default each entry's own.
        shared: whether other processes listen on the same ports; they have the capture rules then.
        mark: of this process's sockets where it has no capture rules of its own.
        keys: secrets of this run, where several processes share them.
        own: addresses of the gateway that other processes listen on.

    Raises:
        SettingError: the configuration asks for something that this gateway does not do.
        CaiError: a file that the configuration names is missing or malformed.
    """

    def __init__(
        self,
        config: Config,
        journal: Journal,
        agent: ChannelAgent | None = None,
        *,
        shared: bool = False,
        mark: int | None = None,
        keys: BootKeys | None = None,
        own: Sequence[tuple[str, int]] = (),
    ) -> None:
        config.require_served()
        self._config = config
        self._journal = journal
        self._servers: list[asyncio.Server] = []
        self._own: list[tuple[str, int]] = list(own)
        self._no_backend = set(own)
        self._connections: set[asyncio.Task[Any]] = set()
        self._leaving = False
        self._listen: dict[str, list[str]] = {}
        self._proxies: list[HttpProxy] = []
        self._shared = shared
        self._captures = None if shared else Captures(config, journal)
        self._mark = mark if self._captures is None else self._captures.mark
        self._captured: dict[str, int] = {}
        self._exporters = Exporters(config, journal)
        self._readiness = Readiness(lambda: self._leaving)
        entries: tuple[Ingress | Egress, ...] = (*config.ingress, *config.egress)
        for entry in entries:
            if entry.trust.attest is not None:
                probe = (
                    functools.partial(demand_fresh, agent)
                    if agent is not None
                    else functools.partial(demand_proof_of, entry.trust.attest.socket)
                )
                self._readiness.needs_evidence(f"{entry.name} evidence", probe)
        self._peers = {
            entry.name: MeteredPeers(
                make_peers(entry, journal, lambda: self._own, agent), entry.name, journal
            )
            for entry in config.ingress
        }
        self._acceptors = {
            entry.name: _direct(entry, make_acceptor(entry, journal, agent), journal)
            for entry in config.egress
        }
        keys = keys or BootKeys()
        self._desks = {entry.name: make_desk(entry, keys) for entry in config.egress}
        self._backends: list[tuple[str, Backend]] = []

    async def start(self) -> dict[str, list[str]]:
        """Open every listener; the real addresses by entry name.

        Raises:
            ListenerFailed: one cannot be opened; none is left open.
            SettingError: a mode that is not in this version.
        """
        try:
            if self._mark is not None:
                mark_connections(asyncio.get_running_loop(), self._mark)
            if self._captures:
                await self._captures.guard()
            for ingress in self._config.ingress:
                await self._start_ingress(ingress)
            for egress in self._config.egress:
                await self._start_egress(egress)
            where = self._config.telemetry.control
            if where:
                serve = self.control().serve
                await self._open("control_interface", where, serve, counted=False)
            self._demand_backends()
            if self._captures:
                await self._captures.capture(self._captured)
            self._exporters.start()
        except BaseException:
            await self.close()
            raise
        return self._listen

    def _demand_backends(self) -> None:
        """Refuse an egress that leads to an egress or to the control interface.

        An ingress may be a backend: it leads on to another attested guest.
        """
        for entry in self._config.egress:
            if not isinstance(entry.mode, modes.Mapping):
                continue
            for target in (target for rule in entry.mode.rules for target in rule.targets):
                if isinstance(target, TcpUpstream) and leads_to(target, self._no_backend):
                    raise SettingError(
                        f"{entry.name}: the backend {target} is this gateway itself",
                        hint="name the service behind it",
                    )

    def control(self) -> Control:
        """The control interface of this gateway."""
        return Control(self.missing, self.status, self._journal.meters)

    @property
    def unsafe(self) -> tuple[str, ...]:
        """The ``unsafe_…`` settings in force."""
        found = [name for peers in self._peers.values() for name in peers.unsafe]
        found += [name for ingress in self._config.ingress for name in ingress.unsafe]
        found += [name for egress in self._config.egress for name in egress.unsafe]
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
                    "mode": type(entry.mode).__name__.lower(),
                    **self._acceptors[entry.name].status(),
                    "backends": [
                        backend.status() for name, backend in self._backends if name == entry.name
                    ],
                    "unsafe": list(entry.unsafe),
                }
                for entry in self._config.egress
            },
        }

    async def missing(self) -> tuple[str, ...]:
        """What keeps it from serving; empty when it is ready."""
        return await self._readiness.missing()

    async def drain(self) -> None:
        """Stop taking work, let what runs end within its time, then close."""
        self._leaving = True
        for server in self._servers:
            server.close()
        for proxy in self._proxies:
            proxy.leave()
        for acceptor in self._acceptors.values():
            acceptor.leave()
        for _name, backend in self._backends:
            backend.leave()
        for peers in self._peers.values():
            peers.leave()
        if self._connections:
            guards = [entry.guard.drain_s for entry in self._config.egress if entry.guard]
            await asyncio.wait(set(self._connections), timeout=max([DRAIN_S, *guards]))
        await self.close()

    async def close(self) -> None:
        """End everything now."""
        self._leaving = True
        for server in self._servers:
            server.close()
        if self._captures is not None:
            await self._captures.release()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        for peers in self._peers.values():
            await peers.close()
        for acceptor in self._acceptors.values():
            await acceptor.close()
        for _name, backend in self._backends:
            await backend.close()
        await self._exporters.close()

    async def _start_ingress(self, entry: Ingress) -> None:
        peers = self._peers[entry.name]
        if isinstance(entry.mode, (modes.HttpProxy, modes.Socks5)):
            direct = DirectPeers(entry.mode.filters, lambda: self._own)
            clear = direct if entry.mode.direct else None
            proxy: HttpProxy | SocksProxy
            if isinstance(entry.mode, modes.HttpProxy):
                proxy = HttpProxy(entry.name, entry.mode, peers, clear, self._journal)
                self._proxies.append(proxy)
            else:
                proxy = SocksProxy(entry.name, entry.mode, peers, clear, self._journal)
            await self._open(entry.name, entry.mode.listen, proxy.serve)
        elif isinstance(entry.mode, modes.Mapping):
            mapping = PortMapping(entry.name, peers, self._journal)
            for rule in entry.mode.rules:
                targets = _remote(entry.name, rule.targets)
                serve = functools.partial(mapping.serve, targets=targets)
                await self._open(entry.name, rule.listen, serve)
        elif isinstance(entry.mode, modes.Netfilter):
            captured = CapturedConnections(entry.name, entry.mode, peers, self._journal)
            await self._open_captured(entry.name, entry.mode, captured.serve)
        else:
            raise SettingError(f"{entry.name}: this mode is not in this version")

    async def _start_egress(self, entry: Egress) -> None:
        acceptor = self._acceptors[entry.name]
        if isinstance(entry.mode, modes.Netfilter):
            service = CapturedService(
                entry.name,
                entry.mode,
                acceptor,
                functools.partial(self._backend, entry),
                remote=entry.remote_upstream,
                own=lambda: self._own,
                journal=self._journal,
            )
            await self._open_captured(
                entry.name, entry.mode, self._admitted(entry, service.serve)
            )
            return
        if not isinstance(entry.mode, modes.Mapping):
            raise SettingError(f"{entry.name}: this mode is not in this version")
        for rule in entry.mode.rules:
            backend = self._backend(entry, rule)
            self._readiness.needs_backend(entry.name, rule.targets)
            if entry.guard is not None:
                self._readiness.needs_health(entry.name, backend)
            serve = functools.partial(acceptor.serve, backend=backend)
            if isinstance(acceptor, DirectForward):
                serve = functools.partial(acceptor.serve, backend=backend, targets=rule.targets)
            await self._open(entry.name, rule.listen, self._admitted(entry, serve))

    def _admitted(self, entry: Egress, serve: Serve) -> Serve:
        """Connections from addresses that the guard takes; the others cost no handshake."""
        guard = entry.guard
        if guard is None or not (guard.allow or guard.deny):
            return serve

        async def admitted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            peer = writer.get_extra_info("peername")
            if may_connect(guard, peer):
                await serve(reader, writer)
                return
            error = AddressRefused(f"{endpoint_text(peer)} may not connect")
            self._journal.refused(entry.name, error)
            self._journal.line(f"{entry.name} refused: {error.message}")
            writer.transport.abort()

        return admitted

    def _backend(self, entry: Egress, rule: Rule) -> Backend:
        made = make_backend(entry, rule, self._journal, self._desks[entry.name])
        self._backends.append((entry.name, made))
        return MeteredBackend(made, entry.name, self._journal)

    async def _open_captured(self, name: str, mode: modes.Netfilter, serve: Serve) -> None:
        # The kernel turns packets to an address of the interface on which they came in.
        await self._open(name, Endpoint("0.0.0.0", mode.listen_port or 0), serve)  # noqa: S104
        port = self._own[-1][1]
        self._captured[name] = port
        try:
            await self._open(name, Endpoint("::", port), serve)
        except ListenerFailed as error:
            # Its rules lead to a closed port then, so nothing of IPv6 passes in clear.
            self._journal.line(f"{name} serves IPv4 only: {error.message}")

    async def _open(
        self, name: str, where: Endpoint, serve: Serve, *, counted: bool = True
    ) -> None:
        meters = self._journal.meters

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None  # noqa: S101 - asyncio runs this in a task
            self._connections.add(task)
            if counted:
                meters.connections.add(1, name)
                meters.active.add(1, name)
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
                if counted:
                    meters.active.add(-1, name)

        try:
            server = await asyncio.start_server(
                connected, where.host, where.port, backlog=BACKLOG, reuse_port=self._shared or None
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
            if not name.startswith("ingress"):
                self._no_backend.add(self._own[-1])
            self._listen.setdefault(name, []).append(str(Endpoint(host, port)))


def _direct(entry: Egress, acceptor: Acceptor, journal: Journal) -> Acceptor:
    # OHTTP is plain HTTP outside; its acceptor tells the requests apart itself.
    if not entry.direct or not isinstance(entry.transport, RatsTls):
        return acceptor
    return DirectForward(entry.name, entry.direct, acceptor, journal)


def _remote(name: str, targets: tuple[Upstream, ...]) -> tuple[TcpUpstream, ...]:
    remote = tuple(target for target in targets if isinstance(target, TcpUpstream))
    if len(remote) != len(targets):
        raise SettingError(f"{name}: an ingress leads to a host and port, not to a Unix socket")
    return remote
