"""From a configuration to its parts: which dialect, which acceptor, which backend an entry has."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from cai.attest.agent_client import ChannelAgent
from cai.errors import SettingError
from tng.config.addresses import Rule
from tng.config.entries import Egress, Ingress
from tng.config.modes import HttpProxy, Socks5
from tng.config.transport import RatsTls
from tng.config.trust import Binding, BuiltinVerify, ServiceVerify, Verify
from tng.egress.listener import EgressListener
from tng.egress.raw import RawBackend
from tng.egress.sessions import SessionEgress
from tng.egress.upstreams import Probe, Upstreams
from tng.guard.backend import GuardBackend
from tng.guard.desk import BootKeys, Desk
from tng.ohttp.assembly import make_ohttp_acceptor, make_ohttp_peers
from tng.operation.journal import Journal
from tng.operation.timed import TimedAgent, TimedJudge
from tng.peers.appraised import ServiceJudge
from tng.peers.auto import AutoPeers
from tng.peers.judge import BuiltinJudge
from tng.peers.pool import SessionJudge, SessionPeers
from tng.peers.references import References
from tng.stock.acceptor import StockAcceptor
from tng.stock.identity import IdentityKeeper
from tng.stock.judge import CertificateJudge
from tng.stock.peers import NoJudge, StockPeers
from tng.stock.service import AppraisalService, TrustedRoots
from tng.streams import Acceptor, Backend, Peers

Own = Callable[[], Iterable[tuple[str, int]]]
"""Gives the addresses that this process listens on."""


def make_peers(
    entry: Ingress, journal: Journal, own: Own, agent: ChannelAgent | None = None
) -> Peers:
    """The attested peers of an ingress, in its dialect.

    Args:
        entry: of the configuration.
        journal: where its lines go.
        own: gives the addresses that this process listens on.
        agent: source of proofs of this end's sessions; by default the entry's own.

    Raises:
        SettingError: the entry asks for something that is not in this version.
        CaiError: a file that it names is missing or malformed.
    """
    if not isinstance(entry.transport, RatsTls):
        return make_ohttp_peers(entry, journal, own)
    mode, verify = entry.mode, entry.trust.verify
    filters = mode.filters if isinstance(mode, (HttpProxy, Socks5)) else ()
    references = References.load(verify) if isinstance(verify, BuiltinVerify) else None
    attest = entry.trust.attest
    ours = _sessions(entry.name, verify) and verify is not None
    stock = StockPeers(
        entry.name,
        CertificateJudge(verify, references) if verify else NoJudge(),
        # Where this end speaks cai/1 too, its stock evidence says so: whoever speaks it as well
        # refuses that evidence over another dialect (decisions §4, Downgrade).
        IdentityKeeper(entry.name, attest, journal, dialect=ours) if attest else None,
        transport=entry.transport,
        filters=filters,
        journal=journal,
        own=own,
        unsafe=entry.unsafe,
    )
    if verify is None or not ours:
        return stock
    session = SessionPeers(
        entry.name,
        TimedJudge(_session_judge(verify, references), entry.name, journal.meters),
        filters=filters,
        padding=entry.padding,
        journal=journal,
        own=own,
        agent=TimedAgent(agent or ChannelAgent(attest.socket), entry.name, journal.meters)
        if attest
        else None,
    )
    if verify.binding is Binding.SESSION:
        return session
    service = verify if isinstance(verify, ServiceVerify) else None
    return AutoPeers(session, stock, filters=filters, own=own, service=service)


def _sessions(name: str, verify: Verify | None) -> bool:
    """Whether an end with this ``verify`` speaks our dialect.

    Raises:
        SettingError: it must, and cannot.
    """
    if verify is None:
        return True
    if isinstance(verify, ServiceVerify) and not verify.as_addr:
        if verify.binding is Binding.SESSION:
            raise SettingError(
                f"{name}: a session's evidence is appraised by a service",
                hint="give verify.as_addr, or binding: key for passports",
            )
        return False
    return verify.binding is not Binding.KEY


def _session_judge(verify: Verify, references: References | None) -> SessionJudge:
    if isinstance(verify, ServiceVerify):
        service = AppraisalService(verify.as_addr, verify.as_headers)
        return ServiceJudge(verify, service, TrustedRoots(verify, service))
    assert references is not None  # noqa: S101 - built-in verification has loaded them
    return BuiltinJudge(verify, references)


def make_acceptor(entry: Egress, journal: Journal, agent: ChannelAgent | None) -> Acceptor:
    """The egress's end of its dialects.

    Raises:
        SettingError: the entry asks for something that is not in this version.
        CaiError: a file that it names is missing or malformed.
    """
    if not isinstance(entry.transport, RatsTls):
        return make_ohttp_acceptor(entry, journal)
    trust = entry.trust
    verify, judge, client_judge = trust.verify, None, None
    ours = trust.attest is not None and _sessions(entry.name, verify)
    if verify is not None:
        references = References.load(verify) if isinstance(verify, BuiltinVerify) else None
        judge = CertificateJudge(verify, references)
        if ours:
            client_judge = TimedJudge(
                _session_judge(verify, references), entry.name, journal.meters
            )
        if verify.binding is Binding.SESSION and not ours:
            raise SettingError(
                f"{entry.name}: a client proves its session only to an egress that proves itself",
                hint="give attest as well, or binding: key",
            )
    session = None
    if trust.attest is not None and ours:
        session = SessionEgress(
            trust.attest,
            padding=entry.padding,
            journal=journal,
            agent=TimedAgent(
                agent or ChannelAgent(trust.attest.socket), entry.name, journal.meters
            ),
            judge=client_judge,
        )
    only_session = verify is not None and verify.binding is Binding.SESSION
    if agent is not None or only_session:
        return EgressListener(entry.name, trust, session, None, journal)
    keeper = IdentityKeeper(entry.name, trust.attest, journal, dialect=session is not None)
    stock = StockAcceptor(entry.name, keeper, judge, journal)
    return EgressListener(entry.name, trust, session, stock, journal)


def make_desk(entry: Egress, keys: BootKeys) -> Desk | None:
    """What decides over the requests of an egress; ``None`` where it relays bytes as they are."""
    return Desk(entry.guard, keys) if entry.guard else None


def make_backend(entry: Egress, rule: Rule, journal: Journal, desk: Desk | None) -> Backend:
    """Where the streams of one listening port end (inside a running loop)."""
    if desk is None:
        return RawBackend(Upstreams(entry.name, rule.targets, journal), journal, entry.unsafe)
    guard = desk.guard
    probe = Probe(guard.health_path, guard.health_interval_s) if guard.health_path else None
    upstreams = Upstreams(entry.name, rule.targets, journal, probe=probe)
    upstreams.start()
    return GuardBackend(entry.name, desk, upstreams, journal, entry.unsafe)


def _not_yet(name: str, what: str) -> SettingError:
    return SettingError(f"{name}: {what} is not in this version")
