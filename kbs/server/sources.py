"""Who sends a request, as far as addresses say, and how many one address may send.

Pure but for the counters: addresses and a time in, a decision out.
"""

from __future__ import annotations

import ipaddress
import threading
from collections import OrderedDict
from collections.abc import Iterable

from kbs.server.settings import Network

MAX_SOURCES = 65_536
"""Most addresses whose requests are counted; the one that was silent longest is forgotten."""

MAX_FORWARDED = 4096
"""Longest ``X-Forwarded-For`` that is read, characters."""

IPV6_SITE = 64
"""Bits of an IPv6 address that are one source; one customer has all the rest, bits."""

LOCAL = "local"
"""The source of what arrives over a Unix socket."""

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def parse_address(text: str) -> Address | None:
    """An address as sockets and headers name it, or ``None``; a mapped IPv4 address is IPv4."""
    try:
        address = ipaddress.ip_address(text.strip().removeprefix("[").removesuffix("]"))
    except ValueError:
        return None
    mapped = getattr(address, "ipv4_mapped", None)
    return mapped if mapped is not None else address


def within(address: Address, networks: Iterable[Network]) -> bool:
    """Whether one of the networks holds the address."""
    return any(address.version == item.version and address in item for item in networks)


def client_address(
    peer: Address | None, forwarded: str, trusted: tuple[Network, ...]
) -> Address | None:
    """The address that a request comes from.

    Args:
        peer: the other end of the connection.
        forwarded: ``X-Forwarded-For``, all of its values joined by commas.
        trusted: networks of proxies that append to that header.

    Returns:
        Behind trusted proxies, the last address in the header that is not theirs; else ``peer``.
    """
    if peer is None or not forwarded or not within(peer, trusted):
        return peer
    address = peer
    # Only what a trusted proxy appended is believed, so the header is read from its end.
    for text in reversed(forwarded[-MAX_FORWARDED:].split(",")):
        found = parse_address(text)
        if found is None:
            return address
        address = found
        if not within(found, trusted):
            return found
    return address


def source_of(address: Address | None) -> str:
    """What is counted as one source."""
    if address is None:
        return LOCAL
    if address.version == 6:
        return str(ipaddress.ip_network((address, IPV6_SITE), strict=False))
    return str(address)


class RateLimit:
    """A token bucket for each source.

    Args:
        rate: tokens a second.
        burst: tokens that a bucket holds.
    """

    def __init__(self, rate: int, burst: int) -> None:
        self._rate = rate
        self._burst = burst
        self._lock = threading.Lock()
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def admit(self, source: str, at: float) -> bool:
        """Take one token.

        Args:
            source: whose.
            at: monotonic seconds.
        """
        with self._lock:
            tokens, since = self._buckets.pop(source, (float(self._burst), at))
            tokens = min(float(self._burst), tokens + max(0.0, at - since) * self._rate)
            admitted = tokens >= 1
            self._buckets[source] = (tokens - 1 if admitted else tokens, at)
            if len(self._buckets) > MAX_SOURCES:
                self._buckets.popitem(last=False)
        return admitted


class Crowd:
    """How many requests run at once, in all and of each source.

    Args:
        most: of all sources together.
        each: of one source.
    """

    def __init__(self, most: int, each: int) -> None:
        self._most = most
        self._each = each
        self._lock = threading.Lock()
        self._all = 0
        self._of: dict[str, int] = {}

    def enter(self, source: str) -> bool:
        """Count one request in; false when there are as many as may be."""
        with self._lock:
            running = self._of.get(source, 0)
            # What arrives over a Unix socket comes from a front proxy or from this machine.
            if self._all >= self._most or (running >= self._each and source != LOCAL):
                return False
            self._all += 1
            self._of[source] = running + 1
        return True

    def leave(self, source: str) -> None:
        """Count one request out."""
        with self._lock:
            self._all -= 1
            running = self._of.pop(source) - 1
            if running:
                self._of[source] = running
