"""The ports that several workers share, held so that nobody else takes them between two workers.

``SO_REUSEPORT`` lets any process of the same user join a port in silence, so a port is first bound
without it: two gateways that were given the same port by mistake do not share its connections.
"""

from __future__ import annotations

import socket
from dataclasses import replace

from cai.errors import ListenerFailed
from tng.config.addresses import Endpoint
from tng.config.entries import Config, Egress, Ingress
from tng.config.modes import HttpProxy, Mapping, Netfilter, Socks5

ANY = ("0.0.0.0", "::")  # noqa: S104 - netfilter turns packets to any of this machine's addresses


class Places:
    """Bound sockets that never listen, one for each address of the workers."""

    def __init__(self) -> None:
        self._held: list[socket.socket] = []
        self.listen: dict[str, list[str]] = {}
        self.captured: dict[str, int] = {}

    def take(self, config: Config) -> Config:
        """Bind every address of a configuration; the configuration with the real ports.

        Raises:
            ListenerFailed: one of them is taken.
        """
        try:
            return replace(
                config,
                ingress=tuple(self._ingress(entry) for entry in config.ingress),
                egress=tuple(self._egress(entry) for entry in config.egress),
                telemetry=replace(config.telemetry, control=None),
            )
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let the ports go."""
        for sock in self._held:
            sock.close()
        self._held.clear()

    def _ingress(self, entry: Ingress) -> Ingress:
        mode = entry.mode
        if isinstance(mode, (HttpProxy, Socks5)):
            return replace(entry, mode=replace(mode, listen=self._bind(entry.name, mode.listen)))
        if isinstance(mode, Mapping):
            return replace(entry, mode=self._mapping(entry.name, mode))
        if isinstance(mode, Netfilter):
            return replace(entry, mode=self._netfilter(entry.name, mode))
        return entry

    def _egress(self, entry: Egress) -> Egress:
        mode = entry.mode
        if isinstance(mode, Mapping):
            return replace(entry, mode=self._mapping(entry.name, mode))
        if isinstance(mode, Netfilter):
            return replace(entry, mode=self._netfilter(entry.name, mode))
        return entry

    def _mapping(self, name: str, mode: Mapping) -> Mapping:
        rules = (replace(rule, listen=self._bind(name, rule.listen)) for rule in mode.rules)
        return Mapping(tuple(rules))

    def _netfilter(self, name: str, mode: Netfilter) -> Netfilter:
        place = self._bind(name, Endpoint(ANY[0], mode.listen_port or 0))
        if socket.has_ipv6:
            self._bind(name, Endpoint(ANY[1], place.port))
        self.captured[name] = place.port
        return replace(mode, listen_port=place.port)

    def _bind(self, name: str, where: Endpoint) -> Endpoint:
        port = where.port
        try:
            found = socket.getaddrinfo(
                where.host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
            for family, _kind, _protocol, _name, address in dict.fromkeys(found):
                port = self._hold(family, str(address[0]), port)
                self.listen.setdefault(name, []).append(str(Endpoint(str(address[0]), port)))
        except (OSError, UnicodeError, OverflowError) as error:
            raise ListenerFailed(
                f"{name} cannot listen on {where}: {getattr(error, 'strerror', None) or error}",
                hint="choose a free port, or stop what holds it",
            ) from error
        return Endpoint(where.host, port)

    def _hold(self, family: socket.AddressFamily, host: str, port: int) -> int:
        with _bound(family, host, port, shared=False) as alone:
            port = int(alone.getsockname()[1])
        self._held.append(_bound(family, host, port, shared=True))
        return port


def _bound(
    family: socket.AddressFamily, host: str, port: int, *, shared: bool
) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((host, port))
    except BaseException:
        sock.close()
        raise
    return sock

