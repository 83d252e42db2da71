"""Guests that ask for leases, and what they lease: a record as `cai encrypt` signs it."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cai.attest import jwe
from cai.attest.lease import KnownCheckpoint, LeaseAnswer, LeaseGrant, LeaseRequest
from cai.attest.ticket import Ticket
from cai.model.record import Lease, ReleaseRecord, public_key_hex
from cai.secret import Secret
from kbs.keys.signing import KeyName
from tests.kbs.world import URI, Site, Visitor

OWNER = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
MODEL_ID, MODEL_ROOT = "11" * 32, "22" * 32
CHANNEL_KEY = "cd" * 32


def record(**changes: Any) -> bytes:
    """A release record."""
    plain = ReleaseRecord(
        kek=Secret(bytes(32)), model_id=MODEL_ID, manifest_root=MODEL_ROOT, min_revision=1,
        index_sha256="33" * 32, owner_key=public_key_hex(OWNER), lease=Lease(900, 120),
    )  # fmt: skip
    return replace(plain, **changes).sign(OWNER)


@dataclass
class Held:
    """An answer, opened."""

    request: LeaseRequest
    answer: LeaseAnswer
    grant: LeaseGrant
    ticket: Ticket


def request(**changes: Any) -> LeaseRequest:
    """A request under a fresh nonce."""
    plain = LeaseRequest(f"kbs:///{URI}", os.urandom(32).hex(), (CHANNEL_KEY,))
    return replace(plain, **changes)


def ask(site: Site, cookie: str | None, body: LeaseRequest | bytes, **more: Any) -> httpx.Response:
    """``POST /kbs/v0/lease``."""
    sent = body if isinstance(body, bytes) else body.encode()
    return site.call("POST", "/kbs/v0/lease", sent, cookie=cookie, **more)


def opened(visitor: Visitor, wanted: LeaseRequest, answer: httpx.Response) -> Held:
    """An answer as the guest opens it."""
    assert answer.status_code == 200, answer.text
    parsed = LeaseAnswer.parse(answer.content)
    grant = LeaseGrant.parse(jwe.decrypt(parsed.jwe, visitor.key).reveal())
    grant.require_answer_to(wanted, parsed.ticket)
    return Held(wanted, parsed, grant, Ticket.parse(parsed.ticket))


def lease(site: Site, visitor: Visitor, **changes: Any) -> Held:
    """Attest and get a lease."""
    _, cookie = visitor.attested(site)
    wanted = request(**changes)
    return opened(visitor, wanted, ask(site, cookie, wanted))


def renew(site: Site, visitor: Visitor, held: Held, **changes: Any) -> Held:
    """Attest again and renew."""
    newest = held.ticket.audit.proof
    from cai.attest.checkpoint import read_checkpoint

    known = read_checkpoint(newest.note)
    named = KnownCheckpoint(known.origin, known.size, known.root.hex())
    return lease(site, visitor, renews=held.grant.lease, checkpoint=named, **changes)


def ticket_key(site: Site) -> bytes:
    """The broker's ticket key, as a verifier pins it."""
    core = site.broker.core
    with core.database.read() as connection:
        key = core.signing.current(connection, KeyName.TICKET).ed25519
    return key.public_key().public_bytes_raw()


def log_key(site: Site) -> bytes:
    """The key of the broker's audit log."""
    core = site.broker.core
    with core.database.read() as connection:
        key = core.signing.current(connection, KeyName.CHECKPOINT).ed25519
    return key.public_key().public_bytes_raw()


def failed(row: dict[str, Any]) -> set[str]:
    """Names of the failed checks of an audit leaf."""
    return {item["name"] for item in row["checks"] if item["outcome"] == "fail"}


def refused(answer: httpx.Response, status: int, code: str, kind: str = "PolicyDeny") -> None:
    """Demand a refusal with this code."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body["code"] == code, body
    assert body["type"].endswith(f"/{kind}"), body
