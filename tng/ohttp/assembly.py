"""From a configuration to the parts of OHTTP."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from cai.errors import SettingError
from tng.config.entries import Egress, Ingress
from tng.config.modes import HttpProxy, Socks5
from tng.config.transport import OhttpClient, OhttpServer
from tng.config.trust import BuiltinVerify, ServiceVerify
from tng.ohttp.acceptor import OhttpAcceptor
from tng.ohttp.attester import Attester
from tng.ohttp.judge import KeyJudge, demand_key_binding
from tng.ohttp.peers import OhttpPeers
from tng.operation.journal import Journal
from tng.peers.references import References


def make_ohttp_peers(
    entry: Ingress, journal: Journal, own: Callable[[], Iterable[tuple[str, int]]]
) -> OhttpPeers:
    """The peers of an ingress with ``ohttp``.

    Raises:
        SettingError: the entry asks for what OHTTP cannot give.
        CaiError: a file that it names is missing or malformed.
    """
    settings, verify, attest = entry.transport, entry.trust.verify, entry.trust.attest
    assert isinstance(settings, OhttpClient)  # noqa: S101 - by the caller
    if verify is not None:
        demand_key_binding(entry.name, verify)
    return OhttpPeers(
        entry.name,
        settings,
        KeyJudge(verify, References.load(verify) if isinstance(verify, BuiltinVerify) else None),
        Attester(attest) if attest else None,
        filters=entry.mode.filters if isinstance(entry.mode, (HttpProxy, Socks5)) else (),
        journal=journal,
        own=own,
        unsafe=entry.unsafe,
    )


def make_ohttp_acceptor(entry: Egress, journal: Journal) -> OhttpAcceptor:
    """The egress's end of OHTTP.

    Raises:
        SettingError: the entry asks for something that is not in this version.
        CaiError: a file that it names is missing or malformed.
    """
    settings, verify = entry.transport, entry.trust.verify
    assert isinstance(settings, OhttpServer)  # noqa: S101 - by the caller
    if verify is not None:
        demand_key_binding(entry.name, verify)
        if not isinstance(verify, ServiceVerify):
            raise SettingError(
                f"{entry.name}: clients that prove themselves over ohttp need an attestation "
                "service",
                hint="give verify.as_addr, or use the default transport",
            )
    return OhttpAcceptor(
        entry.name, settings, entry.trust.attest, verify, journal, entry.direct
    )
