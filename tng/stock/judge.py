"""What a peer's stock certificate proves: checks, and for how long they hold.

The binding is to the key, not to the session (``Binding.KEY``): stock certificates carry no nonce.
Every check is here, so that a built-in verification and one by a service end in the same verdict.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

from cai.attest.verdict import Binding as ProofBinding
from cai.attest.verdict import Check, Verdict, check, not_asked
from cai.errors import CaiError, InputError, SettingError
from tng.config.trust import Binding, BuiltinVerify, Model, ServiceVerify
from tng.peers.references import References
from tng.stock.built_in import verify_built_in
from tng.stock.certificate import (
    DIALECT_CLAIM,
    Presented,
    bound_key,
    parse_certificate,
)
from tng.stock.service import AppraisalService, TrustedRoots, devices_of
from tng.stock.token import Token, about_claims, verify_token
from tng.streams import Proven

MAX_VERDICT_S = 300.0
"""How long a verdict about one certificate is used again, seconds."""

MAX_VERDICTS = 1024
"""Most verdicts that are kept."""

RISK_FRESH = "a stock certificate carries no nonce: its evidence is as old as the certificate"
"""What no check covers, as the verdict says it."""


@dataclass(frozen=True, slots=True)
class _Kept:
    proven: Proven
    until: float


class CertificateJudge:
    """Judges the certificates of stock peers.

    Args:
        settings: the ``verify`` of an entry.
        references: policy, collateral and roots of a built-in verification.
    """

    def __init__(
        self, settings: BuiltinVerify | ServiceVerify, references: References | None
    ) -> None:
        self._settings = settings
        self._references = references
        self._service: AppraisalService | None = None
        self._roots: TrustedRoots | None = None
        if isinstance(settings, ServiceVerify):
            if settings.as_addr:
                self._service = AppraisalService(settings.as_addr, settings.as_headers)
            self._roots = TrustedRoots(settings, self._service)
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()

    async def close(self) -> None:
        """Close the connections to the service."""
        if self._service is not None:
            await self._service.close()

    async def judge(self, der: bytes | None, subject: str) -> Proven:
        """Verify the certificate that a peer presented.

        Args:
            der: the certificate; ``None`` when it presented none.
            subject: what is verified, as the verdict names it.

        Raises:
            EvidenceRefused: naming every failed check, with the verdict.
            PeerUnreachable, PeerError: the attestation service gives no appraisal.
            CaiError: its certificate cannot be had.
        """
        if der is None:
            raise _refused(subject, "stock.certificate", "the peer presented no certificate")
        key, now = sha256(der).digest(), datetime.now(UTC)
        kept = self._kept.get(key)
        if kept is not None and kept.until > now.timestamp():
            return Proven(kept.proven.verdict, kept.until - now.timestamp())
        try:
            presented = parse_certificate(der)
        except InputError as error:
            raise _refused(subject, "stock.certificate", error.message) from error
        verdict, ends = await self._verify(presented, subject, now)
        verdict.require()
        until = min(ends, now.timestamp() + MAX_VERDICT_S)
        proven = Proven(verdict, max(0.0, until - now.timestamp()))
        self._kept[key] = _Kept(proven, until)
        while len(self._kept) > MAX_VERDICTS:
            self._kept.popitem(last=False)
        return proven

    async def _verify(
        self, presented: Presented, subject: str, now: datetime
    ) -> tuple[Verdict, float]:
        # (1) The certificate is in date; stock TNG does not look.
        checks = [
            check(
                "stock.certificate",
                passed=presented.not_before <= now <= presented.not_after,
                observed=presented.not_after.isoformat(timespec="seconds"),
                reason="the peer's certificate is not in date",
            )
        ]
        ends = presented.not_after.timestamp()
        try:
            if isinstance(self._settings, ServiceVerify):
                verdict, token_ends = await self._by_service(presented, self._settings, now)
                ends = min(ends, token_ends)
            else:
                verdict = await asyncio.to_thread(self._built_in, presented, now)
        except (InputError, SettingError) as error:
            malformed = check("stock.evidence", passed=False, reason=error.message)
            verdict = Verdict(subject, (malformed,))
        return (
            Verdict(
                subject,
                (*checks, *verdict.checks),
                simulated=verdict.simulated,
                binding=ProofBinding.KEY,
                hardware=verdict.hardware,
                unsafe=verdict.unsafe,
                residual_risks=(*verdict.residual_risks, RISK_FRESH),
            ),
            ends,
        )

    async def _by_service(
        self, presented: Presented, settings: ServiceVerify, now: datetime
    ) -> tuple[Verdict, float]:
        assert self._roots is not None  # noqa: S101 - by __init__
        roots = await self._roots.get()
        wanted = (Model.PASSPORT if presented.token else Model.BACKGROUND_CHECK).value
        # (2) The model of the settings is the one that the peer uses.
        checks = [
            check(
                "stock.model",
                passed=settings.model.value == wanted and self._has_payload(presented),
                observed=wanted if self._has_payload(presented) else "no evidence",
                expected=settings.model.value,
                reason="the peer's certificate carries no evidence for this model",
            )
        ]
        unsafe = settings.unsafe
        if checks[0].outcome.value == "fail":
            return Verdict("", tuple(checks), unsafe=unsafe), now.timestamp()
        text = presented.token
        claims: dict[str, Any] = {}
        if presented.evidence is not None and self._service is not None:
            claims = presented.evidence.claims
            devices = devices_of(presented.evidence)
            text = await self._service.appraise(presented.evidence, devices, settings.policy_ids)
        token = Token.parse(text)
        # (3) Signer, time, statuses and policies of the token.
        checks += verify_token(
            token, roots=roots, policy_ids=settings.policy_ids, now=now
        )
        # (4) The token is about these claims; (5) the claims are about this key.
        appraised = token.runtime_claims
        if claims:
            checks.append(about_claims(token, claims))
        checks += self._claims(claims or dict(appraised), presented)
        ends = float(token.expires or 0)
        return Verdict("", tuple(checks), unsafe=unsafe), ends

    def _built_in(self, presented: Presented, now: datetime) -> Verdict:
        references, evidence = self._references, presented.evidence
        if references is None or evidence is None:
            failed = check(
                "stock.model",
                passed=False,
                reason="the peer's certificate carries no evidence that can be verified here",
            )
            return Verdict("", (failed,))
        return verify_built_in(
            evidence, self._claims(evidence.claims, presented), references=references, now=now
        )

    def _claims(self, claims: dict[str, Any], presented: Presented) -> list[Check]:
        bound = bound_key(claims)
        ours = DIALECT_CLAIM in claims
        asked = self._settings.binding is not Binding.KEY
        return [
            check(
                "stock.key",
                passed=bound == sha256(presented.spki).digest(),
                observed=bound.hex() if bound else "none",
                expected=sha256(presented.spki).hexdigest(),
                reason="the evidence is about another key",
            ),
            # A guest of ours would have spoken cai/1: somebody in between took the offer away.
            check(
                "channel.downgrade",
                passed=not ours,
                reason="the guest speaks cai/1, but the session does not",
            )
            if asked
            else not_asked("channel.downgrade"),
            self._ticket(),
        ]

    def _ticket(self) -> Check:
        """Stock evidence has no place for an admission ticket: whoever asks for one refuses it."""
        if not self._settings.kbs_key:
            return not_asked("ticket.present")
        return check(
            "ticket.present", passed=False, reason="stock evidence carries no admission ticket"
        )

    @staticmethod
    def _has_payload(presented: Presented) -> bool:
        return bool(presented.token) or presented.evidence is not None



def _refused(subject: str, name: str, reason: str) -> CaiError:
    verdict = Verdict(subject, (check(name, passed=False, reason=reason),))
    try:
        verdict.require()
    except CaiError as error:
        return error
    raise AssertionError("unreachable")
