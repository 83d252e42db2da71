"""Addresses in the configuration: what is listened on, what is led to, and mapping rules."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cai.errors import SettingError
from cai.settings import Section

MAX_RULES = 256
"""Most listeners of one mapping."""


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


def parse_rules(body: Section) -> list[tuple[Endpoint, Upstream]]:
    """Both forms of a mapping: ``rules`` and the single pair; port ranges become single ports.

    Raises:
        SettingError: a rule is malformed, or two of them listen on the same address.
    """
    if body.has("rules"):
        if body.has("in") or body.has("out"):
            raise SettingError(f"{body.where}: give rules, or in and out, not both")
        raw = body.raw("rules")
        if not isinstance(raw, list) or not raw:
            raise SettingError(f"{body.where}: rules must be a list of at least one rule")
        sections = [
            Section(rule, where=f"{body.where}.rules[{index}]") for index, rule in enumerate(raw)
        ]
        body.finish()
    else:
        sections = [body]
    rules: list[tuple[Endpoint, Upstream]] = []
    for section in sections:
        rules += _rule(section)
        section.finish()
    listens = [listen for listen, _target in rules if listen.port]
    if len(rules) > MAX_RULES:
        raise SettingError(f"{body.where}: {len(rules)} ports, at most {MAX_RULES}")
    if len(set(listens)) != len(listens):
        raise SettingError(f"{body.where}: two rules listen on the same address")
    return rules


def _rule(section: Section) -> list[tuple[Endpoint, Upstream]]:
    inside, outside = section.section("in"), section.section("out")
    if inside is None or outside is None:
        raise SettingError(f"{section.where}: a rule has in and out")
    in_last = _port(inside, "port_end") if inside.has("port_end") else None
    listen = parse_endpoint(inside, default_host="0.0.0.0")  # noqa: S104 - TNG's default for mappings
    if outside.has("unix"):
        path = Path(outside.text("unix"))
        outside.finish()
        if in_last is not None or not path.is_absolute():
            raise SettingError(f"{outside.where}: unix is one absolute path for one port")
        return [(listen, UnixUpstream(path))]
    out_last = _port(outside, "port_end") if outside.has("port_end") else None
    target = parse_endpoint(outside, default_host=None)
    if target.port == 0:
        raise SettingError(f"{outside.where}: port 0 is no target")
    return list(_ranges(section, listen, in_last, target, out_last))


def _ranges(
    section: Section, listen: Endpoint, in_last: int | None, target: Endpoint, out_last: int | None
) -> list[tuple[Endpoint, Upstream]]:
    count = (in_last if in_last is not None else listen.port) - listen.port + 1
    out_count = (out_last if out_last is not None else target.port) - target.port + 1
    if not 1 <= count <= MAX_RULES or count != out_count or (count > 1 and not listen.port):
        raise SettingError(f"{section.where}: port ranges of in and out must have the same size")
    return [
        (Endpoint(listen.host, listen.port + step), TcpUpstream(target.host, target.port + step))
        for step in range(count)
    ]


def parse_endpoint(section: Section, *, default_host: str | None) -> Endpoint:
    """``{"host", "port"}``, read and closed.

    Raises:
        SettingError: the host is none, or the port is out of range.
    """
    host = section.text("host", default_host)
    port = _port(section, "port")
    section.finish()
    if not host or len(host) > 253 or not host.isprintable() or " " in host or "/" in host:
        raise SettingError(f"{section.where}: host {host!r} is not a name or address")
    return Endpoint(host, port)


def _port(section: Section, name: str) -> int:
    return section.integer(name, least=0, most=65535, unit="(a port)")
