"""Which addresses may connect at all: asked before the handshake, which a stranger is not worth."""

from __future__ import annotations

import ipaddress

from cai.errors import Refused
from tng.config.guard import Guard


class AddressRefused(Refused):
    """A connection from an address that may not connect."""

    code = "address-refused"


def may_connect(guard: Guard, peer: object) -> bool:
    """Whether a connection from this socket address is taken.

    Args:
        guard: with ``allow`` and ``deny``; what is denied is denied, allowed or not.
        peer: as the socket tells it; a Unix socket's passes where nothing is listed.
    """
    if not guard.allow and not guard.deny:
        return True
    if not isinstance(peer, tuple) or not peer:
        return not guard.allow
    try:
        address = ipaddress.ip_address(str(peer[0]).partition("%")[0])
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        # A listener of both families sees IPv4 clients in this form.
        address = address.ipv4_mapped
    if any(address in network for network in guard.deny):
        return False
    return not guard.allow or any(address in network for network in guard.allow)
