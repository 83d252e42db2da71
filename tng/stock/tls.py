"""TLS 1.3 as RATS-TLS uses it: any certificate passes the handshake, and is judged right after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from OpenSSL import SSL

from tng.channel.tls import NoCommonProtocol, new_context
from tng.stock.certificate import Identity

RAW: Final = b"rats-tls"
"""ALPN of one connection for each stream."""

MULTIPLEX: Final = b"h2"
"""ALPN of many streams in one connection."""

NO_PROTOCOL: Final = b""
"""A client that sends no ALPN is let in by stock TNG, as ``rats-tls``."""


def server_context(identity: Identity, *, demand: bool) -> SSL.Context:
    """The context of an egress.

    Args:
        identity: what it presents.
        demand: whether a client must present a certificate too.
    """
    context = new_context()
    _install(context, identity)
    context.set_alpn_select_callback(_select)
    if demand:
        # Self-signed by design: what it says is judged after the handshake.
        context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT, _any)
    return context


def client_context(identity: Identity | None, protocols: Sequence[bytes]) -> SSL.Context:
    """The context of an ingress; ``identity`` is what it presents when it is asked."""
    context = new_context()
    context.set_alpn_protos(list(protocols))
    if identity is not None:
        _install(context, identity)
    return context


def _install(context: SSL.Context, identity: Identity) -> None:
    context.use_privatekey(identity.key)
    context.use_certificate(identity.certificate)


def _any(_connection: SSL.Connection, _certificate: object, *_rest: object) -> bool:
    return True


def _select(_connection: SSL.Connection, offered: Sequence[bytes]) -> bytes:
    for name in (RAW, MULTIPLEX):
        if name in offered:
            return name
    raise NoCommonProtocol
