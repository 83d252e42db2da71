"""The key broker as guests meet it: protocol, decisions, database and audit log put together.

Synchronous, and safe to call from several threads; the HTTP surfaces call it off their event loop.
Every method that decides commits its audit row before it returns (decisions §6).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection

from cai.attest import jwe
from cai.attest.facts import Facts
from cai.attest.jwk import PublicJwk
from cai.attest.rcar import Challenge, Request
from cai.attest.verdict import Check, Verdict, check
from cai.attest.verify import hardware_identity
from cai.errors import (
    CaiError,
    EvidenceRefused,
    FormatError,
    InputMissing,
    PolicyDenied,
    Unauthenticated,
)
from kbs.audit.log import Entry
from kbs.core import Core
from kbs.instance import Instance
from kbs.names import ResourceName
from kbs.policy.rows import Policies, current_policies
from kbs.protocol import attestation as protocol
from kbs.protocol import token
from kbs.protocol.sessions import Established, Session, State, session_ref
from kbs.protocol.verifier import Verifier
from kbs.release.decision import decide
from kbs.rows import Stored


class KeyBroker:
    """One key broker.

    Args:
        instance: its open database and keys.
        verifier: what it verifies evidence with.
        clock: the time; nobody outside can give it.
        unsafe: names of the ``unsafe_…`` settings in force.
    """

    def __init__(
        self,
        instance: Instance,
        *,
        verifier: Verifier,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        unsafe: tuple[str, ...] = (),
    ) -> None:
        self.instance = instance
        self.unsafe = unsafe
        self.verifier = verifier
        self.core = Core(instance, clock)
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
            core.record(self._refusal("attest", session, request, error))
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
            _guest(session),
            request,
            allowed=verified.facts is not None,
            reason=_reasons(verdict),
            verdict=verdict,
            evidence=verified.evidence,
        )
        if verified.facts is None:
            core.record(entry)
            verdict.require()
            raise EvidenceRefused(f"{verdict.subject} refused", verdict=verdict)
        with core.database.write() as connection:
            established = self._establish(
                connection, session, verified.facts, attestation.tee_pubkey, verified.evidence
            )
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
        core, session = self.core, self._find(self._reference(cookie, bearer))
        try:
            name = ResourceName.parse(path)
        except FormatError as error:
            raise InputMissing(error.message, hint=error.hint, code="request-path") from error
        refused: CaiError | None = None
        stored: Stored | None = None
        with core.database.decide() as connection:
            try:
                established = core.sessions.established(connection, session)
                entry = self._decide(connection, session, established, name, request)
                if entry.allowed:
                    stored = core.resources.get(connection, name.path)
                    entry, refused = _with_resource(entry, stored, name)
                else:
                    refused = _denied(entry)
            except CaiError as error:
                entry = self._refusal("release", session, request, error, subject=name.uri)
                refused = error
            core.audit.append(connection, entry, core.clock())
        # Committed: only now may the answer leave.
        if refused is not None:
            raise refused
        if stored is None:
            raise CaiError("a release was allowed without a resource")
        return jwe.encrypt(stored.contents, established.tee_pubkey)

    def lease(
        self, body: bytes, *, cookie: str | None, bearer: str | None, request: str
    ) -> dict[str, Any]:
        """Grant or renew a lease (docs/spec-lease.md §2).

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
            PolicyDenied: a policy or a block says no.
            InputMissing: policies would allow it, but there is no such resource.
        """
        del body, cookie, bearer, request
        raise InputMissing("leases are not granted yet")

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
                verification = current_policies(self.core.policies, connection).verification
        except CaiError:
            return True  # a damaged policy: the stricter reading
        return verification is not None and verification.tdx.require_agreement

    def _consume(self, session: Session) -> None:
        core = self.core
        with core.database.write() as connection:
            spent = core.sessions.consume(connection, session, now=core.clock())
        if not spent:
            raise Unauthenticated(
                "this session's nonce was used before", hint="start again with POST auth"
            )

    def _establish(
        self,
        connection: Connection,
        session: Session,
        facts: Facts,
        key: PublicJwk,
        evidence: dict[str, str],
    ) -> Established:
        try:
            policies = current_policies(self.core.policies, connection)
        except CaiError:
            # A damaged policy row denies at release; it does not change what the evidence says.
            policies = Policies()
        verification = policies.verification
        appraisal = (
            verification.appraise(facts, now=self.core.clock()) if verification else None
        )
        established = Established(facts, key, evidence, token="")
        claims = self._claims(session, established, policies, appraisal)
        return replace(established, token=token.sign_token(claims, self.instance.token_key))

    def _decide(
        self,
        connection: Connection,
        session: Session,
        established: Established,
        name: ResourceName,
        request: str,
    ) -> Entry:
        policies = current_policies(self.core.policies, connection)
        facts, now = established.facts, self.core.clock()
        verdict = decide(
            facts,
            resource=name,
            realm=self.instance.realm,
            verification=policies.verification,
            release=policies.release,
            claims=lambda checks: self._claims(session, established, policies, checks),
            hardware=hardware_identity(facts, now=now),
            now=now,
        )
        verdict = verdict.extended((), unsafe=(*verdict.unsafe, *self.unsafe))
        return Entry(
            "release",
            _guest(session),
            request,
            allowed=verdict.passed,
            reason=_reasons(verdict),
            subject=name.uri,
            verdict=verdict,
            evidence=established.evidence,
            policies=policies.digests,
        )

    def _claims(
        self,
        session: Session,
        established: Established,
        policies: Policies,
        appraisal: tuple[Check, ...] | None,
    ) -> dict[str, Any]:
        return token.token_claims(
            established.facts,
            appraisal,
            policy_digest=policies.verification.digest if policies.verification else None,
            realm=self.instance.realm,
            instance=self.instance.id,
            runtime={"nonce": session.nonce, "tee-pubkey": established.tee_pubkey.to_json()},
            evidence=established.evidence,
            issued=self.core.clock(),
            expires=session.expires,
            ref=session.ref,
        )

    def _refusal(
        self, action: str, session: Session, request: str, error: CaiError, *, subject: str = ""
    ) -> Entry:
        failed = check(f"kbs.{error.machine_code}", passed=False, reason=error.message)
        verdict = Verdict(
            subject=action,
            checks=(failed,),
            simulated=self.verifier.anchors.simulated,
            unsafe=self.unsafe,
        )
        return Entry(
            action, _guest(session), request, allowed=False, reason=error.message,
            subject=subject, verdict=verdict,
        )  # fmt: skip


def _guest(session: Session) -> dict[str, str]:
    return {"kind": "guest", "session": session.ref}



def _reasons(verdict: Verdict) -> str:
    return "; ".join(f"{item.name}: {item.reason}" for item in verdict.failures)


def _denied(entry: Entry) -> PolicyDenied:
    return PolicyDenied(
        f"Access denied by policy: {entry.reason}",
        verdict=entry.verdict,
        hint="the administrator sees every check with `kbs audit show`",
    )


def _with_resource(
    entry: Entry, stored: Stored | None, name: ResourceName
) -> tuple[Entry, CaiError | None]:
    if stored is not None:
        return replace(entry, served=stored.version), None
    missing = InputMissing(f"there is no resource {name.uri}", hint="kbs resource set URI FILE")
    return replace(entry, allowed=False, reason=missing.message), missing
