"""Proofs of sessions: what one session proves is worth nothing in another."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from hashlib import sha256

import pytest
from OpenSSL import SSL

from cai import merkle
from cai.attest.anchors import simulated_anchors
from cai.attest.channel import ChannelEvidence, Expectation, Role, verify_channel
from cai.attest.policy import VerificationPolicy
from cai.attest.tdx.collateral import load_collateral
from cai.attest.verdict import Verdict
from cai.errors import CaiError, FormatError, PeerError, PeerWithoutEvidence
from tests.tng.gateways import FakeAgent, World
from tng.channel.handshake import (
    EXPORTER_LABEL,
    Claim,
    SessionProver,
    SessionVerifier,
    exporter_context,
)
from tng.channel.tls import ALPN, ChannelKey, TlsSession, client_context, server_context

SPKI = b"the prover's key"
OTHER_SPKI = b"another key"


def session(name: str) -> Callable[[bytes], bytes]:
    """The exporter of a session, equal at both ends."""
    return lambda context: sha256(name.encode() + context).digest()


def ends(
    name: str = "one", role: Role = Role.SERVER, spki: bytes = SPKI
) -> tuple[SessionVerifier, SessionProver]:
    return SessionVerifier(role, session(name), spki), SessionProver(role, session(name), spki)


def run(verifier: SessionVerifier, prover: SessionProver, agent: FakeAgent) -> Claim:
    answer = prover.on_prove(verifier.prove())
    verifier.on_ack(answer.ack)
    return verifier.on_evidence(prover.evidence(agent.evidence([answer.leaf])))


def judge(world: World, claim: Claim) -> Verdict:
    policy = VerificationPolicy.parse(world.policy.read_bytes(), where="policy.toml")
    verdict, _facts = verify_channel(
        claim.evidence,
        claim.leaf,
        subject="guest",
        policy=policy,
        expect=Expectation(),
        anchors=simulated_anchors(world.anchors),
        collateral=load_collateral(world.anchors / "collateral"),
        now=datetime.now(UTC),
    )
    return verdict


def failed(verdict: Verdict) -> set[str]:
    return {item.name for item in verdict.failures}


def test_context_known_answer() -> None:
    """docs/spec-channel.md §11."""
    prove = bytes(range(32)) + bytes(4)
    assert exporter_context(prove, bytes(range(32, 64))).hex() == (
        "fb520e8456d9eacc9dbab543dd218a65e43eb894cacac66c0a54a29af6685b2d"
    )
    assert EXPORTER_LABEL == b"EXPORTER-cai-channel-v1"


def test_prove_bytes_are_nonce_and_number() -> None:
    verifier = SessionVerifier(Role.SERVER, session("x"), SPKI, random=lambda n: bytes(range(n)))
    assert verifier.prove() == bytes(range(32)) + bytes(4)


def test_an_honest_session_is_proven(world: World, agent: FakeAgent) -> None:
    claim = run(*ends(), agent)
    judge(world, claim).require()


def test_a_second_proof_counts_up(world: World, agent: FakeAgent) -> None:
    verifier, prover = ends()
    first = run(verifier, prover, agent)
    second = run(verifier, prover, agent)
    assert first.leaf[2:6] == bytes(4)
    assert second.leaf[2:6] == bytes([0, 0, 0, 1])
    judge(world, second).require()


def test_a_replayed_proof_is_of_another_session(world: World, agent: FakeAgent) -> None:
    old = run(*ends("one"), agent).evidence
    verifier, prover = ends("two")
    verifier.on_ack(prover.on_prove(verifier.prove()).ack)
    claim = verifier.on_evidence(old.encode())
    assert failed(judge(world, claim)) == {"channel.session"}


def test_a_replayed_proof_fails_in_its_own_session_too(world: World, agent: FakeAgent) -> None:
    verifier, prover = ends()
    old = run(verifier, prover, agent).evidence
    verifier.on_ack(prover.on_prove(verifier.prove()).ack)
    claim = verifier.on_evidence(old.encode())
    assert failed(judge(world, claim)) == {"channel.session"}


def test_a_relayed_proof_is_bound_to_the_relays_session(world: World, agent: FakeAgent) -> None:
    """A man in the middle passes PROVE, ACK and EVIDENCE on between two TLS sessions."""
    verifier = SessionVerifier(Role.SERVER, session("client to relay"), OTHER_SPKI)
    prover = SessionProver(Role.SERVER, session("relay to guest"), SPKI)
    claim = run(verifier, prover, agent)
    assert failed(judge(world, claim)) == {"channel.session"}


def test_a_relay_with_the_same_exporter_still_has_another_key(
    world: World, agent: FakeAgent
) -> None:
    verifier = SessionVerifier(Role.SERVER, session("one"), OTHER_SPKI)
    prover = SessionProver(Role.SERVER, session("one"), SPKI)
    assert failed(judge(world, run(verifier, prover, agent))) == {"channel.session"}


def test_a_proof_of_the_other_role_is_no_proof(world: World, agent: FakeAgent) -> None:
    """Role reflection: what a client proves cannot be shown to it as the server's proof."""
    verifier = SessionVerifier(Role.SERVER, session("one"), SPKI)
    prover = SessionProver(Role.CLIENT, session("one"), SPKI)
    assert failed(judge(world, run(verifier, prover, agent))) == {"channel.session"}


@pytest.mark.parametrize("which", ["prove", "ack"])
def test_a_changed_nonce_is_another_session(world: World, agent: FakeAgent, which: str) -> None:
    verifier, prover = ends()
    prove = verifier.prove()
    if which == "prove":
        prove = bytes([prove[0] ^ 1]) + prove[1:]
    answer = prover.on_prove(prove)
    ack = bytes([answer.ack[0] ^ 1]) + answer.ack[1:] if which == "ack" else answer.ack
    verifier.on_ack(ack)
    claim = verifier.on_evidence(prover.evidence(agent.evidence([answer.leaf])))
    assert failed(judge(world, claim)) == {"channel.session"}


def test_a_node_is_no_leaf(world: World, agent: FakeAgent) -> None:
    """The root of two leaves offered as the leaf of a tree of one."""
    verifier, prover = ends()
    answer = prover.on_prove(verifier.prove())
    verifier.on_ack(answer.ack)
    node = merkle.node_hash(answer.leaf, bytes(32))
    evidence = agent.evidence([node])
    forged = ChannelEvidence(evidence.statement, evidence.evidence, 0, (bytes(32),))
    claim = verifier.on_evidence(prover.evidence(forged))
    assert failed(judge(world, claim)) == {"channel.session"}


@pytest.mark.parametrize(("index", "path"), [(1, 1), (0, 0), (0, 2)])
def test_another_place_or_tree_size_is_refused(
    world: World, agent: FakeAgent, index: int, path: int
) -> None:
    verifier, prover = ends()
    answer = prover.on_prove(verifier.prove())
    verifier.on_ack(answer.ack)
    good = agent.evidence([answer.leaf, bytes(32)])
    nodes = (good.path * 2)[:path]
    forged = ChannelEvidence(good.statement, good.evidence, index, nodes)
    claim = verifier.on_evidence(prover.evidence(forged))
    assert failed(judge(world, claim)) == {"channel.session"}


def test_one_quote_serves_many_sessions(world: World, agent: FakeAgent) -> None:
    pairs = [ends(f"session {number}") for number in range(5)]
    leaves = []
    for verifier, prover in pairs:
        answer = prover.on_prove(verifier.prove())
        verifier.on_ack(answer.ack)
        leaves.append(answer.leaf)
    for index, (verifier, prover) in enumerate(pairs):
        claim = verifier.on_evidence(prover.evidence(agent.evidence(leaves, index)))
        judge(world, claim).require()


def test_a_prover_refuses_a_wrong_number() -> None:
    _verifier, prover = ends()
    with pytest.raises(FormatError, match="number 1"):
        prover.on_prove(bytes(32) + b"\x00\x00\x00\x01")


def test_a_prover_refuses_a_second_prove_while_one_is_open() -> None:
    verifier, prover = ends()
    prover.on_prove(verifier.prove())
    with pytest.raises(FormatError):
        prover.on_prove(bytes(36))


def test_everything_out_of_turn_is_refused(agent: FakeAgent) -> None:
    verifier, prover = ends()
    evidence = agent.evidence([bytes(32)])
    with pytest.raises(FormatError):
        verifier.on_ack(bytes(32))
    with pytest.raises(FormatError):
        verifier.on_evidence(evidence.encode())
    with pytest.raises(FormatError):
        prover.evidence(evidence)
    verifier.prove()
    with pytest.raises(FormatError):
        verifier.prove()
    with pytest.raises(FormatError):
        verifier.on_evidence(evidence.encode())
    verifier.on_ack(bytes(32))
    with pytest.raises(FormatError):
        verifier.on_ack(bytes(32))


@pytest.mark.parametrize("payload", [b"", b"{}", b"\xff", b'{"statement":1}', b"[" * 2000])
def test_malformed_evidence_is_our_error(payload: bytes) -> None:
    verifier, prover = ends()
    verifier.on_ack(prover.on_prove(verifier.prove()).ack)
    with pytest.raises(CaiError):
        verifier.on_evidence(payload)


# TLS itself, over memory


def pump(client: TlsSession, server: TlsSession) -> None:
    client.start()
    for _round in range(6):
        if data := client.outgoing():
            server.receive(data)
        if data := server.outgoing():
            client.receive(data)


def test_exporter_and_key_agree_at_both_ends() -> None:
    key = ChannelKey()
    client = TlsSession(client_context(), server=False, server_name="guest.example")
    server = TlsSession(server_context(key), server=True)
    pump(client, server)
    assert client.established
    assert server.established
    assert client.export(b"c") == server.export(b"c")
    assert client.export(b"c") != client.export(b"d")
    assert client.peer_spki() == key.spki
    assert key.spki.hex() not in repr(key)


def test_two_sessions_with_one_server_export_different_values() -> None:
    context = server_context(ChannelKey())
    values = set()
    for _number in range(2):
        client = TlsSession(client_context(), server=False)
        pump(client, TlsSession(context, server=True))
        values.add(client.export(b"same"))
    assert len(values) == 2


def test_no_session_resumes() -> None:
    """Tickets are sent in spite of OP_NO_TICKET, so a client tries to use one."""
    context = server_context(ChannelKey())
    first = TlsSession(client_context(), server=False)
    server = TlsSession(context, server=True)
    pump(first, server)
    server.send(b"x")
    assert first.receive(server.outgoing()) == b"x"
    ticket = first._tls.get_session()
    assert ticket is not None
    second = TlsSession(first._tls.get_context(), server=False)
    second._tls.set_session(ticket)
    again = TlsSession(context, server=True)
    pump(second, again)
    assert second.established
    assert not SSL._lib.SSL_session_reused(second._tls._ssl)
    assert not SSL._lib.SSL_session_reused(again._tls._ssl)


@pytest.mark.parametrize("offered", [[], [b"h2"], [b"rats-tls", b"http/1.1"], [b"cai/2"]])
def test_a_client_without_our_alpn_is_refused(offered: list[bytes]) -> None:
    context = SSL.Context(SSL.TLS_METHOD)
    if offered:
        context.set_alpn_protos(offered)
    client = SSL.Connection(context, None)
    client.set_connect_state()
    with pytest.raises(SSL.WantReadError):
        client.do_handshake()
    server = TlsSession(server_context(ChannelKey()), server=True)

    def exchange() -> None:
        server.receive(client.bio_read(65536))
        client.bio_write(server.outgoing())
        client.do_handshake()
        server.receive(client.bio_read(65536))

    with pytest.raises(PeerWithoutEvidence):
        exchange()
    assert not server.established


def test_a_server_without_our_alpn_is_not_believed() -> None:
    context = SSL.Context(SSL.TLS_METHOD)
    ChannelKey().install(context)
    plain = SSL.Connection(context, None)
    plain.set_accept_state()
    client = TlsSession(client_context(), server=False)
    client.start()
    plain.bio_write(client.outgoing())
    with pytest.raises(SSL.WantReadError):
        plain.do_handshake()
    with pytest.raises(PeerWithoutEvidence, match="not cai/1"):
        client.receive(plain.bio_read(65536))
    assert not client.established


def test_tls_1_2_is_refused() -> None:
    context = SSL.Context(SSL.TLS_METHOD)
    context.set_max_proto_version(SSL.TLS1_2_VERSION)
    context.set_alpn_protos([ALPN])
    old = SSL.Connection(context, None)
    old.set_connect_state()
    with pytest.raises(SSL.WantReadError):
        old.do_handshake()
    server = TlsSession(server_context(ChannelKey()), server=True)
    with pytest.raises(PeerError):
        server.receive(old.bio_read(65536))


def test_plain_text_is_no_tls() -> None:
    client = TlsSession(client_context(), server=False)
    client.start()
    with pytest.raises(PeerWithoutEvidence, match="plain text"):
        client.receive(b"HTTP/1.1 400 Bad Request\r\n\r\n")


def test_a_changed_record_ends_the_session() -> None:
    client = TlsSession(client_context(), server=False)
    server = TlsSession(server_context(ChannelKey()), server=True)
    pump(client, server)
    client.send(b"hello")
    record = bytearray(client.outgoing())
    record[-1] ^= 1
    with pytest.raises(PeerError):
        server.receive(bytes(record))
