"""nftables rules as text: what is captured, and what is dropped when nothing captures it.

Two tables. ``cai_tng_<id>`` turns connections to the gateway's listener; an orderly stop takes it
away, a crash leaves it, and then it leads to a closed port. ``cai_guard`` drops what would pass in
clear otherwise (decisions §7, Fail closed at the port); only a deliberate removal takes it away.

Names, networks and ports have been parsed before they come here, so no text of a configuration
reaches the kernel's parser unchecked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tng.config.modes import Capture, Netfilter
from tng.netfilter.sets import AddressSet

GUARD = "cai_guard"
"""The table that stays."""

CAPTURE = "cai_tng_"
"""Prefix of the tables that an orderly stop takes away."""

BEFORE_NAT = -110
"""Priority of the capture: before Docker and others translate addresses (dstnat is -100)."""

GUARD_PRIORITY = -5
"""Priority of the guard: after address translation, before ordinary filters."""

_VIRTUAL = ("bridge", "veth")
"""Kinds of interfaces that lead to containers of this machine."""


@dataclass(frozen=True, slots=True)
class Cgroup:
    """A cgroup v2 directory: its path below the root, and its depth."""

    path: str
    level: int

    @property
    def match(self) -> str:
        """Sockets of its processes."""
        return f'socket cgroupv2 level {self.level} "{self.path}"'


@dataclass(frozen=True, slots=True)
class Entry:
    """One netfilter entry, ready to be written as rules.

    Attributes:
        name: ``ingress[N]`` or ``egress[N]``.
        mode: what is captured.
        egress: whether it guards a service of this machine.
        port: of the gateway's listener; 0 while it is not known.
        cgroups: only these, if there are any.
        not_cgroups: never these.
        sets: members of the sets that ``mode`` names.
    """

    name: str
    mode: Netfilter
    egress: bool
    port: int = 0
    cgroups: tuple[Cgroup, ...] = ()
    not_cgroups: tuple[Cgroup, ...] = ()
    sets: Mapping[str, AddressSet] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Stable through restarts of the same configuration; letters and digits."""
        text = repr((self.name, self.mode))
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def capture_table(entries: Iterable[Entry]) -> str:
    """Name of the capture table of a configuration."""
    joined = "".join(entry.key for entry in entries)
    return CAPTURE + hashlib.sha256(joined.encode()).hexdigest()[:12]


def capture_rules(entries: tuple[Entry, ...], marks: frozenset[int]) -> str:
    """The whole capture table; an older one of the same configuration is replaced at once."""
    table = capture_table(entries)
    body = [line for entry in entries for line in _sets(entry)]
    for entry in entries:
        for hook in ("prerouting", "output"):
            rules = _capturing(entry, hook)
            if not rules:
                continue
            own = [f"meta mark {_marks(marks)} return"]
            own += ['iifname "lo" return'] if hook == "prerouting" else []
            body += [
                f"chain {hook}_{entry.key} {{",
                f"type nat hook {hook} priority {BEFORE_NAT}; policy accept;",
                *own, *rules, "}",
            ]  # fmt: skip
    lines = [f"add table inet {table}", f"delete table inet {table}", f"table inet {table} {{"]
    return "\n".join([*lines, *body, "}"]) + "\n"


def guard_rules(entries: tuple[Entry, ...], marks: frozenset[int]) -> str:
    """The guard's chains for these entries; those of other gateways stay as they are."""
    lines = [f"add table inet {GUARD}"]
    for entry in entries:
        hooks = ("input", "forward") if entry.egress else ("output", "forward")
        lines += _guard_sets(entry)
        for hook in hooks:
            chain = f"inet {GUARD} {hook}_{entry.key}"
            base = f"type filter hook {hook} priority {GUARD_PRIORITY}; policy accept;"
            lines += [f"add chain {chain} {{ {base} }}", f"flush chain {chain}"]
            rules = [*_passing(entry, hook, marks), *_dropping(entry, hook)]
            lines += [f"add rule {chain} {rule}" for rule in rules]
    return "\n".join(lines) + "\n"


def port_guard(ports: Iterable[int], mark: int) -> str:
    """A guard of bare ports, for a backend behind a ``mapping``."""
    entries = tuple(
        Entry(f"port {port}", Netfilter((Capture(first_port=port, last_port=port),)), egress=True)
        for port in ports
    )
    return guard_rules(entries, frozenset({mark}))


def _capturing(entry: Entry, hook: str) -> list[str]:
    if hook == "output" and entry.egress and not entry.mode.local:
        return []
    if hook == "prerouting" and not entry.egress and entry.cgroups:
        # What is only passed on belongs to no process of this machine.
        return []
    rules = []
    if hook == "output" or entry.egress:
        rules += [f"{cgroup.match} return" for cgroup in entry.not_cgroups]
    for match in _matches(entry, hook):
        for cgroup in _of_cgroups(entry, hook):
            rules.append(f"{match} {cgroup}redirect to :{entry.port}")
    return rules


def _passing(entry: Entry, hook: str, marks: frozenset[int]) -> list[str]:
    rules = [
        "meta l4proto != { tcp, udp } accept",
        "ct direction reply accept",
        f"meta mark {_marks(marks)} accept",
    ]
    if hook == "input":
        rules.append('iifname "lo" accept')
    if entry.port and hook != "forward":
        rules.append(f"ct status dnat tcp dport {entry.port} accept")
    if hook != "forward":
        rules += [f"{cgroup.match} accept" for cgroup in entry.not_cgroups]
    return rules


def _dropping(entry: Entry, hook: str) -> list[str]:
    if hook == "forward" and entry.cgroups:
        return []
    rules = []
    if hook == "forward" and not entry.egress:
        # Published ports of containers of this machine are no traffic of its clients.
        rules += [
            f'{_not_virtual("iifkind")} meta oifkind "{kind}" ct status dnat accept'
            for kind in _VIRTUAL
        ]
    verdict = "reject with tcp reset" if hook == "output" else "drop"
    for cgroup in _of_cgroups(entry, hook):
        if hook != "output":
            rules += [f"ct status dnat {item} {cgroup}{verdict}" for item in _translated(entry)]
        if hook == "forward" and entry.egress:
            # A container of this guest may ask a service elsewhere on the same port.
            rules += [
                f'meta iifkind "{kind}" {_not_virtual("oifkind")} tcp dport {_ports(item)} accept'
                for item in entry.mode.capture
                for kind in _VIRTUAL
                if item.network is None and item.ipset is None
            ]
        rules += [f"{match} {cgroup}{verdict}" for match in _matches(entry, hook)]
        # Nothing of UDP is carried: HTTP/3 to the same port would be a way past the gateway.
        datagrams = "reject" if hook == "output" else "drop"
        rules += [
            f"{match.replace('tcp dport', 'udp dport')} {cgroup}{datagrams}"
            for match in _matches(entry, hook)
            if "tcp dport" in match
        ]
    return rules


def _not_virtual(which: str) -> str:
    return " ".join(f'meta {which} != "{kind}"' for kind in _VIRTUAL)


def _of_cgroups(entry: Entry, hook: str) -> list[str]:
    if hook == "forward" or not entry.cgroups:
        return [""]
    return [f"{cgroup.match} " for cgroup in entry.cgroups]


def _matches(entry: Entry, hook: str) -> list[str]:
    """One match a capture rule, on the packet as it is at a hook."""
    found = []
    for item in entry.mode.capture or (Capture(),):
        port = f"tcp dport {_ports(item)}" if item.first_port is not None else "meta l4proto tcp"
        if item.network is not None or item.ipset is not None:
            found.append(f"{_address(entry, item)} {port}")
        elif hook == "prerouting" or (hook == "output" and entry.egress):
            found.append(f"fib daddr type {'' if entry.egress else '!= '}local {port}")
        else:
            found.append(port)
    return found


def _translated(entry: Entry) -> list[str]:
    """Matches on the destination that a client dialled before somebody translated it."""
    found = []
    for item in entry.mode.capture:
        # nft knows the type of the port only where the protocol has been named.
        port = (
            f"meta l4proto tcp ct original proto-dst {_ports(item)}"
            if item.first_port is not None
            else ""
        )
        if item.network is not None or item.ipset is not None:
            found.append(f"ct original {_address(entry, item)} {port}".strip())
        elif port and entry.egress:
            found.append(port)
    return found


def _address(entry: Entry, item: Capture) -> str:
    if item.network is not None:
        family = "ip" if item.network.version == 4 else "ip6"
        return f"{family} daddr {item.network}"
    assert item.ipset is not None  # noqa: S101 - asked before
    family = "ip" if entry.sets[item.ipset].version == 4 else "ip6"
    return f"{family} daddr @{_set_name(entry, item.ipset)}"


def _ports(item: Capture) -> str:
    first, last = item.first_port, item.last_port
    return str(first) if first == last else f"{first}-{last}"


def _set_name(entry: Entry, name: str) -> str:
    return f"s{hashlib.sha256(name.encode()).hexdigest()[:8]}_{entry.key}"


def _sets(entry: Entry) -> list[str]:
    return [
        f"set {_set_name(entry, name)} {{ type {_type(found)}; flags interval; auto-merge; "
        f"{_elements(found)} }}"
        for name, found in entry.sets.items()
    ]


def _guard_sets(entry: Entry) -> list[str]:
    lines = []
    for name, found in entry.sets.items():
        place = f"inet {GUARD} {_set_name(entry, name)}"
        lines.append(f"add set {place} {{ type {_type(found)}; flags interval; auto-merge; }}")
        lines.append(f"flush set {place}")
        if found.members:
            lines.append(f"add element {place} {{ {', '.join(found.members)} }}")
    return lines


def _type(found: AddressSet) -> str:
    return "ipv4_addr" if found.version == 4 else "ipv6_addr"


def _elements(found: AddressSet) -> str:
    return f"elements = {{ {', '.join(found.members)} }};" if found.members else ""


def _marks(marks: frozenset[int]) -> str:
    return "{ " + ", ".join(str(mark) for mark in sorted(marks)) + " }"
