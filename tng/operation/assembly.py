"""From a configuration to its parts: which dialect, which acceptor, which backend an entry has."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from cai.attest.agent_client import ChannelAgent
from cai.errors import SettingError
from tng.config.addresses import Rule
from tng.config.entries import Egress, Ingress
from tng.config.modes import HttpProxy, Socks5
from tng.config.transport import RatsTls
from tng.egress.raw import RawBackend
from tng.egress.sessions import SessionEgress
from tng.operation.journal import Journal
from tng.peers.pool import SessionPeers
from tng.streams import Acceptor, Backend, Peers

Own = Callable[[], Iterable[tuple[str, int]]]
"""Gives the addresses that this process listens on."""


def make_peers(entry: Ingress, journal: Journal, own: Own) -> Peers:
    """The attested peers of an ingress, in its dialect.

    Raises:
        SettingError: the entry asks for something that is not in this version.
        CaiError: a file that it names is missing or malformed.
    """
    if not isinstance(entry.transport, RatsTls):
        raise _not_yet(entry.name, "ohttp")
    if entry.trust.attest is not None:
        raise _not_yet(entry.name, "attest (a client that proves itself)")
    if entry.trust.verify is None:
        raise _not_yet(entry.name, "no_ra")
    mode = entry.mode
    return SessionPeers(
        entry.name,
        entry.trust.verify,
        filters=mode.filters if isinstance(mode, (HttpProxy, Socks5)) else (),
        padding=entry.padding,
        journal=journal,
        own=own,
    )


def make_acceptor(entry: Egress, journal: Journal, agent: ChannelAgent | None) -> Acceptor:
    """The egress's end of its dialect.

    Raises:
        SettingError: the entry asks for something that is not in this version.
    """
    if not isinstance(entry.transport, RatsTls):
        raise _not_yet(entry.name, "ohttp")
    if entry.trust.verify is not None:
        raise _not_yet(entry.name, "verify (demanding proof of clients)")
    if entry.trust.attest is None:
        raise _not_yet(entry.name, "no_ra")
    if entry.direct:
        raise _not_yet(entry.name, "direct_forward")
    return SessionEgress(
        entry.name, entry.trust.attest, padding=entry.padding, journal=journal, agent=agent
    )


def make_backend(entry: Egress, rule: Rule, journal: Journal) -> Backend:
    """Where the streams of one listening port end."""
    if len(rule.targets) > 1:
        raise _not_yet(entry.name, "several targets")
    return RawBackend(rule.targets[0], journal, entry.unsafe)


def _not_yet(name: str, what: str) -> SettingError:
    return SettingError(f"{name}: {what} is not in this version")
