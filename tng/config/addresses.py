"""Addresses in the configuration: what is listened on, what is led to, and mapping rules."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cai.errors import SettingError
from cai.settings import Section
from tng.config.notes import NoteKind, Notes

MAX_RULES = 256
"""Most listeners of one mapping."""

MAX_TARGETS = 32
"""Most targets of one listener."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An address to listen on; port 0 takes a free one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class TcpUpstream:
    """A TCP target."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class UnixUpstream:
    """A Unix socket target."""

    path: Path

    def __str__(self) -> str:
        return f"unix:{self.path}"


Upstream = TcpUpstream | UnixUpstream


@dataclass(frozen=True, slots=True)
class Rule:
    """One listening port and where it leads.

    Attributes:
        listen: the port.
        targets: where to, in the order in which they are tried or balanced.
    """

    listen: Endpoint
    targets: tuple[Upstream, ...]


def parse_rules(body: Section, notes: Notes) -> tuple[Rule, ...]:
    """Both forms of a mapping: ``rules`` and the single pair; port ranges become single ports.

    Raises:
        SettingError: a rule is malformed, or two of them listen on the same address.
    """
    if body.has("rules"):
        raw = body.raw("rules")
        if not isinstance(raw, list) or not raw:
            raise SettingError(f"{body.where}: rules must be a list of at least one rule")
        sections = [
            Section(rule, where=f"{body.where}.rules[{index}]") for index, rule in enumerate(raw)
        ]
        notes.ignore_unknown(body)
        rules = [rule for section in sections for rule in _rule(section, notes, ranges=True)]
    else:
        rules = _rule(body, notes, ranges=False)
    if len(rules) > MAX_RULES:
        raise SettingError(f"{body.where}: {len(rules)} ports, at most {MAX_RULES}")
    _refuse_overlap([rule.listen for rule in rules], body.where)
    return tuple(rules)


def _refuse_overlap(listens: list[Endpoint], where: str) -> None:
    seen: dict[int, set[str]] = {}
    for listen in listens:
        if not listen.port:
            continue
        hosts = seen.setdefault(listen.port, set())
        wild = {"0.0.0.0", "::"}  # noqa: S104 - compared, not bound
        if listen.host in hosts or (hosts and (listen.host in wild or hosts & wild)):
            raise SettingError(f"{where}: two rules listen on port {listen.port}")
        hosts.add(listen.host)


def _rule(section: Section, notes: Notes, *, ranges: bool) -> list[Rule]:
    inside, outside = section.section("in"), section.raw("out")
    if inside is None or outside is None:
        raise SettingError(f"{section.where}: a rule has in and out")
    in_last = _range_end(inside, notes, ranges=ranges)
    listen = _endpoint(inside, notes, default_host="0.0.0.0")  # noqa: S104 - TNG's default
    items = outside if isinstance(outside, list) else [outside]
    if not 1 <= len(items) <= MAX_TARGETS:
        raise SettingError(f"{section.where}.out: 1 to {MAX_TARGETS} targets")
    columns = [
        _targets(Section(item, where=f"{section.where}.out"), notes, ranges=ranges)
        for item in items
    ]
    notes.ignore_unknown(section)
    count = (in_last if in_last is not None else listen.port) - listen.port + 1
    same = all(len(column) == count for column in columns)
    if not 1 <= count <= MAX_RULES or not same or (count > 1 and not listen.port):
        raise SettingError(f"{section.where}: port ranges of in and out must have the same size")
    return [
        Rule(Endpoint(listen.host, listen.port + step), tuple(column[step] for column in columns))
        for step in range(count)
    ]


def _targets(section: Section, notes: Notes, *, ranges: bool) -> list[Upstream]:
    if section.has("unix"):
        path = Path(section.text("unix"))
        section.finish()
        if not path.is_absolute():
            raise SettingError(f"{section.where}: unix is one absolute path")
        return [UnixUpstream(path)]
    last = _range_end(section, notes, ranges=ranges)
    target = _endpoint(section, notes, default_host=None)
    if target.port == 0:
        raise SettingError(f"{section.where}: port 0 is no target")
    if not _is_ipv4(target.host):
        notes.add(
            NoteKind.VERSION, section.where,
            "a name or IPv6 address here is refused by TNG 2.7 and later",
        )  # fmt: skip
    end = target.port if last is None else last
    if end - target.port >= MAX_RULES:
        raise SettingError(f"{section.where}: at most {MAX_RULES} ports")
    return [TcpUpstream(target.host, port) for port in range(target.port, end + 1)]


def _range_end(section: Section, notes: Notes, *, ranges: bool) -> int | None:
    if not section.has("port_end"):
        return None
    if not ranges:
        # TNG drops it silently in the short form and serves the first port only.
        notes.add(
            NoteKind.IGNORED, section.where, "'port_end' has no effect here; write it in rules"
        )
        return None
    first, last = _port(section, "port"), _port(section, "port_end")
    if last < first:
        raise SettingError(f"{section.where}: port_end {last} is below port {first}")
    return last


def _is_ipv4(host: str) -> bool:
    try:
        ipaddress.IPv4Address(host)
    except ValueError:
        return False
    return True


def _endpoint(section: Section, notes: Notes, *, default_host: str | None) -> Endpoint:
    """An endpoint of a mapping, where TNG ignores unknown keys."""
    host, port = section.text("host", default_host), _port(section, "port")
    notes.ignore_unknown(section)
    return _checked(section, host, port)


def parse_endpoint(section: Section, *, default_host: str | None) -> Endpoint:
    """``{"host", "port"}``, read and closed.

    Raises:
        SettingError: the host is none, or the port is out of range.
    """
    host = section.text("host", default_host)
    port = _port(section, "port")
    section.finish()
    return _checked(section, host, port)


def _checked(section: Section, host: str, port: int) -> Endpoint:
    if not host or len(host) > 253 or not host.isprintable() or " " in host or "/" in host:
        raise SettingError(f"{section.where}: host {host!r} is not a name or address")
    return Endpoint(host, port)


def _port(section: Section, name: str) -> int:
    return section.integer(name, least=0, most=65535, unit="(a port)")


def is_loopback(host: str) -> bool:
    """Whether a host of the configuration is this machine's loopback."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
