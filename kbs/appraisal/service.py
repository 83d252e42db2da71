"""The attestation service: evidence in, a signed appraisal out, nothing released.

Synchronous, and safe to call from several threads. It verifies what the broker's own protocol
verifies, with the same roots and policies; its tokens have another key, audience and use.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from sqlalchemy import Connection

from cai import jcs
from cai.attest.channel import gpu_checks
from cai.attest.facts import Facts
from cai.attest.rcar import MAX_MESSAGE, TEE, tee_name
from cai.attest.statement import ChannelStatement
from cai.attest.verdict import Binding, Check, Verdict, check
from cai.errors import EvidenceRefused, FormatError, InputMissing, Unauthenticated
from kbs.appraisal.challenges import Challenge, ChallengeStore, Freshness, nonce_of_token
from kbs.appraisal.request import Question, parse_question
from kbs.appraisal.settings import AppraisalSettings
from kbs.appraisal.tokens import USE, authorities, key_set, sign_appraisal
from kbs.audit.leaf import Entry
from kbs.core import Core
from kbs.keys.signing import KeyName
from kbs.names import Realm
from kbs.policy.appraisal import appraise
from kbs.policy.names import DEFAULT_ID, PolicyKind
from kbs.policy.references import References
from kbs.policy.store import Policies, digests_for_log
from kbs.protocol.slim import slim
from kbs.protocol.token import TokenContext, ear_claims
from kbs.protocol.verifier import Verifier

SUBJECT = "tdx guest at the attestation service"
"""What a verdict of this module is about."""

STATEMENT_CLAIM = "cai_statement"
"""Member of the runtime data claims that holds our own statement."""

AUDIENCE_CLAIM = "cai.audience"
"""Member of every token that says who it is for, also where a stock reader allows no ``aud``."""

FRESHNESS_CLAIM = "challenge"
"""Member of the claims ``cai`` that says whether the evidence answers a challenge of ours."""


@dataclass(frozen=True, slots=True)
class _Rules:
    policies: Policies
    references: References


class AttestationService:
    """The attestation service of one broker.

    Args:
        core: the broker's state.
        verifier: what it verifies evidence with.
        settings: of the service.
        unsafe: names of the ``unsafe_…`` settings in force.
    """

    def __init__(
        self, core: Core, verifier: Verifier, settings: AppraisalSettings, unsafe: tuple[str, ...]
    ) -> None:
        self._core = core
        self._verifier = verifier
        self._settings = settings
        self._unsafe = unsafe
        self._challenges = ChallengeStore()

    @property
    def audience(self) -> str:
        """``aud`` of the tokens."""
        return self._settings.audience or f"cai-as/{self._core.instance.id}"

    def challenge(self, body: bytes) -> Challenge:
        """Give a challenge.

        Args:
            body: an empty object, or Trustee's map with ``tee`` and ``tee_params``.

        Raises:
            FormatError, LimitExceeded: it has another form, or names a TEE that is not served.
            TooBusy: too many challenges wait for an answer.
        """
        wants_token(body)
        core = self._core
        with core.database.write() as connection:
            key = core.signing.current(connection, KeyName.APPRAISAL)
            return self._challenges.give(connection, key, now=core.clock())

    def appraise(self, body: bytes, *, request: str) -> str:
        """Verify and appraise evidence.

        Args:
            body: a request of Trustee's newer or older shape.
            request: id of this request.

        Returns:
            The token.

        Raises:
            FormatError, LimitExceeded: the request has another form.
            Unauthenticated: its challenge is not good, or there is none and there must be.
            EvidenceRefused: a hard check failed; carries the verdict.
            InputMissing: there is no policy of that id.
        """
        core = self._core
        question = parse_question(body)
        rules = self._rules(question.policy_id)
        freshness = self._answer(question)
        verdict, facts = self._verify(question, rules.policies)
        if facts is None:
            core.count_failure("appraisal")
            verdict.require()
            raise EvidenceRefused(f"{verdict.subject} refused", verdict=verdict)
        evidence = _digests(question)
        claims = self._claims(question, facts, rules, freshness, evidence)
        entry = Entry(
            "appraise", {"kind": "unknown"}, request, allowed=True, verdict=verdict,
            subject=question.policy_id, evidence=evidence,
            policies=digests_for_log(rules.policies, rules.references.digest),
            details={
                "challenge": freshness.value,
                "status": {name: item["ear.status"] for name, item in claims["submods"].items()},
            },
        )  # fmt: skip
        with core.database.decide() as connection:
            key = core.signing.current(connection, KeyName.APPRAISAL)
            core.audit.append(connection, entry, core.clock())
        return sign_appraisal(claims, key)

    def certificate(self) -> str:
        """The authorities to pin, PEM."""
        with self._core.database.read() as connection:
            return authorities(
                self._core.signing.living(connection, KeyName.APPRAISAL, self._core.clock())
            )

    def key_set(self) -> dict[str, Any]:
        """The keys whose signatures are good, as a JWK set."""
        with self._core.database.read() as connection:
            return key_set(
                self._core.signing.living(connection, KeyName.APPRAISAL, self._core.clock())
            )

    def policies(self) -> list[dict[str, str]]:
        """The attestation policies that everybody's evidence is appraised with, by id."""
        with self._core.database.read() as connection:
            names = self._core.policies.names(connection)
        return [
            {"policy-id": name.rest}
            for name in names
            if name.kind is PolicyKind.ATTESTATION and not name.tenant
        ]

    def _rules(self, policy_id: str) -> _Rules:
        core = self._core
        with core.database.read() as connection:
            self._require_known(connection, policy_id)
            return _Rules(
                core.policies.for_id(connection, policy_id),
                core.references.current(connection, now=core.clock()),
            )

    def _require_known(self, connection: Connection, policy_id: str) -> None:
        if policy_id != DEFAULT_ID and policy_id not in self._core.policies.known_ids(connection):
            raise InputMissing(
                f"there is no policy {policy_id[:64]!r}", hint="GET policy lists them"
            )

    def _answer(self, question: Question) -> Freshness:
        """Spend the challenge before anything is verified (decisions §6)."""
        nonce = question.nonce
        if question.challenge_token:
            nonce = nonce_of_token(question.challenge_token)
        freshness = Freshness.NONE
        if nonce:
            core = self._core
            with core.database.write() as connection:
                freshness = self._challenges.answer(connection, nonce, now=core.clock())
        if freshness is Freshness.NONE and question.challenge_token:
            raise Unauthenticated(
                "the challenge is not of this service, or has expired",
                hint="ask for another with POST challenge", code="challenge-unknown",
            )  # fmt: skip
        if freshness is Freshness.NONE and self._settings.require_challenge:
            raise Unauthenticated(
                "the evidence answers no challenge of this service",
                hint="ask for one with POST challenge", code="challenge-missing",
            )  # fmt: skip
        return freshness

    def _verify(self, question: Question, policies: Policies) -> tuple[Verdict, Facts | None]:
        # (1) Quote, event log and devices are genuine and carry these bytes.
        verification = policies.verification
        verdict, facts = self._verifier.evidence(
            question.evidence, subject=SUBJECT, report_data=question.report_data,
            gpu_nonce=question.gpu_nonce, now=self._core.clock(),
            require_agreement=verification is not None and verification.tdx.require_agreement,
        )  # fmt: skip
        more: list[Check] = []
        # (2) Of a statement, which the bytes bind: its devices are the ones that came along.
        if question.statement is not None:
            more += gpu_checks(question.statement, question.evidence.gpu_digest)
        # (3) A simulated platform can never speak in the production realm, nor the other way round.
        simulated, realm = self._verifier.anchors.simulated, self._verifier.realm
        more.append(
            check(
                "kbs.realm",
                passed=simulated is (realm is Realm.SIMULATED),
                observed="simulated" if simulated else "production",
                expected=realm.value,
                reason="the trust anchors are of another realm",
            )
        )
        # (4) Init-data, where the client names some, is what MRCONFIGID says.
        if question.init_data and facts is not None:
            found = facts.tdx.body["mr_config_id"]
            more.append(
                check(
                    "tdx.init_data", passed=found == question.init_data, observed=found,
                    expected=question.init_data,
                    reason="MRCONFIGID is not the digest of the init-data",
                )
            )  # fmt: skip
        verdict = verdict.extended(more, binding=Binding.TOKEN, unsafe=self._unsafe)
        if facts is None or not verdict.passed:
            return verdict, None
        # (5) Only now are the statement's words facts.
        if question.statement is not None:
            facts = facts.with_statement(question.statement)
        return verdict, facts

    def _claims(
        self,
        question: Question,
        facts: Facts,
        rules: _Rules,
        freshness: Freshness,
        evidence: Mapping[str, str],
    ) -> dict[str, Any]:
        core, now = self._core, self._core.clock()
        (_, cpu), *_ = facts.claims()
        own = cpu["cai"]
        appraisal = appraise(
            facts, rules.policies, rules.references, now=now, pool=core.rego,
            runtime=_runtime(question),
            more={"cai": {**(own if isinstance(own, dict) else {}),
                          FRESHNESS_CLAIM: freshness.value}},
        )  # fmt: skip
        context = TokenContext(
            issuer=core.instance.realm.issuer, audience=self.audience, use=USE, issued=now,
            expires=int(now.timestamp()) + self._settings.token_seconds, id=uuid.uuid4().hex,
        )  # fmt: skip
        claims = ear_claims(appraisal, context, evidence=evidence, simulated=facts.simulated)
        claims[AUDIENCE_CLAIM] = self.audience
        if question.statement is None and not self._settings.audience:
            # Stock readers (TNG 2.12) refuse any token with an `aud`, since they expect none.
            del claims["aud"]
        return claims if self._settings.verbose else slim(claims)


def wants_token(body: bytes) -> bool:
    """Whether a challenge is asked for as our relatives ask, and not as Trustee does.

    Raises:
        FormatError, LimitExceeded: neither, or a TEE that is not served.
    """
    value = jcs.parse(body or b"{}", what="challenge request", limit=MAX_MESSAGE)
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise FormatError("challenge request: expected an object of strings")
    if "tee" not in value:
        return True
    if tee_name(value["tee"].lower()) != TEE:
        raise FormatError(f"TEE {value['tee'][:32]!r} is not served here", hint=f"use {TEE}")
    return False


def _runtime(question: Question) -> dict[str, Any] | None:
    if question.statement is not None:
        return {STATEMENT_CLAIM: _statement_claims(question.statement)}
    return question.structured


def _statement_claims(statement: ChannelStatement) -> dict[str, Any]:
    value = jcs.parse(statement.encode(), what="statement", limit=MAX_MESSAGE)
    return dict(value)


def _digests(question: Question) -> dict[str, str]:
    evidence = question.evidence
    digests = {
        "quote_sha256": sha256(evidence.quote).hexdigest(),
        "gpu_digest": evidence.gpu_digest.hex(),
    }
    if evidence.event_log is not None:
        digests["event_log_sha256"] = sha256(evidence.event_log).hexdigest()
    additional = (question.structured or {}).get("additional-evidence")
    if isinstance(additional, str):
        digests["additional_sha256"] = sha256(additional.encode("utf-8")).hexdigest()
    return digests
