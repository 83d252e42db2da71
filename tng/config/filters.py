"""Destination filters of the proxy: what is not named is refused, never sent in clear.

Stock TNG forwards in clear text whatever no filter matches, and a misspelt key matches everything.
Here a filter list is the list of destinations that may be asked for at all.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Any

from cai.errors import SettingError
from cai.settings import Section
from tng.config.notes import NoteKind, Notes
from tng.config.patterns import compile_pattern

MAX_FILTERS = 256
"""Most filters of one entry."""

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True)
class Filter:
    """One filter; exactly one of the host members is set, or none and a port.

    Attributes:
        domain: exact name, ``*suffix``, ``prefix*`` or ``*``; lower case.
        regex: pattern that matches the whole name.
        network: addresses, for literal destinations.
        first_port: lowest port, or ``None`` for any.
        last_port: highest port.
    """

    domain: str | None = None
    regex: re.Pattern[str] | None = None
    network: Network | None = None
    first_port: int | None = None
    last_port: int | None = None

    def matches(self, host: str, port: int) -> bool:
        """Whether a destination, as the client named it, is meant by this filter.

        Args:
            host: lower-case name, or a literal address without brackets.
            port: TCP port.
        """
        if self.first_port is not None and not self.first_port <= port <= (self.last_port or 0):
            return False
        literal = _literal(host)
        if self.network is not None:
            return literal is not None and literal in self.network
        if self.domain == "*":
            return True
        if self.domain is not None:
            return literal is None and _domain_matches(self.domain, host)
        if self.regex is not None:
            return literal is None and self.regex.fullmatch(host) is not None
        return True

    def mentions(self, host: str, address: Address) -> bool:
        """Whether the filter names this very host, or this address by a range.

        A name that resolves to loopback or to a private range must be mentioned so, because a
        stranger's name server can make any name point there.
        """
        if self.network is not None:
            return address in self.network
        return self.domain is not None and "*" not in self.domain and self.domain == host


def parse_filters(raw: Any, *, where: str, notes: Notes) -> tuple[Filter, ...]:
    """One filter or a list of them.

    Raises:
        SettingError: a filter names nothing, or something unknown.
    """
    if raw is None:
        return ()
    items = raw if isinstance(raw, list) else [raw]
    if len(items) > MAX_FILTERS:
        raise SettingError(f"{where}: {len(items)} filters, at most {MAX_FILTERS}")
    return tuple(
        _parse(Section(item, where=f"{where}[{index}]"), notes) for index, item in enumerate(items)
    )


def _parse(section: Section, notes: Notes) -> Filter:
    hosts = [
        name for name in ("domain", "domain_regex", "ip", "ip_cidr") if section.has(name)
    ]
    first, last = _ports(section)
    notes.ignore_unknown(section, hosts)
    if first is None:
        notes.add(NoteKind.VERSION, section.where, "means any port; TNG up to 2.6 reads port 80")
    if len(hosts) > 1:
        notes.add(NoteKind.IGNORED, section.where, f"{hosts[0]} is used, {hosts[1]} is not")
    if not hosts:
        if first is None:
            notes.add(NoteKind.VERSION, section.where, "names nothing, so it matches everything")
        return Filter(first_port=first, last_port=last)
    value = section.text(hosts[0])
    if hosts[0] == "domain":
        return Filter(domain=_domain(value, section.where), first_port=first, last_port=last)
    if hosts[0] == "domain_regex":
        notes.add(
            NoteKind.VERSION, section.where,
            "domain_regex must match the whole name; TNG searches anywhere in it",
        )  # fmt: skip
        pattern = compile_pattern(value, f"{section.where}: domain_regex", flags=re.IGNORECASE)
        return Filter(regex=pattern, first_port=first, last_port=last)
    try:
        network = ipaddress.ip_network(value, strict=True)
    except ValueError as error:
        raise SettingError(f"{section.where}: {hosts[0]}: {error}") from error
    if hosts[0] == "ip" and network.num_addresses != 1:
        raise SettingError(f"{section.where}: ip is one address; ip_cidr is a range")
    return Filter(network=network, first_port=first, last_port=last)


def _ports(section: Section) -> tuple[int | None, int | None]:
    if not section.has("port"):
        if section.has("port_end"):
            raise SettingError(f"{section.where}: port_end needs port")
        return None, None
    first = section.integer("port", least=0, most=65535, unit="(a port)")
    if not section.has("port_end"):
        return first, first
    return first, section.integer("port_end", least=first, most=65535, unit="(a port)")


def _domain(value: str, where: str) -> str:
    inner = value[1:] if value.startswith("*") else value.removesuffix("*")
    if "*" in inner or value != value.strip():
        raise SettingError(
            f"{where}: domain {value!r}", hint="give a name, '*suffix', 'prefix*' or '*'"
        )
    return value.lower().rstrip(".")


def _domain_matches(pattern: str, host: str) -> bool:
    if pattern.startswith("*"):
        return host.endswith(pattern[1:])
    if pattern.endswith("*"):
        return host.startswith(pattern[:-1])
    return host == pattern


def _literal(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
