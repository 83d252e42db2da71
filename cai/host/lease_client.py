"""One call for a lease, and what the guest demands of its answer (docs/spec-lease.md §6)."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cai import merkle
from cai.attest import jwe
from cai.attest.checkpoint import Checkpoint, read_checkpoint
from cai.attest.lease import NONCE_SIZE, KnownCheckpoint, LeaseAnswer, LeaseGrant, LeaseRequest
from cai.attest.rcar import TeeKey
from cai.attest.ticket import ChannelView, Ticket, verify_ticket
from cai.errors import Tampered
from cai.secret import Secret

if TYPE_CHECKING:
    from cai.host.agent import Agent
    from cai.host.launch import Launch

log = logging.getLogger("cai.host")


@dataclass(frozen=True, slots=True)
class HeldLease:
    """A lease as the guest holds it.

    Attributes:
        id: 32 hex digits.
        ttl_s: seconds from sending the request in which new requests may start.
        drain_s: seconds more for running ones.
        ticket: the admission ticket's canonical bytes.
        checkpoint: of the broker's log; the next one must extend it.
    """

    id: str
    ttl_s: int
    drain_s: int
    ticket: bytes
    checkpoint: Checkpoint

    @property
    def models(self) -> tuple[str, ...]:
        """``model_root`` of each model that the ticket admits, hex."""
        return Ticket.parse(self.ticket).claims.models

    def require_model(self, root: str) -> None:
        """Demand that the ticket admits the model that the record names.

        Raises:
            Tampered: it does not; clients would refuse the guest.
        """
        if root not in self.models:
            raise Tampered("the ticket does not admit the record's model", code="lease-ticket")


@dataclass(frozen=True, slots=True)
class LeaseCall:
    """One request, and what its answer is held against.

    Attributes:
        request: the message.
        launch: what was measured.
        simulated: the guest is a simulated one.
        known: the newest checkpoint that the guest has verified.
    """

    request: LeaseRequest
    launch: Launch
    simulated: bool
    known: Checkpoint | None

    @classmethod
    def about(cls, agent: Agent, key_path: str, held: HeldLease | None) -> LeaseCall:
        """A call for this guest, under a fresh nonce."""
        known = None if held is None else held.checkpoint
        named = None
        if known is not None:
            named = KnownCheckpoint(known.origin, known.size, known.root.hex())
        request = LeaseRequest(
            resource=f"kbs:///{key_path}",
            nonce=os.urandom(NONCE_SIZE).hex(),
            channel_keys=tuple(sorted(set(agent.channel_keys))),
            renews="" if held is None else held.id,
            checkpoint=named,
        )
        return cls(request, agent.launch, agent.source.simulated, known)

    def open(self, data: bytes, key: TeeKey) -> tuple[Secret, HeldLease]:
        """Open an answer and verify it.

        Args:
            data: the answer.
            key: the key of this handshake.

        Returns:
            The resource, and the lease.

        Raises:
            FormatError, LimitExceeded, WrongKey: the answer has another form or key.
            Tampered: it answers another request; its ticket is another's, or does not verify; or
                the broker's log does not extend the one that was seen before.
        """
        # (1) Only this handshake's key opens the grant.
        answer = LeaseAnswer.parse(data)
        grant = LeaseGrant.parse(jwe.decrypt(answer.jwe, key).reveal())
        # (2) It answers this request and names the ticket beside it.
        grant.require_answer_to(self.request, answer.ticket)
        # (3) The ticket is about this guest and, where a key is pinned, signed by the broker.
        ticket = self._ticket(answer.ticket, grant)
        # (4) The broker's log only grew since the last time.
        checkpoint = read_checkpoint(ticket.audit.proof.note)
        self._require_growth(checkpoint, answer.consistency)
        held = HeldLease(grant.lease, grant.ttl_s, grant.drain_s, answer.ticket, checkpoint)
        return grant.contents, held

    def _ticket(self, data: bytes, grant: LeaseGrant) -> Ticket:
        view = ChannelView(launch_digest=self.launch.digest, nonce=self.request.nonce)
        pinned = self.launch.kbs_key
        verdict, _ = verify_ticket(
            data, keys=(bytes.fromhex(pinned),) if pinned else (), view=view,
            simulated=self.simulated, now=None,
        )  # fmt: skip
        failed = [item for item in verdict.failures if pinned or item.name != "ticket.signature"]
        if failed:
            raise Tampered(
                f"the admission ticket: {failed[0].name}: {failed[0].reason}", code=failed[0].name
            )
        ticket = Ticket.parse(data)
        claims = ticket.claims
        given = (claims.lease, claims.ttl_s, claims.drain_s, claims.channel_keys)
        if given != (grant.lease, grant.ttl_s, grant.drain_s, self.request.channel_keys):
            raise Tampered("the ticket is about another lease", code="lease-ticket")
        return ticket

    def _require_growth(self, newest: Checkpoint, steps: tuple[str, ...]) -> None:
        known = self.known
        if known is None:
            return
        if known.origin != newest.origin:
            if known.instance != newest.instance:
                raise Tampered("another broker answers for this lease", code="lease-log")
            # A restore begins a new log that names the one before; the owner sees it there.
            log.warning("the key broker's log began anew as %s", newest.origin)
            return
        path = [bytes.fromhex(step) for step in steps]
        if not merkle.consistent(known.size, known.root, newest.size, newest.root, path):
            raise Tampered(
                f"the key broker's log of {newest.size} leaves does not extend the one of"
                f" {known.size} leaves that was seen before",
                code="lease-log",
                hint="somebody rewrote the broker's log; ask its owner",
            )
