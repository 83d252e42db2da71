"""The key broker itself: protocol, decisions, database and audit log put together.

Synchronous, and safe to call from several threads; the HTTP surfaces call it off their event loop.
Every method that decides commits its audit row before it returns (decisions §6).
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final

from sqlalchemy import Connection

from cai.attest import jwe
from cai.attest.anchors import TrustAnchors
from cai.attest.gpu.ocsp_store import OcspStore
from cai.attest.gpu.rim_store import RimStore
from cai.attest.policy import VerificationPolicy
from cai.attest.rcar import Challenge, Request
from cai.attest.tdx.collateral import CollateralStore
from cai.attest.verdict import Check, Verdict, check
from cai.attest.verify import hardware_identity
from cai.errors import (
    CaiError,
    EvidenceRefused,
    FormatError,
    InputMissing,
    LimitExceeded,
    PolicyDenied,
    Unauthenticated,
)
from kbs import admin_auth, protocol, token
from kbs.audit import AuditLog, Entry, FailureCount, read_leaves
from kbs.database import POLICY, RESOURCE
from kbs.instance import Instance
from kbs.names import ResourceName
from kbs.rego import ReleasePolicy
from kbs.release import decide
from kbs.rows import SealedRows, Stored
from kbs.sessions import Established, Session, SessionStore, State, session_ref

MAX_RESOURCE = 1024 * 1024
"""Largest resource, bytes."""

RELEASE_POLICY: Final = "release"
"""Row of the Rego policy."""

VERIFICATION_POLICY: Final = "verification"
"""Row of ``policy.toml``."""

_POLICIES: Final[Mapping[str, Callable[[bytes], object]]] = {
    RELEASE_POLICY: ReleasePolicy.parse,
    VERIFICATION_POLICY: lambda data: VerificationPolicy.parse(data, where="policy.toml"),
}


@dataclass(frozen=True, slots=True)
class Policies:
    """The policies in force in one transaction."""

    verification: VerificationPolicy | None
    release: ReleasePolicy | None

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of each policy's exact bytes, hex; empty text where none is set."""
        return {
            VERIFICATION_POLICY: self.verification.digest if self.verification else "",
            RELEASE_POLICY: self.release.digest if self.release else "",
        }


class KeyBroker:
    """One key broker.

    Args:
        instance: its open database and keys.
        anchors: the roots it trusts; their kind must be that of the realm.
        collateral: Intel's statements about platforms.
        clock: the time; nobody outside can give it.
        unsafe: names of the ``unsafe_…`` settings in force.
        rims: NVIDIA's reference measurements; ``None`` does not compare.
        ocsp: NVIDIA's revocation answers; ``None`` does not ask.
    """

    def __init__(
        self,
        instance: Instance,
        *,
        anchors: TrustAnchors,
        collateral: CollateralStore,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        unsafe: tuple[str, ...] = (),
        rims: RimStore | None = None,
        ocsp: OcspStore | None = None,
    ) -> None:
        self.instance = instance
        self.unsafe = unsafe
        self._anchors = anchors
        self._collateral = collateral
        self._rims, self._ocsp = rims, ocsp
        self._clock = clock
        self._database = instance.database
        rows = {
            "instance": instance.id, "realm": instance.realm.value, "sealer": instance.sealer,
        }  # fmt: skip
        self._audit = AuditLog(instance.id, instance.realm.value)
        self._resources = SealedRows(RESOURCE, **rows)  # type: ignore[arg-type]
        self._policies = SealedRows(POLICY, **rows)  # type: ignore[arg-type]
        self._sessions = SessionStore(**rows)  # type: ignore[arg-type]
        self._failures = FailureCount()

    # The protocol.

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
        with self._database.write() as connection:
            cookie, session = self._sessions.begin(
                connection, version=request.version, tee=request.tee, now=self._clock()
            )
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
        session = self._find(session_ref(cookie))
        if session.state is State.ATTESTED:
            with self._database.read() as connection:
                return self._sessions.established(connection, session).token
        try:
            attestation = protocol.parse_attestation(
                body, version=session.version, nonce=session.nonce
            )
            self._consume(session)
        except CaiError as error:
            self._record(self._refusal("attest", session, request, error))
            raise
        verified = protocol.verify_attestation(
            attestation,
            nonce=session.nonce,
            realm=self.instance.realm,
            anchors=self._anchors,
            collateral=self._collateral,
            now=self._clock(),
            require_agreement=self._wants_agreement(),
            rims=self._rims,
            ocsp=self._ocsp,
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
            self._record(entry)
            verdict.require()
            raise EvidenceRefused(f"{verdict.subject} refused", verdict=verdict)
        with self._database.write() as connection:
            established = self._establish(connection, session, attestation.tee_pubkey, verified)
            self._sessions.complete(connection, session, established)
            self._audit.append(connection, entry, self._clock())
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
            Tampered: the stored row is not the one that was stored.
        """
        session = self._find(self._reference(cookie, bearer))
        try:
            name = ResourceName.parse(path)
        except FormatError as error:
            raise InputMissing(error.message, hint=error.hint, code="request-path") from error
        refused: CaiError | None = None
        stored: Stored | None = None
        with self._database.write() as connection:
            entry: Entry
            try:
                established = self._sessions.established(connection, session)
                entry = self._decide(connection, session, established, name, request)
                if entry.allowed:
                    stored = self._resources.get(connection, name.path)
                    entry, refused = _with_resource(entry, stored, name)
                else:
                    refused = _denied(entry)
            except CaiError as error:
                entry = self._refusal("release", session, request, error, subject=name.uri)
                refused = error
            self._audit.append(connection, entry, self._clock())
        # Committed: only now may the answer leave.
        if refused is not None:
            raise refused
        if stored is None:
            raise CaiError("a release was allowed without a resource")
        return jwe.encrypt(stored.contents, established.tee_pubkey)

    # Administration.

    def authenticate(self, authorization: str | None) -> str:
        """The administrator's name behind an ``Authorization`` header.

        Raises:
            Unauthenticated: none.
        """
        try:
            return admin_auth.authenticate(
                authorization, self.instance.admin_key, now=self._clock()
            )
        except Unauthenticated:
            self.count_failure("admin")
            raise

    def set_resource(self, path: str, contents: bytes, *, admin: str, request: str) -> int:
        """Store the next version of a resource.

        Returns:
            Its version.

        Raises:
            FormatError, LimitExceeded: not a resource name, empty, or too long.
        """
        name = ResourceName.parse(path)
        if not contents:
            raise FormatError("a resource must not be empty")
        if len(contents) > MAX_RESOURCE:
            raise LimitExceeded(
                f"resource of {len(contents)} bytes, at most {MAX_RESOURCE} are stored"
            )
        with self._database.write() as connection:
            change = self._resources.put(connection, name.path, contents)
            entry = Entry(
                "resource.set", _admin(admin), request, allowed=True, subject=name.uri,
                change=change,
            )  # fmt: skip
            self._audit.append(connection, entry, self._clock())
        return change.version

    def set_policy(self, kind: str, text: bytes, *, admin: str, request: str) -> str:
        """Store a policy, checked first.

        Args:
            kind: ``RELEASE_POLICY`` or ``VERIFICATION_POLICY``.
            text: its exact bytes.
            admin: who sets it.
            request: id of this request.

        Returns:
            SHA-256 of the text, hex.

        Raises:
            FormatError, SettingError, LimitExceeded: the policy is not sound.
        """
        policy = _POLICIES[kind](text)
        digest: str = policy.digest  # type: ignore[attr-defined]
        with self._database.write() as connection:
            change = self._policies.put(connection, kind, text)
            entry = Entry(
                f"policy.{kind}.set", _admin(admin), request, allowed=True, change=change,
                policies={kind: digest},
            )  # fmt: skip
            self._audit.append(connection, entry, self._clock())
        return digest

    def policy_text(self, kind: str) -> bytes | None:
        """A policy's exact bytes, or ``None`` when none is set."""
        with self._database.read() as connection:
            stored = self._policies.get(connection, kind)
        return None if stored is None else stored.contents

    def audit_leaves(self, *, start: int, limit: int) -> tuple[int, list[bytes]]:
        """Size of the audit log, and its leaves from ``start``."""
        return read_leaves(self._database, start=start, limit=limit)

    # The end and the edges.

    def count_failure(self, kind: str) -> None:
        """Count a failure that anybody could cause; at most one audit row a minute."""
        now = self._clock()
        counts = self._failures.note(kind, now)
        if counts:
            self._record(_counted(counts))

    def close(self) -> None:
        """Write what is not written yet and close the database."""
        rest = self._failures.rest()
        if rest:
            self._record(_counted(rest))
        self._database.close()

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
                now=self._clock(),
            )
        except Unauthenticated:
            self.count_failure("token")
            raise

    def _find(self, ref: str) -> Session:
        try:
            with self._database.read() as connection:
                return self._sessions.find(connection, ref, now=self._clock())
        except Unauthenticated:
            self.count_failure("session")
            raise

    def _wants_agreement(self) -> bool:
        """Whether the policy in force demands that both TDX engines verify."""
        try:
            with self._database.read() as connection:
                verification = self._current(connection).verification
        except CaiError:
            return True  # a damaged policy: the stricter reading
        return verification is not None and verification.tdx.require_agreement

    def _consume(self, session: Session) -> None:
        with self._database.write() as connection:
            spent = self._sessions.consume(connection, session, now=self._clock())
        if not spent:
            raise Unauthenticated(
                "this session's nonce was used before", hint="start again with POST auth"
            )

    def _establish(
        self, connection: Connection, session: Session, key: Any, verified: protocol.Verified
    ) -> Established:
        facts = verified.facts
        if facts is None:
            raise CaiError("facts are missing after a passed verification")
        try:
            policies = self._current(connection)
        except CaiError:
            # A damaged policy row denies at release; it does not change what the evidence says.
            policies = Policies(None, None)
        now = self._clock()
        verification = policies.verification
        appraisal = verification.appraise(facts, now=now) if verification else None
        established = Established(facts, key, verified.evidence, token="")
        claims = self._claims(session, established, policies, appraisal)
        signed = token.sign_token(claims, self.instance.token_key)
        return Established(facts, key, verified.evidence, signed)

    def _decide(
        self,
        connection: Connection,
        session: Session,
        established: Established,
        name: ResourceName,
        request: str,
    ) -> Entry:
        policies = self._current(connection)
        facts, now = established.facts, self._clock()
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
            issued=self._clock(),
            expires=session.expires,
            ref=session.ref,
        )

    def _current(self, connection: Connection) -> Policies:
        verification = self._policies.get(connection, VERIFICATION_POLICY)
        release = self._policies.get(connection, RELEASE_POLICY)
        return Policies(
            None
            if verification is None
            else VerificationPolicy.parse(verification.contents, where="policy.toml"),
            None if release is None else ReleasePolicy.stored(release.contents),
        )

    def _refusal(
        self, action: str, session: Session, request: str, error: CaiError, *, subject: str = ""
    ) -> Entry:
        failed = check(f"kbs.{error.machine_code}", passed=False, reason=error.message)
        verdict = Verdict(
            subject=action,
            checks=(failed,),
            simulated=self._anchors.simulated,
            unsafe=self.unsafe,
        )
        return Entry(
            action, _guest(session), request, allowed=False, reason=error.message,
            subject=subject, verdict=verdict,
        )  # fmt: skip

    def _record(self, entry: Entry) -> None:
        with self._database.write() as connection:
            self._audit.append(connection, entry, self._clock())


def _guest(session: Session) -> dict[str, str]:
    return {"kind": "guest", "session": session.ref}


def _admin(name: str) -> dict[str, str]:
    return {"kind": "admin", "name": name}


def _counted(counts: dict[str, int]) -> Entry:
    return Entry(
        "unauthenticated", {"kind": "unknown"}, uuid.uuid4().hex, allowed=False,
        reason="no session, token or signature that this broker knows", details=counts,
    )  # fmt: skip


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
