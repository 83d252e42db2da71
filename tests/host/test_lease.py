"""Keeping a lease: what renews it, what ends it, and what the guest demands of each answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from cai import merkle
from cai.attest import jwe, rcar
from cai.attest.checkpoint import Checkpoint, CheckpointProof, sign_checkpoint
from cai.attest.lease import LeaseAnswer, LeaseGrant, LeaseRequest
from cai.attest.ticket import AuditProof, Ticket, ticket_digest
from cai.errors import CaiError, PeerUnreachable, PolicyDenied, Tampered, Unauthenticated
from cai.host import lease as lease_module
from cai.host.agent import now
from cai.host.launch import Launch
from cai.host.lease import LeaseKeeper, Withdrawal, sleep_until
from cai.host.lease_client import LeaseCall
from cai.secret import Secret
from tests.vectors import make_ticket as vectors

TTL, DRAIN = 0.6, 0.2


@dataclass
class Granted:
    """As much of a release as a keeper looks at."""

    sent_at: float
    ttl_s: float = TTL
    drain_s: float = DRAIN

    @property
    def expires_at(self) -> float:
        return self.sent_at + self.ttl_s


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "RETRY_S", 0.05)
    monkeypatch.setattr(lease_module, "LOOK_S", 0.05)


def kept(answers: list[Any]) -> tuple[Withdrawal, list[float], list[Any], float]:
    """Run a keeper against these answers, the last of them for ever."""
    start, calls, renewed = now(), [], []

    async def fetch(_held: Any) -> Any:
        calls.append(now() - start)
        answer = answers[min(len(calls), len(answers)) - 1]
        if isinstance(answer, CaiError):
            raise answer
        if answer == "hang":
            await asyncio.sleep(60)
        return Granted(now())

    keeper = LeaseKeeper(Granted(start), fetch, renewed.append)  # type: ignore[arg-type]
    withdrawal = asyncio.run(asyncio.wait_for(keeper.run(), 20))
    return withdrawal, calls, renewed, start


def test_it_renews_at_a_third_until_it_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    refusal = PolicyDenied("key broker: revoked", code="revoked.model")
    with caplog.at_level(logging.WARNING):
        withdrawal, calls, renewed, _ = kept(["yes", "yes", refusal])
    assert len(renewed) == 2
    gaps = [second - first for first, second in zip([0.0, *calls], calls, strict=False)]
    assert all(TTL / 3 * 0.85 <= gap <= TTL / 3 + 0.15 for gap in gaps), gaps
    assert withdrawal.error is refusal
    assert 0 < withdrawal.ends_at - now() <= DRAIN
    assert "revoked" in caplog.text


@pytest.mark.parametrize(
    "trouble", [PeerUnreachable("nobody answers"), Unauthenticated("no such session")]
)
def test_it_waits_for_a_broker_that_decides_nothing(trouble: CaiError) -> None:
    withdrawal, calls, renewed, start = kept([trouble])
    assert len(calls) > 2
    assert not renewed
    assert withdrawal.error.machine_code == "lease-expired"
    assert now() - start >= TTL
    assert withdrawal.ends_at - start <= TTL + DRAIN + 0.01


def test_a_broker_that_comes_back_is_asked_again() -> None:
    end = PolicyDenied("no", code="policy.release")
    withdrawal, _, renewed, _ = kept([PeerUnreachable("x"), "yes", end])
    assert len(renewed) == 1
    assert withdrawal.error is end


def test_a_broker_that_hangs_is_not_waited_for() -> None:
    withdrawal, calls, _, start = kept(["hang"])
    assert len(calls) == 1
    assert withdrawal.error.machine_code == "lease-expired"
    assert now() - start < TTL + 0.5


@pytest.mark.parametrize("error", [Tampered("log"), CaiError("x")])
def test_whatever_is_no_answer_of_a_broker_ends_it(error: CaiError) -> None:
    withdrawal, calls, _, _ = kept([error])
    assert len(calls) == 1
    assert withdrawal.error is error


def test_a_guest_that_slept_over_its_lease_has_no_drain_left() -> None:
    moment = [1000.0]

    async def fetch(_held: Any) -> Any:
        raise AssertionError

    keeper = LeaseKeeper(
        Granted(0.0), fetch, lambda _: None, clock=lambda: moment[0]  # type: ignore[arg-type]
    )
    withdrawal = asyncio.run(keeper.run())
    assert withdrawal.ends_at == TTL + DRAIN
    asyncio.run(asyncio.wait_for(sleep_until(withdrawal.ends_at, lambda: moment[0]), 1))


def test_the_drain_is_never_longer_than_five_minutes() -> None:
    async def fetch(_held: Any) -> Any:
        raise PolicyDenied("no")

    keeper = LeaseKeeper(
        Granted(now(), 0.1, 10_000), fetch, lambda _: None  # type: ignore[arg-type]
    )
    assert asyncio.run(keeper.run()).ends_at - now() <= 300


# What the guest demands of an answer.

LAUNCH = Launch(b"{}", settings={}, owner_key="ab" * 32, service_id="demo")
KEY = rcar.TeeKey.generate()
REQUEST = LeaseRequest("kbs:///a/b/c", vectors.NONCE, (vectors.CHANNEL,))
CLAIMS = replace(vectors.CLAIMS, launch_digest=LAUNCH.digest)
PINNED = vectors.public(vectors.TICKET_KEY)


def log_of(size: int, *, rewritten: bool = False) -> list[bytes]:
    word = b"rewritten" if rewritten else b"leaf"
    return [merkle.leaf_hash(word + b" %d" % place) for place in range(size)]


def audit(leaves: list[bytes], origin: str = f"cai-kbs/{vectors.INSTANCE}") -> AuditProof:
    last = len(leaves) - 1
    checkpoint = Checkpoint(origin, len(leaves), merkle.root(leaves))
    note = sign_checkpoint(checkpoint, vectors.LOG_KEY)
    path = tuple(merkle.inclusion_path(leaves, last))
    return AuditProof(leaves[last], CheckpointProof(note, last, len(leaves), path))


def answer(
    *, claims: Any = CLAIMS, proof: AuditProof | None = None, key: Any = vectors.TICKET_KEY,
    grant: Callable[[LeaseGrant], LeaseGrant] = lambda same: same, other: bytes | None = None,
    consistency: tuple[str, ...] = (), to: rcar.TeeKey = KEY,
) -> bytes:  # fmt: skip
    import json

    ticket = Ticket(claims, proof or audit(log_of(7))).signed(key)
    given = LeaseGrant(
        lease=vectors.LEASE, resource=REQUEST.resource, version=1, nonce=REQUEST.nonce, ttl_s=900,
        drain_s=300, ticket=ticket_digest(ticket), contents=Secret(b"record"),
    )  # fmt: skip
    sealed = jwe.encrypt(grant(given).encode(), to.jwk)
    return json.dumps(LeaseAnswer(sealed, other or ticket, consistency).to_json()).encode()


def call(known: Checkpoint | None = None, *, pinned: str = PINNED) -> LeaseCall:
    return LeaseCall(REQUEST, replace(LAUNCH, kbs_key=pinned), simulated=False, known=known)


def test_a_good_answer_is_a_lease() -> None:
    contents, held = call().open(answer(), KEY)
    assert contents.reveal() == b"record"
    assert (held.id, held.ttl_s, held.drain_s) == (vectors.LEASE, 900, 300)
    assert held.checkpoint.size == 7
    assert held.models == (vectors.MODEL,)


def test_without_a_pinned_key_the_signature_alone_is_not_asked() -> None:
    call(pinned="").open(answer(key=vectors.OTHER_KEY), KEY)
    with pytest.raises(Tampered) as caught:
        call(pinned="").open(answer(claims=replace(CLAIMS, nonce="00" * 32)), KEY)
    assert caught.value.machine_code == "ticket.nonce"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"key": vectors.OTHER_KEY}, "ticket.signature"),
        ({"claims": replace(CLAIMS, nonce="00" * 32)}, "ticket.nonce"),
        ({"claims": replace(CLAIMS, launch_digest="00" * 48)}, "ticket.launch"),
        ({"claims": replace(CLAIMS, realm="simulated")}, "ticket.realm"),
        ({"claims": replace(CLAIMS, lease="00" * 16)}, "lease-ticket"),
        ({"claims": replace(CLAIMS, ttl_s=901)}, "lease-ticket"),
        ({"claims": replace(CLAIMS, drain_s=1)}, "lease-ticket"),
        ({"claims": replace(CLAIMS, channel_keys=())}, "lease-ticket"),
        ({"grant": lambda same: replace(same, nonce="00" * 32)}, "lease-nonce"),
        ({"grant": lambda same: replace(same, resource="kbs:///a/b/d")}, "lease-nonce"),
        ({"grant": lambda same: replace(same, ticket="00" * 32)}, "lease-ticket"),
        ({"other": vectors.TICKET}, "lease-ticket"),
        ({"to": rcar.TeeKey.generate()}, "wrong-key"),
        ({"proof": replace(audit(log_of(7)), leaf=bytes(32))}, "ticket.audit"),
    ],
)
def test_other_answers_are_refused(changes: dict[str, Any], code: str) -> None:
    with pytest.raises(CaiError) as caught:
        call().open(answer(**changes), KEY)
    assert caught.value.machine_code == code


def grown(old: list[bytes], new: list[bytes]) -> tuple[str, ...]:
    return tuple(step.hex() for step in merkle.consistency_path(new, len(old)))


def test_the_log_must_grow() -> None:
    old, new = log_of(3), log_of(7)
    known = Checkpoint(f"cai-kbs/{vectors.INSTANCE}", 3, merkle.root(old))
    call(known).open(answer(consistency=grown(old, new)), KEY)
    same = Checkpoint(known.origin, 7, merkle.root(new))
    call(same).open(answer(), KEY)
    for bad in (
        answer(), answer(consistency=("00" * 32,)),
        answer(proof=audit(log_of(7, rewritten=True)), consistency=grown(old, new)),
        answer(proof=audit(log_of(2))),
    ):
        with pytest.raises(Tampered) as caught:
            call(known).open(bad, KEY)
        assert caught.value.machine_code == "lease-log"


def test_a_restored_log_is_told(caplog: pytest.LogCaptureFixture) -> None:
    known = Checkpoint(f"cai-kbs/{vectors.INSTANCE}", 9, merkle.root(log_of(9)))
    restored = audit(log_of(5), f"cai-kbs/{vectors.INSTANCE}/1")
    with caplog.at_level(logging.WARNING):
        call(known).open(answer(proof=restored), KEY)
    assert "began anew" in caplog.text


def test_another_brokers_log_is_refused() -> None:
    known = Checkpoint("cai-kbs/" + "99" * 16, 3, merkle.root(log_of(3)))
    with pytest.raises(Tampered) as caught:
        call(known).open(answer(), KEY)
    assert caught.value.machine_code == "lease-log"


def test_a_ticket_that_does_not_admit_the_model_is_no_use() -> None:
    _, held = call().open(answer(), KEY)
    held.require_model(vectors.MODEL)
    with pytest.raises(Tampered):
        held.require_model("00" * 32)
