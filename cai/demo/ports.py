"""Loopback ports that stay the demo's own from the moment they are chosen.

A port that was free when it was looked at may be somebody's outgoing connection a second later. So
each port is held by a listening socket until just before the party that it is meant for starts.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass, field

from cai.errors import ListenerFailed


class HeldPort:
    """One loopback port, held until it is given away.

    Args:
        preferred: taken if it is free, else any other port.

    Raises:
        ListenerFailed: no port can be had at all.
    """

    def __init__(self, preferred: int) -> None:
        self._holder: socket.socket | None = None
        for port in (preferred, 0):
            holder = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            # Connections of an earlier run that linger in TIME_WAIT are no reason to go elsewhere.
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                holder.bind(("127.0.0.1", port))
                holder.listen(1)
            except OSError:
                holder.close()
                continue
            self._holder = holder
            self.number = int(holder.getsockname()[1])
            return
        raise ListenerFailed("no loopback port is free", hint="check that the interface lo is up")

    def give(self) -> int:
        """Let go of the port, for the party that is started next."""
        if self._holder is not None:
            self._holder.close()
            self._holder = None
        return self.number


@dataclass
class Ports:
    """The demo's ports: the usual ones where they are free."""

    kbs: HeldPort = field(default_factory=lambda: HeldPort(8080))
    admin: HeldPort = field(default_factory=lambda: HeldPort(8081))
    service: HeldPort = field(default_factory=lambda: HeldPort(41001))
    proxy: HeldPort = field(default_factory=lambda: HeldPort(41000))
    control: HeldPort = field(default_factory=lambda: HeldPort(41002))

    def close(self) -> None:
        """Let go of all of them."""
        for port in (self.kbs, self.admin, self.service, self.proxy, self.control):
            port.give()
