"""Signing admission tickets, once the decision behind one is in the log (docs/spec-lease.md §4)."""

from __future__ import annotations

from cai.attest.ticket import AuditProof, Ticket, TicketClaims
from cai.errors import Tampered
from cai.merkle import leaf_hash
from kbs.audit.log import read_leaves
from kbs.core import Core
from kbs.keys.signing import KeyName


def issue_ticket(core: Core, claims: TicketClaims, seq: int) -> bytes:
    """Sign a ticket about a committed decision.

    Blocks until a checkpoint covers the decision, about a second at most; outside any transaction.

    Args:
        core: the broker's state.
        claims: what was decided.
        seq: place of the decision's leaf.

    Raises:
        Tampered: the leaf is not in the log any more.
    """
    proof = core.checkpoints.covering(seq)
    _size, leaves = read_leaves(core.database, start=seq, limit=1)
    if not leaves:
        raise Tampered(f"the audit log lacks leaf {seq}")
    with core.database.read() as connection:
        key = core.signing.current(connection, KeyName.TICKET).ed25519
    return Ticket(claims, AuditProof(leaf_hash(leaves[0]), proof)).signed(key)
