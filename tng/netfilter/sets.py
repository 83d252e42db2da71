"""Kernel address sets of ``ipset``, as the elements of nftables sets.

nftables cannot refer to a set of ``ipset``, so its members are copied, and copied again while the
gateway runs (``capture.REFRESH_S``).
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from cai.errors import SettingError

MAX_MEMBERS = 65536
"""Most members of one set (the default ``maxelem`` of ipset)."""

_TYPES = ("hash:ip", "hash:net")


@dataclass(frozen=True, slots=True)
class AddressSet:
    """A set of addresses of one family.

    Attributes:
        version: 4 or 6.
        members: addresses and networks in canonical text, sorted.
    """

    version: int
    members: tuple[str, ...]


def parse_ipset(name: str, text: str) -> AddressSet:
    """What ``ipset save NAME`` prints.

    Raises:
        SettingError: it is another type of set, or something else.
    """
    lines = [line.split() for line in text.splitlines() if line.strip()]
    if not lines or lines[0][:2] != ["create", name] or len(lines[0]) < 3:
        raise SettingError(f"ipset {name}: ipset told nothing about it")
    if lines[0][2] not in _TYPES:
        raise SettingError(
            f"ipset {name} is of type {lines[0][2]}", hint=f"served are {' and '.join(_TYPES)}"
        )
    version = 6 if "inet6" in lines[0] else 4
    if len(lines) - 1 > MAX_MEMBERS:
        raise SettingError(f"ipset {name} has more than {MAX_MEMBERS} members")
    members = set()
    for line in lines[1:]:
        if len(line) < 3 or line[:2] != ["add", name] or "nomatch" in line:
            raise SettingError(f"ipset {name}: a member cannot be copied: {' '.join(line)[:80]!r}")
        try:
            network = ipaddress.ip_network(line[2], strict=False)
        except ValueError as error:
            raise SettingError(f"ipset {name}: {line[2][:80]!r} is not an address") from error
        if network.version != version:
            raise SettingError(f"ipset {name}: {line[2]} is of another family")
        members.add(network)
    ordered = sorted(members, key=lambda net: (int(net.network_address), net.prefixlen))
    return AddressSet(version, tuple(str(network) for network in ordered))
