"""What proves an OHTTP key: the server's to a client, and a client's to a server.

Unlike RATS-TLS certificates, evidence here names a challenge, so it is fresh. It binds the key, not
a session: everything encapsulated to the key can be read by whoever holds it, and nobody else.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from cai.attest.verdict import Binding as ProofBinding
from cai.attest.verdict import Check, Verdict, check, not_asked
from cai.errors import InputError, SettingError
from tng.config.trust import Binding, BuiltinVerify, Model, ServiceVerify, Verify
from tng.ohttp.messages import (
    CHALLENGE_CLAIM,
    KeyAnswer,
    KeyRequest,
    server_claims,
)
from tng.peers.references import References
from tng.stock.built_in import verify_built_in
from tng.stock.certificate import DIALECT_CLAIM
from tng.stock.service import AppraisalService, TrustedRoots, devices_of
from tng.stock.token import Token, about_claims, verify_token
from tng.streams import Proven

MAX_PROVEN_S = 300.0
"""How long a verdict about one key is used, seconds."""

NO_CHALLENGE = "dummy nonce"
"""Challenge where the service gives none, as stock TNG sends it."""

CHALLENGE_SIZE = 32
"""Bytes of a challenge that is made here."""

RISK_REPLAY = "no session: a recorded request can be sent again while its key lives"
"""What no check covers, as the verdict says it."""


def demand_key_binding(name: str, verify: Verify) -> None:
    """Refuse what OHTTP cannot give: sessions, and pins that only session proofs carry.

    Raises:
        SettingError: the settings ask for one of them.
    """
    if verify.binding is Binding.SESSION:
        raise SettingError(
            f"{name}: ohttp proves a key, not a session",
            hint="say verify.binding: key, or use the default transport",
        )
    expect = verify.expect
    pins = (expect.launch, expect.service, expect.owner, expect.model_root, expect.content_root)
    if any(pins) or verify.kbs_key:
        raise SettingError(
            f"{name}: verify.expect and kbs_key need proofs of sessions, which ohttp has not",
            hint="leave them out, or use the default transport",
        )


class KeyJudge:
    """Judges a server's key.

    Args:
        settings: the ``verify`` of an ingress; ``None`` takes whoever answers.
        references: policy, collateral and roots of a built-in verification.
    """

    def __init__(self, settings: Verify | None, references: References | None) -> None:
        self._settings = settings
        self._references = references
        self._service: AppraisalService | None = None
        self._roots: TrustedRoots | None = None
        if isinstance(settings, ServiceVerify):
            if settings.as_addr:
                self._service = AppraisalService(settings.as_addr, settings.as_headers)
            self._roots = TrustedRoots(settings, self._service)

    async def close(self) -> None:
        """Close the connections to the service."""
        if self._service is not None:
            await self._service.close()

    async def request(self) -> KeyRequest:
        """What to ask a server for.

        Raises:
            PeerUnreachable, PeerError: the service gives no challenge.
        """
        if self._settings is None:
            return KeyRequest()
        if isinstance(self._settings, BuiltinVerify):
            return KeyRequest(Model.BACKGROUND_CHECK.value, secrets.token_hex(CHALLENGE_SIZE))
        if self._settings.model is Model.PASSPORT:
            return KeyRequest(Model.PASSPORT.value)
        assert self._service is not None  # noqa: S101 - a background check has a service
        return KeyRequest(
            Model.BACKGROUND_CHECK.value, await self._service.challenge() or NO_CHALLENGE
        )

    async def judge(self, request: KeyRequest, answer: KeyAnswer, subject: str) -> Proven:
        """Verify an answer to this request.

        Raises:
            EvidenceRefused: naming every failed check, with the verdict.
            PeerUnreachable, PeerError: the attestation service gives no appraisal.
            CaiError: its certificate cannot be had.
        """
        now = datetime.now(UTC)
        # (1) The key is still served.
        left = answer.config.expires - now.timestamp()
        alive = check(
            "ohttp.expires", passed=left > 0, observed=answer.config.expires,
            reason="the server's key has expired",
        )  # fmt: skip
        settings = self._settings
        if settings is None:
            verdict = Verdict(
                subject, (alive, not_asked("ohttp.key")), unsafe=("unsafe_no_ra",)
            ).require()
            return Proven(verdict, min(left, MAX_PROVEN_S))
        ends = now.timestamp() + left
        try:
            if isinstance(settings, ServiceVerify):
                verdict, token_ends = await self._by_service(settings, request, answer, now)
                ends = min(ends, token_ends)
            else:
                verdict = await asyncio.to_thread(self._built_in, request, answer, now)
        except (InputError, SettingError) as error:
            failed = check("stock.evidence", passed=False, reason=error.message)
            verdict = Verdict(subject, (failed,))
        verdict = Verdict(
            subject,
            (alive, *verdict.checks),
            simulated=verdict.simulated,
            binding=ProofBinding.KEY,
            hardware=verdict.hardware,
            unsafe=verdict.unsafe,
            residual_risks=(*verdict.residual_risks, RISK_REPLAY),
        ).require()
        return Proven(verdict, max(0.0, min(ends - now.timestamp(), MAX_PROVEN_S)))

    async def _by_service(
        self, settings: ServiceVerify, request: KeyRequest, answer: KeyAnswer, now: datetime
    ) -> tuple[Verdict, float]:
        assert self._roots is not None  # noqa: S101 - by __init__
        unsafe = settings.unsafe
        passport = settings.model is Model.PASSPORT
        given = bool(answer.token) if passport else answer.evidence is not None
        # (2) The answer carries what was asked for.
        checks = [
            check(
                "stock.model", passed=given, expected=settings.model.value,
                reason="the server gives no evidence for this model",
            )
        ]  # fmt: skip
        if not given:
            return Verdict("", tuple(checks), unsafe=unsafe), now.timestamp()
        roots = await self._roots.get()
        text = answer.token
        if answer.evidence is not None and not passport:
            assert self._service is not None  # noqa: S101 - a background check has a service
            # (3) The evidence is about this key and this challenge.
            checks += self._claims(answer.evidence.claims, request, answer)
            text = await self._service.appraise(
                answer.evidence, devices_of(answer.evidence), settings.policy_ids
            )
        token = Token.parse(text)
        # (4) Signer, time, statuses and policies of the token; (5) it is about the same claims.
        checks += verify_token(token, roots=roots, policy_ids=settings.policy_ids, now=now)
        if answer.evidence is not None and not passport:
            checks.append(about_claims(token, answer.evidence.claims))
        else:
            checks += self._claims(token.runtime_claims, request, answer)
        return Verdict("", tuple(checks), unsafe=unsafe), float(token.expires or 0)

    def _built_in(self, request: KeyRequest, answer: KeyAnswer, now: datetime) -> Verdict:
        references, evidence = self._references, answer.evidence
        if references is None or evidence is None:
            failed = check(
                "stock.model",
                passed=False,
                reason="the server gives no evidence that can be verified here",
            )
            return Verdict("", (failed,))
        return verify_built_in(
            evidence,
            self._claims(evidence.claims, request, answer),
            references=references,
            now=now,
        )

    def _claims(
        self, claims: Mapping[str, Any], request: KeyRequest, answer: KeyAnswer
    ) -> list[Check]:
        expected = server_claims(answer.config, "")
        ours = self._settings is not None and self._settings.binding is not Binding.KEY
        return [
            check(
                "ohttp.key",
                passed=all(claims.get(name) == value for name, value in expected.items()),
                reason="the evidence is about another key",
            ),
            check(
                "ohttp.challenge",
                passed=claims.get(CHALLENGE_CLAIM) == request.challenge,
                reason="the evidence is about another challenge",
            )
            if request.challenge
            else not_asked("ohttp.challenge", reason="a passport brings its own"),
            check(
                "channel.downgrade",
                passed=DIALECT_CLAIM not in claims,
                reason="the guest speaks cai/1 here, but was asked for OHTTP",
            )
            if ours
            else not_asked("channel.downgrade"),
        ]
