"""The certificate by which this end proves itself to stock peers, made anew before it grows old."""

from __future__ import annotations

import asyncio
import datetime as dt

from cryptography.hazmat.primitives.asymmetric import ec

from cai.attest.agent_client import Dialect, dialects_of
from cai.attest.gpu.report import parse_report
from cai.attest.rcar import parse_additional_evidence
from cai.attest.statement import gpu_evidence_digest
from cai.errors import CaiError, InputError
from tng.config.trust import Attest, Model
from tng.operation.journal import Journal
from tng.stock.agent import StockAgent
from tng.stock.certificate import (
    DIALECT_CLAIM,
    GPU_CLAIM,
    GPU_NONCE_CLAIM,
    LIFETIME_S,
    CocoEvidence,
    Identity,
    make_certificate,
    runtime_data,
    spki_der,
)
from tng.stock.service import AppraisalService, devices_of
from tng.stock.token import Token

RETRY_S = 10.0
"""Pause after a certificate could not be made while an older one still serves, seconds."""


class IdentityKeeper:
    """Keeps one certificate fresh.

    Args:
        name: of the entry.
        attest: how this end proves itself; ``None`` makes certificates that prove nothing.
        journal: where its lines go.
        dialect: whether this end also speaks ``cai/1``; where the agent does too, evidence says so.
    """

    def __init__(
        self, name: str, attest: Attest | None, journal: Journal, *, dialect: bool
    ) -> None:
        self._name = name
        self._attest = attest
        self._journal = journal
        self._dialect = dialect
        self._agent = StockAgent(attest.socket) if attest else None
        service = attest.service if attest else None
        self._service = AppraisalService(service.address, service.headers) if service else None
        self._policies = service.policy_ids if service else ()
        self._identity: Identity | None = None
        self._failed = dt.datetime.min.replace(tzinfo=dt.UTC)
        self._making: asyncio.Task[Identity] | None = None

    async def close(self) -> None:
        """End what is being made, and the connections to the service."""
        if self._making is not None:
            self._making.cancel()
        if self._service is not None:
            await self._service.close()

    async def identity(self) -> Identity:
        """A certificate that is young enough; the older one while making a new one fails.

        Raises:
            CaiError: there is none that is still in date.
        """
        now = dt.datetime.now(dt.UTC)
        kept = self._identity
        if kept is not None and (now - kept.made).total_seconds() < self._max_age(kept):
            return kept
        usable = kept is not None and kept.certificate.not_valid_after_utc > now
        if usable and (now - self._failed).total_seconds() < RETRY_S:
            assert kept is not None  # noqa: S101 - usable
            return kept
        if self._making is None:
            self._making = asyncio.create_task(self._make(now))
            self._making.add_done_callback(self._made)
        try:
            return await asyncio.shield(self._making)
        except CaiError as error:
            self._failed = now
            if not usable or kept is None:
                raise
            self._journal.line(f"{self._name} keeps its old certificate: {error.message}")
            return kept

    def _made(self, task: asyncio.Task[Identity]) -> None:
        self._making = None
        if not task.cancelled() and task.exception() is None:
            self._identity = task.result()

    def _max_age(self, identity: Identity) -> float:
        lifetime = (identity.certificate.not_valid_after_utc - identity.made).total_seconds()
        wanted = self._attest.refresh_s if self._attest else LIFETIME_S
        # A fetch for each handshake (0) still serves those that wait at the same moment.
        return min(float(wanted), lifetime / 2)

    async def _make(self, now: dt.datetime) -> Identity:
        key = ec.generate_private_key(ec.SECP256R1())
        if self._agent is None:
            return make_certificate(key, None, now=now)
        evidence = await self._evidence(spki_der(key.public_key()))
        if self._attest is None or self._attest.model is not Model.PASSPORT:
            return make_certificate(key, evidence, now=now)
        assert self._service is not None  # noqa: S101 - a passport has a service
        text = await self._service.appraise(evidence, devices_of(evidence), self._policies)
        expires = Token.parse(text).expires
        left = LIFETIME_S if expires is None else int(expires - now.timestamp())
        return make_certificate(key, text, now=now, lifetime_s=max(1, min(LIFETIME_S, left)))

    async def _speaks_ours(self) -> bool:
        """Whether the agent lets this end prove sessions; a stock agent does not."""
        assert self._attest is not None  # noqa: S101 - by the caller
        return Dialect.SESSION in await dialects_of(self._attest.socket)

    async def _evidence(self, spki: bytes) -> CocoEvidence:
        assert self._agent is not None  # noqa: S101 - by the caller
        claims: dict[str, str] = {}
        if self._dialect and await self._speaks_ours():
            # The devices are asked for first, so that the quote can bind them.
            claims = {DIALECT_CLAIM: "1", **device_claims(await self._agent.devices())}
        text = runtime_data(spki, **claims)
        return await self._agent.collect(text)


def device_claims(additional: bytes) -> dict[str, str]:
    """Claims that bind an agent's device evidence; none for what cannot be read."""
    try:
        devices, _statement = parse_additional_evidence(additional.decode("utf-8", "replace"))
        if not devices:
            return {}
        nonce = parse_report(devices[0].report).nonce
    except InputError:
        # An agent of another make; its devices are bound by nothing, as stock TNG has it.
        return {}
    digest = gpu_evidence_digest([(device.report, device.chain) for device in devices])
    return {GPU_CLAIM: digest.hex(), GPU_NONCE_CLAIM: nonce.hex()}
