"""The key broker as guests meet it: protocol, decisions, database and audit log put together.

Synchronous, and safe to call from several threads; the HTTP surfaces call it off their event loop.
Every method that decides commits its audit row before it returns (decisions §6).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from cai.attest import jwe
from cai.attest.checkpoint import read_checkpoint
from cai.attest.facts import Facts
from cai.attest.jwk import PublicJwk
from cai.attest.lease import LeaseAnswer, LeaseGrant, LeaseRequest
from cai.attest.rcar import Challenge, Request
from cai.attest.ticket import Ticket, ticket_digest
from cai.errors import CaiError, FormatError, InputMissing, Unauthenticated
from cai.secret import Secret
from kbs.audit.log import Entry
from kbs.core import Core
from kbs.instance import Instance
from kbs.names import ResourceName
from kbs.policy.references import References
from kbs.policy.settings import PolicySettings
from kbs.policy.store import Policies
from kbs.protocol import attestation as protocol
from kbs.protocol import token
from kbs.protocol.sessions import Established, Session, State, session_ref
from kbs.protocol.verifier import Verifier
from kbs.release.evaluation import Evaluator, Rules
from kbs.release.pipeline import Asked, Pipeline
from kbs.release.refusal import evidence_refused, failed_entry, guest, reasons
from kbs.release.settings import ReleaseSettings
from kbs.release.ticket import issue_ticket
from kbs.resources.settings import ResourceSettings


class KeyBroker:
    """One key broker.

    Args:
        instance: its open database and keys.
        verifier: what it verifies evidence with.
        clock: the time; nobody outside can give it.
        unsafe: names of the ``unsafe_…`` settings in force.
        leases: how long they hold.
        resources: limits and retention of resources, and which live elsewhere.
        policy: limits of Rego evaluations, and life of reference values.
    """

    def __init__(
        self,
        instance: Instance,
        *,
        verifier: Verifier,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        unsafe: tuple[str, ...] = (),
        leases: ReleaseSettings | None = None,
        resources: ResourceSettings | None = None,
        policy: PolicySettings | None = None,
    ) -> None:
        self.instance = instance
        self.unsafe = unsafe
        self.verifier = verifier
        self.core = Core(instance, clock, resources=resources, policy=policy)
        self._evaluator = Evaluator(self.core, unsafe)
        self._pipeline = Pipeline(self.core, self._evaluator, leases or ReleaseSettings())
        self.count_failure = self.core.count_failure
        self.close = self.core.close

    def auth(self, body: bytes) -> tuple[dict[str, Any], str]:
        """Begin a session.

        Returns:
            The challenge, and the cookie value.

        Raises:
            FormatError, LimitExceeded: the request has another form, version or TEE, or there are
                too many sessions.
        """
        request = Request.parse(body)
        protocol.accept_request(request)
        core, selector = self.core, request.selector
        with core.database.write() as connection:
            cookie, session = core.sessions.begin(
                connection, version=request.version, tee=request.tee, now=core.clock(),
                selector=selector,
            )  # fmt: skip
        return Challenge(session.nonce).to_json(), cookie

    def attest(self, cookie: str, body: bytes, *, request: str) -> str:
        """Verify the evidence of a session.

        Returns:
            The token; of a session that attested before, the same token again.

        Raises:
            Unauthenticated: no such session, or its nonce was spent.
            FormatError, LimitExceeded: the message has another form.
            EvidenceRefused: a hard check failed; carries the verdict.
        """
        core, session = self.core, self._find(session_ref(cookie))
        if session.state is State.ATTESTED:
            with core.database.read() as connection:
                return core.sessions.established(connection, session).token
        try:
            attestation = protocol.parse_attestation(
                body, version=session.version, nonce=session.nonce
            )
            self._consume(session)
        except CaiError as error:
            entry = failed_entry(
                "attest", session, request, error, simulated=self.verifier.anchors.simulated,
                unsafe=self.unsafe,
            )  # fmt: skip
            core.record(entry)
            raise
        verified = self.verifier.attestation(
            attestation,
            nonce=session.nonce,
            now=core.clock(),
            require_agreement=self._wants_agreement(),
        )
        verdict = verified.verdict.extended((), unsafe=(*verified.verdict.unsafe, *self.unsafe))
        entry = Entry(
            "attest",
            guest(session),
            request,
            allowed=verified.facts is not None,
            reason=reasons(verdict),
            verdict=verdict,
            evidence=verified.evidence,
        )
        if verified.facts is None:
            core.record(entry)
            raise evidence_refused(verdict)
        established = self._establish(
            session, verified.facts, attestation.tee_pubkey, verified.evidence
        )
        with core.database.decide() as connection:
            core.sessions.complete(connection, session, established)
            core.audit.append(connection, entry, core.clock())
        return established.token

    def release(
        self, path: str, *, cookie: str | None, bearer: str | None, request: str
    ) -> bytes:
        """Give a resource to an attested guest.

        Args:
            path: ``repository/type/tag``.
            cookie: of the session.
            bearer: an attestation token instead.
            request: id of this request.

        Returns:
            The resource as a JWE that only that guest opens.

        Raises:
            Unauthenticated: no attested session.
            PolicyDenied: a policy says no, or there is none; carries the verdict.
            InputMissing: not a resource name; or policies would allow it, but there is none.
            Tampered: a stored row is not the one that was stored.
        """
        session = self._find(self._reference(cookie, bearer))
        decision = self._pipeline.decide(Asked(session, _resource_name(path), request))
        return jwe.encrypt(decision.resource.contents, decision.established.tee_pubkey)

    def lease(
        self, body: bytes, *, cookie: str | None, bearer: str | None, request: str
    ) -> dict[str, Any]:
        """Grant or renew a lease (docs/spec-lease.md §2).

        Blocks until the decision is under a checkpoint, about a second at most.

        Args:
            body: the request, canonical JSON.
            cookie: of the attested session.
            bearer: an attestation token instead.
            request: id of this request.

        Returns:
            The answer as a JSON value: JWE, ticket, consistency proof.

        Raises:
            FormatError, LimitExceeded: the request has another form.
            Unauthenticated: no attested session.
            PolicyDenied: a policy or a block says no; carries the verdict.
            InputMissing: policies would allow it, but there is no such resource.
            Tampered: a stored row is not the one that was stored.
        """
        wanted = LeaseRequest.parse(body)
        session = self._find(self._reference(cookie, bearer))
        name = _resource_name(wanted.resource)
        if wanted.resource != name.uri:
            raise FormatError("lease request: resource is not kbs:///repository/type/tag")
        decision = self._pipeline.decide(Asked(session, name, request, wanted))
        lease, claims = decision.lease, decision.claims
        if lease is None or claims is None:
            raise CaiError("a lease was allowed without being granted")
        ticket = issue_ticket(self.core, claims, decision.seq)
        grant = LeaseGrant(
            lease=lease.id, resource=name.uri, version=decision.resource.version,
            nonce=wanted.nonce, ttl_s=lease.ttl_s, drain_s=lease.drain_s,
            ticket=ticket_digest(ticket), contents=Secret(decision.resource.contents),
        )  # fmt: skip
        sealed = jwe.encrypt(grant.encode(), decision.established.tee_pubkey)
        return LeaseAnswer(sealed, ticket, self._growth(wanted, ticket)).to_json()

    def _growth(self, wanted: LeaseRequest, ticket: bytes) -> tuple[str, ...]:
        """Proof from the checkpoint that the guest knows to the one of its ticket."""
        known = wanted.checkpoint
        newest = read_checkpoint(Ticket.parse(ticket).audit.proof.note)
        if known is None or known.origin != newest.origin or known.size > newest.size:
            # There is none; the guest sees what that means.
            return ()
        steps = self.core.checkpoints.consistency(known.size, newest.size)
        return tuple(step.hex() for step in steps)

    def _reference(self, cookie: str | None, bearer: str | None) -> str:
        if cookie:
            return session_ref(cookie)
        if not bearer:
            self.count_failure("session")
            raise Unauthenticated("no session and no token", hint="attest first")
        try:
            return token.session_of_token(
                bearer,
                self.instance.token_key.public_key(),
                realm=self.instance.realm,
                instance=self.instance.id,
                now=self.core.clock(),
            )
        except Unauthenticated:
            self.count_failure("token")
            raise

    def _find(self, ref: str) -> Session:
        core = self.core
        try:
            with core.database.read() as connection:
                return core.sessions.find(connection, ref, now=core.clock())
        except Unauthenticated:
            self.count_failure("session")
            raise

    def _wants_agreement(self) -> bool:
        """Whether the policy in force demands that both TDX engines verify."""
        try:
            with self.core.database.read() as connection:
                verification = self.core.policies.for_id(connection).verification
        except CaiError:
            return True  # a damaged policy: the stricter reading
        return verification is not None and verification.tdx.require_agreement

    def _consume(self, session: Session) -> None:
        core = self.core
        with core.database.write() as connection:
            spent = core.sessions.consume(connection, session, now=core.clock())
        if not spent:
            raise Unauthenticated(
                "this session's nonce was used before", hint="start again with POST auth",
                code="nonce-replayed",
            )  # fmt: skip

    def _establish(
        self, session: Session, facts: Facts, key: PublicJwk, evidence: dict[str, str]
    ) -> Established:
        """What the session knows from now on; its token says what policies make of it today."""
        try:
            with self.core.database.read() as connection:
                rules = self._evaluator.for_anybody(connection)
        except CaiError:
            # A damaged policy row denies at release; it does not change what the evidence says.
            rules = Rules(Policies(), References())
        established = Established(facts, key, evidence, token="")
        claims = self._evaluator.claims(rules, session, established)
        return replace(established, token=token.sign_token(claims, self.instance.token_key))


def _resource_name(path: str) -> ResourceName:
    try:
        return ResourceName.parse(path)
    except FormatError as error:
        raise InputMissing(error.message, hint=error.hint, code="request-path") from error
