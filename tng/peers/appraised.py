"""Session proofs of our dialect, appraised by an attestation service.

The service says whether the evidence is genuine and what its policies make of it. That the evidence
is about this session is checked here, because no service can know it (decisions §2.4).
"""

from __future__ import annotations

from datetime import UTC, datetime

from cai import jcs
from cai.attest.channel import check_session, ticket_checks
from cai.attest.rcar import encode_tdx_evidence
from cai.attest.statement import MAX_STATEMENT, Purpose, report_data
from cai.attest.verdict import Binding, Verdict, check
from cai.errors import InputError
from tng.channel.handshake import Claim
from tng.config.trust import ServiceVerify
from tng.peers.judge import proven, ticket_keys
from tng.stock.service import AppraisalService, TrustedRoots, nvidia_device
from tng.stock.token import Token, verify_token
from tng.streams import Proven

STATEMENT_CLAIM = "cai_statement"
"""Member of a token's runtime claims in which our service repeats the statement it appraised."""


class ServiceJudge:
    """Judges session proofs through a service.

    Args:
        settings: the ``verify`` of an entry.
        service: the service that it names.
        roots: what its tokens' signer must lead to.
    """

    kind = "attestation service"

    def __init__(
        self, settings: ServiceVerify, service: AppraisalService, roots: TrustedRoots
    ) -> None:
        self._settings = settings
        self._service = service
        self._roots = roots

    @property
    def unsafe(self) -> tuple[str, ...]:
        """The ``unsafe_…`` settings in force."""
        return self._settings.unsafe

    async def judge(self, claim: Claim, subject: str) -> Proven:
        """Verify a claim.

        Raises:
            EvidenceRefused: naming every failed check, with the verdict.
            PeerUnreachable, PeerError: the service gives no appraisal.
        """
        # (1) What only this end can know: session, statement, expectation.
        checks, _statement = check_session(claim.evidence, claim.leaf, expect=self._settings.expect)
        local = Verdict(subject, checks, binding=Binding.SESSION, unsafe=self.unsafe)
        local.require()
        local = local.extended(
            ticket_checks(
                claim.evidence,
                claim.leaf,
                keys=ticket_keys(self._settings.kbs_key),
                platform="",
                simulated=False,
                now=datetime.now(UTC),
            )
        )
        local.require()
        roots = await self._roots.get()
        evidence = claim.evidence.evidence
        text = await self._service.appraise_raw(
            encode_tdx_evidence(evidence.quote, evidence.event_log),
            report_data(claim.evidence.statement, Purpose.CHANNEL),
            claim.evidence.statement,
            [nvidia_device(device) for device in evidence.devices],
            self._settings.policy_ids,
        )
        try:
            token = Token.parse(text)
            more = [
                # (2) Signer, time, statuses and policies of the token.
                *verify_token(
                    token, roots=roots, policy_ids=self._settings.policy_ids, now=datetime.now(UTC)
                ),
                # (3) It is about this statement.
                check(
                    "as.statement",
                    passed=token.runtime_claims.get(STATEMENT_CLAIM)
                    == jcs.parse(claim.evidence.statement, what="statement", limit=MAX_STATEMENT),
                    reason="the token is about another statement",
                ),
            ]
        except InputError as error:
            more = [check("as.token", passed=False, reason=error.message)]
        verdict = local.extended(more)
        verdict.require()
        return proven(verdict, claim.evidence, asks_ticket=bool(self._settings.kbs_key))

