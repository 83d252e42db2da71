"""Where a captured connection was going before the kernel turned it to this gateway."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import struct
from collections.abc import Iterable

from tng.config.addresses import TcpUpstream
from tng.config.filters import Address
from tng.config.modes import Netfilter
from tng.peers.destination import (
    Destination,
    DestinationRefused,
    GatewayItself,
    demand_address,
)

SO_ORIGINAL_DST = 80
"""linux/netfilter_ipv4.h; IP6T_SO_ORIGINAL_DST is the same number."""

_SOCKADDR_IN = struct.Struct("!2xH4s8x")
_SOCKADDR_IN6 = struct.Struct("!2xH4x16s4x")


def original_destination(writer: asyncio.StreamWriter) -> TcpUpstream:
    """The destination that the client dialled.

    Raises:
        DestinationRefused: the kernel knows of none: the connection was not captured.
    """
    sock = writer.get_extra_info("socket")
    try:
        if sock.family == socket.AF_INET6:
            raw = sock.getsockopt(socket.IPPROTO_IPV6, SO_ORIGINAL_DST, _SOCKADDR_IN6.size)
            port, packed = _SOCKADDR_IN6.unpack(raw)
        else:
            raw = sock.getsockopt(socket.IPPROTO_IP, SO_ORIGINAL_DST, _SOCKADDR_IN.size)
            port, packed = _SOCKADDR_IN.unpack(raw)
    except (OSError, struct.error) as error:
        raise DestinationRefused("the connection was not captured by netfilter") from error
    return TcpUpstream(str(ipaddress.ip_address(packed)), port)


def demand_captured(mode: Netfilter, target: TcpUpstream) -> None:
    """Refuse what the entry does not capture, such as a connection to the listener itself.

    Raises:
        DestinationRefused: no capture rule names it.
    """
    address = ipaddress.ip_address(target.host)
    if target.port == mode.listen_port or not (not mode.capture or any(
        (item.network is None or address in item.network)
        and (item.first_port is None or item.first_port <= target.port <= (item.last_port or 0))
        for item in mode.capture
    )):
        raise DestinationRefused(f"{target} is not captured by this entry")


def leads_to(target: TcpUpstream, own: Iterable[tuple[str, int]]) -> bool:
    """Whether a configured target is one of these listeners; names other than localhost are not."""
    hosts = ("127.0.0.1", "::1") if target.host.lower() == "localhost" else (target.host,)
    listeners = tuple(own)
    for host in hosts:
        try:
            address = ipaddress.ip_address(host)
            demand_address(Destination(host, target.port), address, (), listeners)
        except GatewayItself:
            return True
        except (DestinationRefused, ValueError):
            continue
    return False


def is_local(address: Address) -> bool:
    """Whether the address is one of this machine: only those can be bound."""
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((str(address), 0))
    except OSError:
        return False
    return True
