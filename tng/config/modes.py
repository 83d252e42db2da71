"""The modes of TNG: where connections come in, and where they go."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from cai.errors import SettingError
from cai.settings import Section
from tng.config.addresses import Endpoint, Rule, parse_endpoint, parse_rules
from tng.config.filters import Filter, Network, parse_filters
from tng.config.notes import NoteKind, Notes

DEFAULT_SO_MARK = 565
"""Mark of the gateway's own sockets, so that they are not captured again (TNG's default)."""

MAX_CAPTURES = 256
"""Most capture rules of one entry."""

_IPSET = re.compile(r"[A-Za-z0-9_.:-]{1,31}", re.ASCII)


@dataclass(frozen=True, slots=True)
class HttpProxy:
    """An HTTP proxy for clients of this machine.

    Attributes:
        listen: where.
        filters: what may be asked for; empty is everything.
        direct: what no filter matches goes out in clear (``on_mismatch: direct``).
    """

    listen: Endpoint
    filters: tuple[Filter, ...]
    direct: bool = False


@dataclass(frozen=True, slots=True)
class Socks5:
    """A SOCKS5 proxy; ``login`` is (user, password) or ``None``."""

    listen: Endpoint
    filters: tuple[Filter, ...]
    direct: bool = False
    login: tuple[str, str] | None = None

    def __repr__(self) -> str:
        return f"Socks5({self.listen}, login={'set' if self.login else 'none'})"


@dataclass(frozen=True, slots=True)
class Mapping:
    """Ports that lead to fixed targets."""

    rules: tuple[Rule, ...]


@dataclass(frozen=True, slots=True)
class Capture:
    """Which connections are captured; a member that is ``None`` matches any.

    Attributes:
        network: destination addresses.
        ipset: or the name of a kernel set of them.
        first_port: lowest destination port.
        last_port: highest.
    """

    network: Network | None = None
    ipset: str | None = None
    first_port: int | None = None
    last_port: int | None = None


@dataclass(frozen=True, slots=True)
class Netfilter:
    """Transparent capture by the kernel's packet filter.

    Attributes:
        capture: destinations.
        cgroups: only processes of these; empty is all.
        not_cgroups: never processes of these.
        listen_port: the gateway's own port, or ``None`` for a free one.
        so_mark: mark of its own sockets.
        local: also connections that start on this machine (egress).
    """

    capture: tuple[Capture, ...]
    cgroups: tuple[str, ...] = ()
    not_cgroups: tuple[str, ...] = ()
    listen_port: int | None = None
    so_mark: int = DEFAULT_SO_MARK
    local: bool = False


@dataclass(frozen=True, slots=True)
class NotServed:
    """A mode of TNG that this gateway reads but does not do."""

    mode: str


IngressMode = HttpProxy | Socks5 | Mapping | Netfilter | NotServed
EgressMode = Mapping | Netfilter | NotServed

INGRESS = ("mapping", "http_proxy", "socks5", "netfilter", "hook", "mapping_udp", "netfilter_udp")
EGRESS = ("mapping", "netfilter", "hook", "mapping_udp", "netfilter_udp")


def parse_ingress_mode(entry: Section, notes: Notes) -> IngressMode:
    """The one mode of an ``add_ingress`` entry.

    Raises:
        SettingError: none, more than one, or something of another shape.
    """
    name, body = _body(entry, INGRESS)
    if name == "http_proxy":
        listen = _proxy_listen(body, notes)
        filters, direct = _filters(body, notes, one_or_list=True)
        notes.ignore_unknown(body)
        return HttpProxy(listen, filters, direct)
    if name == "socks5":
        listen = _proxy_listen(body, notes)
        filters, direct = _filters(body, notes, one_or_list=False)
        login = _login(body.section("auth"), notes)
        notes.ignore_unknown(body)
        return Socks5(listen, filters, direct, login)
    if name == "mapping":
        return Mapping(parse_rules(body, notes))
    if name == "netfilter":
        mode = _netfilter(body, local=False)
        notes.ignore_unknown(body)
        return mode
    return _not_served(name, body, notes)


def parse_egress_mode(entry: Section, notes: Notes) -> EgressMode:
    """The one mode of an ``add_egress`` entry.

    Raises:
        SettingError: none, more than one, or something of another shape.
    """
    name, body = _body(entry, EGRESS)
    if name == "mapping":
        return Mapping(parse_rules(body, notes))
    if name == "netfilter":
        mode = _netfilter(body, local=body.flag("capture_local_traffic", default=False))
        body.finish()
        return mode
    return _not_served(name, body, notes)


def _body(entry: Section, modes: tuple[str, ...]) -> tuple[str, Section]:
    found = [name for name in modes if entry.has(name)]
    if len(found) != 1:
        raise SettingError(
            f"{entry.where}: {'more than one mode' if found else 'no mode'}",
            hint=f"give exactly one of: {', '.join(modes)}",
        )
    body = entry.section(found[0])
    assert body is not None  # noqa: S101 - it has been found
    return found[0], body


def _proxy_listen(body: Section, notes: Notes) -> Endpoint:
    section = body.section("proxy_listen")
    if section is None:
        raise SettingError(f"{body.where}: proxy_listen is missing", hint='give {"port": 41000}')
    if not section.has("host"):
        notes.add(
            NoteKind.VERSION, section.where,
            "listens on loopback; TNG would listen on every interface",
        )  # fmt: skip
    # Stock TNG listens on every interface by default; an open proxy is never meant.
    return parse_endpoint(section, default_host="127.0.0.1")


def _filters(
    body: Section, notes: Notes, *, one_or_list: bool
) -> tuple[tuple[Filter, ...], bool]:
    if body.holds("dst_filters") and body.holds("dst_filter"):
        raise SettingError(f"{body.where}: dst_filters and dst_filter are the same setting")
    name = "dst_filter" if body.holds("dst_filter") else "dst_filters"
    raw = body.raw(name)
    if body.holds(name) and raw is None:
        raise SettingError(f"{body.where}: {name} is null", hint="leave it out, or give a list")
    if not one_or_list and raw is not None and not isinstance(raw, list):
        raise SettingError(f"{body.where}: {name} must be a list here")
    filters = parse_filters(raw, where=f"{body.where}.{name}", notes=notes)
    mismatch = body.text("on_mismatch", "reject")
    if mismatch not in ("reject", "direct"):
        raise SettingError(
            f"{body.where}: on_mismatch is {mismatch!r}, expected 'reject' or 'direct'"
        )
    if mismatch == "direct":
        notes.add(NoteKind.CLEAR, body.where, "what no filter matches goes out in clear")
    elif filters:
        notes.add(
            NoteKind.VERSION, body.where,
            "what no filter matches is refused; TNG would send it in clear",
        )  # fmt: skip
    return filters, mismatch == "direct"


def _login(section: Section | None, notes: Notes) -> tuple[str, str] | None:
    if section is None:
        return None
    login = section.text("username"), section.text("password")
    notes.ignore_unknown(section)
    # RFC 1929: one length byte each.
    if not all(1 <= len(part.encode("utf-8", "replace")) <= 255 for part in login):
        raise SettingError(f"{section.where}: name and password have 1 to 255 bytes each")
    return login


def _netfilter(body: Section, *, local: bool) -> Netfilter:
    raw = body.raw("capture_dst")
    items = raw if isinstance(raw, list) else [] if raw is None else [raw]
    if len(items) > MAX_CAPTURES:
        raise SettingError(f"{body.where}: at most {MAX_CAPTURES} capture_dst")
    captures = tuple(
        _capture(Section(item, where=f"{body.where}.capture_dst[{index}]"))
        for index, item in enumerate(items)
    )
    cgroups = tuple(body.texts("capture_cgroup", []))
    if not captures and not cgroups:
        raise SettingError(
            f"{body.where}: nothing to capture", hint="give capture_dst or capture_cgroup"
        )
    listen = body.has("listen_port")
    return Netfilter(
        captures,
        cgroups,
        tuple(body.texts("nocapture_cgroup", [])),
        body.integer("listen_port", least=0, most=65535, unit="(a port)") if listen else None,
        body.integer("so_mark", DEFAULT_SO_MARK, least=1, most=2**32 - 1, unit="(a mark)"),
        local,
    )


def _capture(section: Section) -> Capture:
    network: Network | None = None
    ipset = section.text("ipset", "") or None
    if section.has("host"):
        try:
            network = ipaddress.ip_network(section.text("host"), strict=True)
        except ValueError as error:
            raise SettingError(f"{section.where}: host: {error}") from error
        if ipset is not None:
            raise SettingError(f"{section.where}: host and ipset exclude each other")
    if ipset is not None and not _IPSET.fullmatch(ipset):
        raise SettingError(f"{section.where}: ipset {ipset!r} is not the name of a set")
    first = last = None
    if section.has("port"):
        first = last = section.integer("port", least=0, most=65535, unit="(a port)")
        if section.has("port_end"):
            last = section.integer("port_end", least=first, most=65535, unit="(a port)")
    elif section.has("port_end"):
        raise SettingError(f"{section.where}: port_end needs port")
    section.finish()
    if network is None and ipset is None and first is None:
        raise SettingError(f"{section.where}: give host, ipset or port")
    return Capture(network, ipset, first, last)


def _not_served(name: str, body: Section, notes: Notes) -> NotServed:
    if name == "hook":
        _hook(body)
        instead = "`tng exec -- COMMAND` sets the proxy variables instead"
        notes.refuse(body.where, "hooking a program by LD_PRELOAD", instead)
    else:
        _udp(name, body, notes)
        notes.refuse(body.where, "carrying UDP", "use a TCP mode")
    return NotServed(name)


def _hook(body: Section) -> None:
    for key in ("capture_dst", "capture_listen"):
        raw = body.raw(key)
        for index, item in enumerate(raw if isinstance(raw, list) else [raw] if raw else []):
            rule = Section(item, where=f"{body.where}.{key}[{index}]")
            rule.integer("port", least=0, most=65535, unit="(a port)")
            for name in ("port_end", "redirect_to_port", "redirect_to_port_end"):
                if rule.has(name):
                    rule.integer(name, least=0, most=65535, unit="(a port)")
            rule.text("host", "")
            rule.text("ifname", "")
            rule.finish()
    body.raw("proxy_port")
    body.raw("proxy_listen")
    body.flag("capture_local_traffic", default=False)
    body.finish()


def _udp(name: str, body: Section, notes: Notes) -> None:
    if body.has("idle_timeout_secs"):
        body.integer("idle_timeout_secs", least=0, most=2**63, unit="seconds")
    if name == "mapping_udp":
        for side in ("in", "out"):
            section = body.section(side)
            if section is None:
                raise SettingError(f"{body.where}: {side} is missing")
            parse_endpoint(section, default_host="0.0.0.0")  # noqa: S104 - only read
        body.finish()
        return
    _netfilter(body, local=body.flag("capture_local_traffic", default=False))
    notes.ignore_unknown(body)


