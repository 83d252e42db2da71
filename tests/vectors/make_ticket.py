"""Makes ``ticket.json``: known answers for a second implementation of docs/spec-lease.md.

    python tests/vectors/make_ticket.py > tests/vectors/ticket.json

Keys, log and times are fixed. Each case has the ticket's exact bytes as text, what its verifier
knows, and the names of the checks that must fail; none of them means that it verifies.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cai import jcs, merkle
from cai.attest.checkpoint import Checkpoint, CheckpointProof, sign_checkpoint
from cai.attest.lease import KnownCheckpoint, LeaseGrant, LeaseRequest
from cai.attest.ticket import AuditProof, Ticket, TicketClaims, ticket_digest
from cai.secret import Secret

TICKET_KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER_KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
LOG_KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32, 64)))
INSTANCE, LEASE, NONCE = "a0" * 16, "b1" * 16, "c2" * 32
CHANNEL, PLATFORM, LAUNCH, MODEL = "d3" * 32, "e4" * 32, "f5" * 48, "06" * 32
ISSUED = datetime(2026, 11, 20, 12, 0, 0, tzinfo=UTC)
INDEX, SIZE = 4, 7


def public(key: Ed25519PrivateKey) -> str:
    """The public half, hex."""
    return key.public_key().public_bytes_raw().hex()


def proof(index: int = INDEX) -> AuditProof:
    """The decision as one leaf of seven."""
    leaves = [merkle.leaf_hash(b"leaf %d" % place) for place in range(SIZE)]
    checkpoint = Checkpoint(f"cai-kbs/{INSTANCE}", SIZE, merkle.root(leaves))
    path = tuple(merkle.inclusion_path(leaves, index))
    note = sign_checkpoint(checkpoint, LOG_KEY)
    return AuditProof(leaves[index], CheckpointProof(note, index, SIZE, path))


CLAIMS = TicketClaims(
    kbs=INSTANCE, realm="production", lease=LEASE, nonce=NONCE, channel_keys=(CHANNEL,),
    platform=PLATFORM, launch_digest=LAUNCH, models=(MODEL,), issued=ISSUED, ttl_s=900, drain_s=300,
    policy="17" * 32,
)  # fmt: skip
TICKET = Ticket(CLAIMS, proof()).signed(TICKET_KEY)


def case(name: str, ticket: bytes, *fails: str, **known: Any) -> dict[str, Any]:
    """One case; ``known`` replaces what the verifier knows."""
    view = {
        "channel_key": CHANNEL, "launch_digest": LAUNCH, "platform": PLATFORM, "models": [MODEL],
        "ticket_digest": ticket_digest(ticket), "nonce": NONCE,
    }  # fmt: skip
    view |= known.pop("view", {})
    base = {
        "keys": [public(TICKET_KEY)], "log_keys": [public(LOG_KEY)], "simulated": False,
        "now": "2026-11-20T12:05:00Z",
    }  # fmt: skip
    return {
        "name": name, "ticket": ticket.decode(), **base, **known, "view": view, "fails": list(fails)
    }  # fmt: skip


def bent(**members: Any) -> bytes:
    """The ticket with members exchanged and the old signature; ``None`` removes one."""
    value = jcs.parse(TICKET, what="ticket", limit=1 << 20)
    value |= members
    return jcs.canonical({name: member for name, member in value.items() if member is not None})


def signed(**changes: Any) -> bytes:
    """A ticket with other claims, signed."""
    return Ticket(replace(CLAIMS, **changes), proof()).signed(TICKET_KEY)


def cases() -> list[dict[str, Any]]:
    """Every case."""
    audit = proof()
    shorter = replace(audit.proof, path=audit.proof.path[:-1])
    elsewhere = replace(audit.proof, index=INDEX + 1)
    foreign = replace(audit.proof, note=sign_checkpoint(
        Checkpoint(f"cai-kbs/{INSTANCE}", SIZE, merkle.root([merkle.leaf_hash(b"x")])), LOG_KEY
    ))  # fmt: skip
    unsigned = replace(audit.proof, note=audit.proof.note.replace(b"cai-kbs/a0", b"cai-kbs/a1"))
    blank = ("channel_key", "launch_digest", "platform", "ticket_digest", "nonce")
    nothing = dict.fromkeys(blank, "")
    return [
        case("good", TICKET),
        case("nothing asked of the channel", TICKET, view=nothing | {"models": None}),
        case("without a log key", TICKET, log_keys=[]),
        case("two pinned keys", TICKET, keys=[public(OTHER_KEY), public(TICKET_KEY)]),
        case("no pinned key", TICKET, "ticket.signature", keys=[]),
        case("another key", TICKET, "ticket.signature", keys=[public(OTHER_KEY)]),
        case("longer life", bent(ttl_s=901), "ticket.signature"),
        case("another channel key in it", bent(channel_keys=["00" * 32]), "ticket.signature",
             "ticket.channel_key"),
        case("last second", TICKET, now="2026-11-20T12:14:59Z"),
        case("expired", TICKET, "ticket.expired", now="2026-11-20T12:15:00Z"),
        case("a minute of skew", TICKET, now="2026-11-20T11:59:00Z"),
        case("from the future", TICKET, "ticket.issued", now="2026-11-20T11:58:59Z"),
        case("simulated realm", signed(realm="simulated"), "ticket.realm"),
        case("simulated verifier", TICKET, "ticket.realm", simulated=True),
        case("simulated both", signed(realm="simulated"), simulated=True),
        case("another channel", TICKET, "ticket.channel_key", view={"channel_key": "00" * 32}),
        case("no channel admitted", signed(channel_keys=()), "ticket.channel_key"),
        case("another launch", TICKET, "ticket.launch", view={"launch_digest": "00" * 48}),
        case("no launch in it", signed(launch_digest=""), "ticket.launch"),
        case("another platform", TICKET, "ticket.platform", view={"platform": "00" * 32}),
        case("another model", TICKET, "ticket.models", view={"models": [MODEL, "00" * 32]}),
        case("fewer models", TICKET, view={"models": []}),
        case("another statement", TICKET, "ticket.statement", view={"ticket_digest": "00" * 32}),
        case("another nonce", TICKET, "ticket.nonce", view={"nonce": "00" * 32}),
        case("shorter path", Ticket(CLAIMS, replace(audit, proof=shorter)).signed(TICKET_KEY),
             "ticket.audit", "ticket.log"),
        case("another place", Ticket(CLAIMS, replace(audit, proof=elsewhere)).signed(TICKET_KEY),
             "ticket.audit", "ticket.log"),
        case("another log", Ticket(CLAIMS, replace(audit, proof=foreign)).signed(TICKET_KEY),
             "ticket.audit", "ticket.log"),
        case("unsigned checkpoint", Ticket(CLAIMS, replace(audit, proof=unsigned)).signed(
             TICKET_KEY), "ticket.log"),
        case("another log key", TICKET, "ticket.log", log_keys=[public(TICKET_KEY)]),
        case("not canonical", b" " + TICKET, "ticket.form"),
        case("no signature", bent(signature=None), "ticket.form"),
        case("unknown member", bent(extra=1), "ticket.form"),
        case("unknown version", bent(**{"cai-ticket": 2}), "ticket.form"),
        case("unsorted keys", signed(channel_keys=("02" * 32, "01" * 32)), "ticket.form"),
        case("a key twice", signed(channel_keys=("01" * 32, "01" * 32)), "ticket.form"),
        case("upper case", bent(platform="AB" * 32), "ticket.form"),
        case("endless", signed(ttl_s=86_401), "ticket.form"),
        case("drain of an hour", signed(drain_s=3600), "ticket.form"),
        case("another clock", bent(issued="2026-11-20T12:00:00+00:00"), "ticket.form"),
        case("another realm", bent(realm="test"), "ticket.form"),
        case("no audit", bent(audit=None), "ticket.form"),
    ]  # fmt: skip


def messages() -> dict[str, Any]:
    """The two messages around a ticket."""
    request = LeaseRequest(
        "kbs:///models/minilm/key", NONCE, (CHANNEL,), LEASE,
        KnownCheckpoint(f"cai-kbs/{INSTANCE}", 3, "28" * 32),
    )  # fmt: skip
    grant = LeaseGrant(
        lease=LEASE, resource="kbs:///models/minilm/key", version=3, nonce=NONCE, ttl_s=900,
        drain_s=300, ticket=ticket_digest(TICKET), contents=Secret(b"contents"),
    )  # fmt: skip
    return {"request": request.encode().decode(), "grant": grant.encode().decode()}


def main() -> None:
    """Print the file."""
    value = {
        "seeds": {"ticket": bytes(range(32)).hex(), "log": bytes(range(32, 64)).hex()},
        "claims_digest": CLAIMS.digest, "ticket_digest": ticket_digest(TICKET), **messages(),
        "cases": cases(),
    }  # fmt: skip
    json.dump(value, sys.stdout, indent=1, ensure_ascii=False)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
