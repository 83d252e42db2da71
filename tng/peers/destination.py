"""Where a proxied request may go: parsing of authorities, resolution, and the address check.

A name is resolved once and the connection goes to the address that was checked, so a name server
cannot give one answer to the check and another to the connection (decisions §7, Proxy).
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cai.errors import CaiError, PeerUnreachable, PolicyDenied
from tng.config.filters import Address, Filter

RESOLVE_TIMEOUT_S = 5.0
"""Longest wait for a name to be resolved, seconds."""

MAX_ADDRESSES = 8
"""Most addresses of one name that are tried."""

MAX_HOST = 253
"""Longest host name, characters (RFC 1035 §2.3.4)."""

METADATA: frozenset[str] = frozenset(
    {"169.254.169.254", "100.100.100.200", "168.63.129.16", "192.0.0.192", "fd00:ec2::254"}
)
"""Instance metadata services of the large clouds, those outside link-local ranges included."""

_NAME = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?", re.ASCII)
_NUMBER = re.compile(r"(0x[0-9a-f]*|[0-9]+)", re.ASCII)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class BadRequest(CaiError):
    """A client's request breaks HTTP, or is none for a proxy."""

    code, exit_status, http_status = "bad-request", 3, 400


class DestinationRefused(PolicyDenied):
    """The proxy may not go there."""

    code = "destination-refused"


class GatewayItself(DestinationRefused):
    """The request would come back to this very gateway."""


@dataclass(frozen=True, slots=True)
class Destination:
    """A destination as the client named it.

    Attributes:
        host: lower-case name without a final dot, or a canonical literal address.
        port: TCP port.
    """

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_authority(text: str, *, default_port: int | None) -> Destination:
    """``host[:port]`` strictly: no user, no zone, no address in disguise (``127.1``, ``0x7f.1``).

    Raises:
        BadRequest: it is anything else.
    """
    if text.startswith("["):
        literal, bracket, rest = text[1:].partition("]")
        if not bracket:
            raise BadRequest("the destination has an unclosed bracket")
        try:
            host = str(ipaddress.IPv6Address(literal))
        except ValueError as error:
            raise BadRequest("the destination is not an IPv6 address") from error
        if "%" in literal:
            raise BadRequest("the destination has a zone")
    else:
        name, colon, port_text = text.partition(":")
        host, rest = _host(name), colon + port_text
    if not rest:
        if default_port is None:
            raise BadRequest("the destination has no port")
        return Destination(host, default_port)
    digits = rest[1:]
    if rest[0] != ":" or not (digits.isascii() and digits.isdigit()) or len(digits) > 5:
        raise BadRequest("the destination's port is not a number")
    port = int(digits)
    if not 1 <= port <= 65535:
        raise BadRequest("the destination's port is out of range")
    return Destination(host, port)


def demand_allowed(destination: Destination, filters: Sequence[Filter]) -> None:
    """Refuse what no filter names; without filters everything may be asked for, attested.

    Raises:
        DestinationRefused: there are filters and none matches.
    """
    if not matches(destination, filters):
        raise refuse_unmatched(destination)


def matches(destination: Destination, filters: Sequence[Filter]) -> bool:
    """Whether a destination goes through the attested channel; without filters everything does."""
    return not filters or any(
        item.matches(destination.host, destination.port) for item in filters
    )


def refuse_unmatched(destination: Destination) -> DestinationRefused:
    """The refusal of what no filter names."""
    return DestinationRefused(
        f"{destination} matches no dst_filter of this proxy",
        hint="it is refused, never sent in clear; add a filter, or leave this proxy out",
    )


async def resolve(
    destination: Destination, filters: Sequence[Filter], own: Iterable[tuple[str, int]]
) -> tuple[str, ...]:
    """The addresses to connect to, in the resolver's order; the name is not looked up again.

    Args:
        destination: from the client or the settings.
        filters: those of the entry, which may mention private ranges.
        own: addresses that this process listens on.

    Raises:
        PeerUnreachable: the name has no address.
        DestinationRefused: one of its addresses is this gateway, or each of them is refused; the
            first one's reason is told.
    """
    try:
        async with asyncio.timeout(RESOLVE_TIMEOUT_S):
            found = await asyncio.get_running_loop().getaddrinfo(
                destination.host, destination.port, type=socket.SOCK_STREAM
            )
    except (OSError, UnicodeError, TimeoutError) as error:
        raise PeerUnreachable(
            f"the name {destination.host} cannot be resolved", hint="check the name"
        ) from error
    listeners = tuple(own)
    refusal: DestinationRefused | None = None
    allowed: list[str] = []
    for entry in found:
        try:
            address = ipaddress.ip_address(str(entry[4][0]))
            demand_address(destination, address, filters, listeners)
        except GatewayItself:
            raise
        except DestinationRefused as error:
            refusal = refusal or error
        except ValueError:
            continue
        else:
            allowed.append(str(address))
    if not allowed:
        raise refusal or PeerUnreachable(f"the name {destination.host} has no address")
    return tuple(dict.fromkeys(allowed))[:MAX_ADDRESSES]


def demand_address(
    destination: Destination,
    address: Address,
    filters: Sequence[Filter],
    own: Iterable[tuple[str, int]],
) -> None:
    """Check one resolved address (decisions §7, Proxy).

    Raises:
        DestinationRefused: metadata, link-local, unusable, this process itself, or a private
            address behind a name that nobody mentioned.
    """
    plain = _embedded(address)
    if str(plain) in METADATA or str(address) in METADATA:
        raise DestinationRefused(f"{destination} is an instance metadata service ({plain})")
    if plain.is_link_local or address.is_link_local:
        raise DestinationRefused(f"{destination} is link-local ({plain})")
    if plain.is_unspecified or plain.is_multicast or (plain.version == 4 and plain.is_reserved):
        raise DestinationRefused(f"{destination} is no address to connect to ({plain})")
    if _is_own(plain, destination.port, own):
        raise GatewayItself(
            f"{destination} is this gateway itself", hint="name the peer, not the proxy"
        )
    if not (plain.is_loopback or plain.is_private):
        return
    named = destination.host in (str(address), str(plain))
    if plain.is_loopback and destination.host == "localhost":
        named = True
    if not named and not any(item.mentions(destination.host, plain) for item in filters):
        raise DestinationRefused(
            f"the name {destination.host} leads to the private address {plain}",
            hint=f'if that is meant, add the filter {{"domain": "{destination.host}"}}',
        )


def _embedded(address: Address) -> Address:
    """The IPv4 address inside a mapped or NAT64 address, else the address."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped:
            return address.ipv4_mapped
        if address in _NAT64:
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def _is_own(address: Address, port: int, own: Iterable[tuple[str, int]]) -> bool:
    for host, own_port in own:
        if port != own_port:
            continue
        listener = _embedded(ipaddress.ip_address(host))
        if listener == address or (listener.is_unspecified and _is_local(address)):
            return True
    return False


def _is_local(address: Address) -> bool:
    """Whether the address is one of this machine: only those can be bound."""
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((str(address), 0))
    except OSError:
        return False
    return True


def _host(text: str) -> str:
    host = text.lower().removesuffix(".")
    if not host or len(host) > MAX_HOST or not _NAME.fullmatch(host) or ".." in host:
        raise BadRequest("the destination is not a host name")
    try:
        return str(ipaddress.IPv4Address(host))
    except ValueError:
        pass
    # inet_aton's other spellings of an address would pass every check made on the text.
    if _NUMBER.fullmatch(host.rsplit(".", 1)[-1]):
        raise BadRequest("the destination is a number that is not an IPv4 address")
    return host


def server_name(destination: Destination) -> str | None:
    """SNI for a destination; none for a literal address (RFC 6066 §3)."""
    try:
        ipaddress.ip_address(destination.host)
    except ValueError:
        return destination.host
    return None
