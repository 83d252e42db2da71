"""What a client must prove to an egress that verifies: the key that it sends with."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256

from cai.attest.verdict import Binding as ProofBinding
from cai.attest.verdict import Verdict, check
from cai.errors import InputError, PolicyDenied
from tng.config.trust import Model, ServiceVerify
from tng.ohttp.judge import MAX_PROVEN_S, NO_CHALLENGE
from tng.ohttp.messages import Metadata, client_claims
from tng.stock.certificate import CocoEvidence
from tng.stock.service import AppraisalService, TrustedRoots, devices_of
from tng.stock.token import Token, verify_token

MAX_CLIENTS = 1024
"""Most clients whose verdict is kept."""


@dataclass(frozen=True, slots=True)
class _Known:
    public: bytes
    until: float


class ClientJudge:
    """Judges the clients of an egress that demands proof of them.

    Args:
        settings: the ``verify`` of the entry.
    """

    def __init__(self, settings: ServiceVerify) -> None:
        self._settings = settings
        self._service = (
            AppraisalService(settings.as_addr, settings.as_headers) if settings.as_addr else None
        )
        self._roots = TrustedRoots(settings, self._service)
        self._known: OrderedDict[bytes, _Known] = OrderedDict()

    async def close(self) -> None:
        """Close the connections to the service."""
        if self._service is not None:
            await self._service.close()

    async def challenge(self) -> str:
        """A challenge for a client's evidence.

        Raises:
            PeerUnreachable, PeerError: the service gives none.
            PolicyDenied: clients are to bring a passport.
        """
        return await self._asked().challenge() or NO_CHALLENGE

    async def appraise(self, evidence: CocoEvidence) -> str:
        """A token for a client's evidence; the client shows it with each request.

        Raises:
            PeerUnreachable, PeerError: the service gives none.
            PolicyDenied: clients are to bring a passport.
        """
        return await self._asked().appraise(
            evidence, devices_of(evidence), self._settings.policy_ids
        )

    async def judge(self, metadata: Metadata, subject: str) -> None:
        """Verify that a client has proven the key that it sends with.

        Raises:
            EvidenceRefused: it has not, with the verdict.
            CaiError: the service's certificate cannot be had.
        """
        now = datetime.now(UTC)
        key = sha256(metadata.token.encode()).digest()
        known = self._known.get(key)
        if known and known.until > now.timestamp() and known.public == metadata.public:
            return
        if not metadata.token:
            failed = check("ohttp.client", passed=False, reason="the client proves nothing")
            Verdict(subject, (failed,)).require()
        roots = await self._roots.get()
        try:
            token = Token.parse(metadata.token)
            claims = client_claims(metadata.public, "")
            checks = (
                *verify_token(
                    token, roots=roots, policy_ids=self._settings.policy_ids, now=now
                ),
                check(
                    "ohttp.client_key",
                    passed=all(
                        token.runtime_claims.get(name) == value for name, value in claims.items()
                    ),
                    reason="the client's token is about another key",
                ),
            )
        except InputError as error:
            checks = (check("as.token", passed=False, reason=error.message),)
        Verdict(
            subject, checks, binding=ProofBinding.KEY, unsafe=self._settings.unsafe
        ).require()
        until = min(float(token.expires or 0), now.timestamp() + MAX_PROVEN_S)
        self._known[key] = _Known(metadata.public, until)
        while len(self._known) > MAX_CLIENTS:
            self._known.popitem(last=False)

    def _asked(self) -> AppraisalService:
        if self._service is None or self._settings.model is Model.PASSPORT:
            raise PolicyDenied("this egress takes passports: no evidence is appraised here")
        return self._service
