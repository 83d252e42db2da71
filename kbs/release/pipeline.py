"""Every decision about a resource, in three steps (docs/kbs-operation.md).

*Read*: a consistent view of session, policies and the resource's row, together with the counter of
administrative changes. *Evaluate*: policies, key providers and stores elsewhere may take their
time; no transaction is open. *Decide*: in the one transaction that holds the audit head the counter
must still be the same, blocks are read, a lease is stored, and the leaf is written. If something
was administered in between, all of it is done again.

So a policy that changed, a resource that was deleted and a block that was set before the decision
commits are always obeyed, on every replica.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from cai.attest.lease import LEASE_REQUIRED, LeaseRequest
from cai.attest.ticket import TicketClaims, platform_id, policy_hash
from cai.attest.verdict import check
from cai.errors import CaiError, InputMissing, PolicyDenied, TooBusy
from kbs.audit.log import Entry, changes
from kbs.core import Core
from kbs.names import Realm, ResourceName
from kbs.protocol.sessions import Established, Session
from kbs.release.evaluation import Evaluator
from kbs.release.lease import Lease, LeaseStore
from kbs.release.model import ModelFacts, model_facts
from kbs.release.refusal import denied, failed_entry, guest, reasons, refused_by
from kbs.release.revocation import Block, BlockStore, Target, launch_digests, targets
from kbs.resources.rows import LeaseRule
from kbs.resources.store import Resource

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy import Connection

    from kbs.release.settings import ReleaseSettings

MAX_ROUNDS = 3
"""How often a decision is prepared before the broker gives up on settling."""

RELEASE = "release"
"""Action in the audit log of a resource asked for, plainly or with a new lease."""

RENEWAL = "renewal"
"""Action of a lease that is to go on."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One request for a resource.

    Attributes:
        session: the attested session that asks.
        name: of the resource.
        request: id of the HTTP request.
        lease: the request of a lease; ``None`` for a plain GET.
    """

    session: Session
    name: ResourceName
    request: str
    lease: LeaseRequest | None = None

    @property
    def action(self) -> str:
        """As audit leaves name it."""
        return RENEWAL if self.lease is not None and self.lease.renews else RELEASE


@dataclass(frozen=True, slots=True)
class Prepared:
    """What the first two steps found; it holds while ``changes`` is the same.

    Attributes:
        changes: the counter that was read.
        entry: the leaf to be.
        refused: why the answer is no already.
        established: what the session knows.
        resource: opened; only when nothing refused.
        model: what the resource says about its model.
    """

    changes: int
    entry: Entry
    refused: CaiError | None = None
    established: Established | None = None
    resource: Resource | None = None
    model: ModelFacts = field(default_factory=ModelFacts)


@dataclass(frozen=True, slots=True)
class Decision:
    """A decision that was committed, and allowed.

    Attributes:
        seq: place of its leaf.
        established: what the session knows.
        resource: what is given.
        lease: what was granted; ``None`` for a plain GET.
        claims: of the ticket to sign; ``None`` for a plain GET.
    """

    seq: int
    established: Established
    resource: Resource
    lease: Lease | None = None
    claims: TicketClaims | None = None


class Pipeline:
    """Decides requests for resources; safe to call from several threads.

    Args:
        core: the broker's state.
        evaluator: what policies make of a session's facts.
        settings: of leases.
    """

    def __init__(self, core: Core, evaluator: Evaluator, settings: ReleaseSettings) -> None:
        self._core = core
        self._evaluator = evaluator
        self._settings = settings
        self._blocks, self._leases = BlockStore.of(core), LeaseStore.of(core)

    def decide(self, asked: Asked) -> Decision:
        """Decide and commit.

        Raises:
            Unauthenticated: the session has not attested, or has ended.
            PolicyDenied: a policy or a block says no, or a lease is required.
            InputMissing: policies would allow it, but there is no such resource.
            Tampered: a stored row is not the one that was stored.
            TooBusy: administration changed something at every attempt.
        """
        for _ in range(MAX_ROUNDS):
            prepared = self._prepare(asked)
            outcome = self._commit(asked, prepared)
            if isinstance(outcome, CaiError):
                raise outcome
            if outcome is not None:
                return outcome
        busy = TooBusy(
            "policies or resources changed at every attempt to decide", code="unsettled",
            hint="try again",
        )  # fmt: skip
        self._core.record(self._failed(asked, busy))
        raise busy

    def _prepare(self, asked: Asked) -> Prepared:
        core = self._core
        with core.database.read() as connection:
            seen = changes(connection)
            try:
                established = core.sessions.established(connection, asked.session)
                rules = self._evaluator.for_resource(connection, asked.name)
                sealed = core.resources.sealed(connection, asked.name.path)
            except CaiError as error:
                return Prepared(seen, self._failed(asked, error), error)
        # No transaction is open: policies, key providers and stores elsewhere may take their time.
        try:
            verdict = self._evaluator.judge(rules, asked.session, established, asked.name)
            entry = Entry(
                asked.action, guest(asked.session), asked.request, allowed=verdict.passed,
                reason=reasons(verdict), subject=asked.name.uri, verdict=verdict,
                evidence=established.evidence, policies=rules.digests,
            )  # fmt: skip
        except CaiError as error:
            return Prepared(seen, self._failed(asked, error), error)
        if not entry.allowed:
            return Prepared(seen, entry, denied(entry))
        try:
            if sealed is None:
                raise InputMissing(
                    f"there is no resource {asked.name.uri}", hint="kbs resource set URI FILE"
                )
            opened = core.resources.open(sealed)
            _require_lease(asked, opened)
        except CaiError as error:
            return Prepared(seen, refused_by(entry, error), error)
        return Prepared(
            seen, replace(entry, served=opened.version), None, established, opened,
            model_facts(opened.contents),
        )  # fmt: skip

    def _commit(self, asked: Asked, prepared: Prepared) -> Decision | CaiError | None:
        """Write the leaf; ``None`` when what was prepared does not hold any more."""
        core = self._core
        with core.database.decide() as connection:
            if changes(connection) != prepared.changes:
                return None
            now = core.clock()
            established, resource = prepared.established, prepared.resource
            if prepared.refused is not None or established is None or resource is None:
                core.audit.append(connection, prepared.entry, now)
                return prepared.refused
            entry, refused, lease, claims = prepared.entry, None, None, None
            try:
                core.sessions.find(connection, asked.session.ref, now=now)
                named = targets(
                    established.facts, asked.name, version=resource.version, model=prepared.model
                )
                entry, refused = _blocked(entry, self._blocks.hits(connection, named))
                if refused is None and asked.lease is not None:
                    lease, claims, entry = self._grant(
                        connection, asked, prepared, established, named, now
                    )
            except CaiError as error:
                entry, refused = refused_by(entry, error), error
            seq = core.audit.append(connection, entry, now)
        # Committed: only now may the answer leave.
        if refused is not None:
            return refused
        return Decision(seq, established, resource, lease, claims)

    def _grant(
        self,
        connection: Connection,
        asked: Asked,
        prepared: Prepared,
        established: Established,
        named: tuple[Target, ...],
        now: datetime,
    ) -> tuple[Lease, TicketClaims, Entry]:
        if asked.lease is None or prepared.resource is None:
            raise CaiError("nobody asked for this lease")
        core, model, facts, wanted = self._core, prepared.model, established.facts, asked.lease
        ttl_s, drain_s = self._settings.lifetime(model.ttl_s, model.drain_s)
        moment = now.replace(microsecond=0)
        lease, change = self._leases.grant(
            connection,
            Lease(
                id="", renewals=0, resource=asked.name.path, version=prepared.resource.version,
                session=asked.session.ref, platform=platform_id(facts.tdx), targets=named,
                begun=0, issued=int(moment.timestamp()), ttl_s=ttl_s, drain_s=drain_s,
            ),
            renews=wanted.renews, now=now,
        )  # fmt: skip
        claims = TicketClaims(
            kbs=core.instance.id, realm=core.instance.realm.value, lease=lease.id,
            nonce=wanted.nonce, channel_keys=wanted.channel_keys, platform=lease.platform,
            launch_digest=next(iter(launch_digests(facts)), ""),
            models=(model.root,) if model.root else (), issued=moment, ttl_s=ttl_s,
            drain_s=drain_s, policy=policy_hash(prepared.entry.policies),
        )  # fmt: skip
        details = {
            "lease": lease.id, "renewals": lease.renewals, "ttl_s": ttl_s, "drain_s": drain_s,
            "ticket_claims": claims.digest,
        }  # fmt: skip
        # A lease changes nothing that another decision depends on.
        entry = replace(prepared.entry, change=change, details=details, administrative=False)
        return lease, claims, entry

    def _failed(self, asked: Asked, error: CaiError) -> Entry:
        return failed_entry(
            asked.action, asked.session, asked.request, error, subject=asked.name.uri,
            simulated=self._core.instance.realm is Realm.SIMULATED, unsafe=self._evaluator.unsafe,
        )  # fmt: skip


def _require_lease(asked: Asked, resource: Resource) -> None:
    if asked.lease is None and resource.lease is LeaseRule.REQUIRED:
        raise PolicyDenied(
            f"{asked.name.uri} is given away by lease only",
            hint="POST /kbs/v0/lease (docs/spec-lease.md)", code=LEASE_REQUIRED,
        )  # fmt: skip


def _blocked(entry: Entry, blocks: tuple[Block, ...]) -> tuple[Entry, CaiError | None]:
    if entry.verdict is None:
        raise CaiError("a decision without a verdict")
    if not blocks:
        verdict = entry.verdict.extended((check("kbs.blocks", passed=True, observed="none"),))
        return replace(entry, verdict=verdict), None
    checks = [
        check(
            f"revoked.{block.target.kind}", passed=False, observed=block.target.value,
            reason=f"revoked: {block.reason}",
        )
        for block in blocks
    ]  # fmt: skip
    verdict = entry.verdict.extended(checks)
    refused = replace(
        entry, allowed=False, reason=reasons(verdict), verdict=verdict, served=None
    )
    return refused, denied(refused)
