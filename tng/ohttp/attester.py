"""How an end proves its OHTTP key: an egress its key configuration, an ingress its sender key."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from cai import jcs
from cai.errors import PolicyDenied, TooBusy
from tng.config.trust import Attest, Model
from tng.ohttp.judge import NO_CHALLENGE
from tng.ohttp.keyconfig import KeyConfig
from tng.ohttp.messages import KeyAnswer, KeyRequest, client_claims, server_claims
from tng.stock.agent import StockAgent
from tng.stock.certificate import CocoEvidence
from tng.stock.identity import device_claims
from tng.stock.service import AppraisalService, devices_of
from tng.stock.token import Token

MAX_WAITING = 32
"""Most requests for evidence that wait for the agent; the newest is refused beyond them."""

MAX_QUOTING = 2
"""Most calls to the agent at once: quotes are serial anyway."""

EARLY = 0.8
"""Part of a token's life after which it is made anew."""

MAX_CREDENTIAL_S = 300.0
"""Longest time that a client's credential is used, seconds."""


@dataclass(frozen=True, slots=True)
class _Passport:
    config: KeyConfig
    token: str
    until: float


class Attester:
    """Collects evidence about claims, and passports for it.

    Args:
        attest: how this end proves itself.
    """

    def __init__(self, attest: Attest) -> None:
        self.attest = attest
        self._agent = StockAgent(attest.socket)
        service = attest.service
        self._service = AppraisalService(service.address, service.headers) if service else None
        self._policies = service.policy_ids if service else ()
        self._quoting = asyncio.Semaphore(MAX_QUOTING)
        self._waiting = 0

    async def close(self) -> None:
        """Close the connections to the service."""
        if self._service is not None:
            await self._service.close()

    async def evidence(self, claims: Mapping[str, Any]) -> CocoEvidence:
        """Evidence that is bound to these claims, and to the devices of this guest.

        Raises:
            TooBusy: too many wait already.
            CaiError: the agent gives none.
        """
        if self._waiting >= MAX_WAITING:
            raise TooBusy("too many requests for evidence wait already")
        self._waiting += 1
        try:
            async with self._quoting:
                devices = device_claims(await self._agent.devices())
                text = jcs.canonical({**claims, **devices}).decode("utf-8")
                return await self._agent.collect(text)
        finally:
            self._waiting -= 1

    async def challenge(self) -> str:
        """A challenge of the service that this end takes its evidence to.

        Raises:
            PeerUnreachable, PeerError: the service gives none.
        """
        assert self._service is not None  # noqa: S101 - a passport has a service
        return await self._service.challenge() or NO_CHALLENGE

    async def passport(self, claims: Mapping[str, Any]) -> str:
        """A token about these claims.

        Raises:
            CaiError: agent or service give none.
        """
        assert self._service is not None  # noqa: S101 - a passport has a service
        evidence = await self.evidence(claims)
        return await self._service.appraise(evidence, devices_of(evidence), self._policies)


class KeyAttester:
    """An egress's answers to key-config requests.

    Args:
        attest: how it proves itself; ``None`` when it does not.
    """

    def __init__(self, attest: Attest | None) -> None:
        self._attester = Attester(attest) if attest else None
        self._passport: _Passport | None = None
        self._making = asyncio.Lock()

    async def close(self) -> None:
        """Close the connections to the service."""
        if self._attester is not None:
            await self._attester.close()

    async def answer(self, request: KeyRequest, config: KeyConfig) -> KeyAnswer:
        """The answer with what was asked for.

        Raises:
            PolicyDenied: this end proves itself in another way, or not at all.
            CaiError: agent or service give no evidence.
        """
        if not request.model:
            return KeyAnswer(config)
        if self._attester is None or self._attester.attest.model.value != request.model:
            raise PolicyDenied(f"this egress gives no evidence for {request.model}")
        if self._attester.attest.model is Model.BACKGROUND_CHECK:
            claims = server_claims(config, request.challenge)
            return KeyAnswer(config, await self._attester.evidence(claims))
        async with self._making:
            passport = self._passport
            if (
                passport is None
                or passport.until < time.time()
                or passport.config.encoded != config.encoded
                or passport.config.expires < time.time()
            ):
                passport = self._passport = await self._make(self._attester, config)
        return KeyAnswer(passport.config, token=passport.token)

    async def _make(self, attester: Attester, config: KeyConfig) -> _Passport:
        now = time.time()
        token = await attester.passport(server_claims(config, await attester.challenge()))
        life = max(0.0, (Token.parse(token).expires or now) - now)
        refresh = attester.attest.refresh_s
        return _Passport(config, token, now + min(EARLY * life, float(refresh)))


@dataclass(frozen=True, slots=True)
class Credential:
    """What a client proves itself with.

    Attributes:
        key: HPKE key, which the token names.
        token: of an attestation service.
        until: when to make a new one, by the event loop's clock.
    """

    key: X25519PrivateKey
    token: str
    until: float

    @property
    def public(self) -> bytes:
        """Public part of the key, 32 bytes."""
        return self.key.public_key().public_bytes_raw()

    @classmethod
    def made(cls, key: X25519PrivateKey, token: str, refresh_s: int) -> Credential:
        """With its time of renewal.

        Raises:
            FormatError, LimitExceeded: the token is none.
        """
        expires = Token.parse(token).expires
        life = MAX_CREDENTIAL_S if expires is None else expires - time.time()
        wanted = min(MAX_CREDENTIAL_S, float(refresh_s) or MAX_CREDENTIAL_S)
        until = asyncio.get_running_loop().time() + max(1.0, min(EARLY * life, wanted))
        return cls(key, token, until)


async def own_passport(attester: Attester) -> Credential:
    """A credential that this end fetches from its own service (passport).

    Raises:
        CaiError: agent or service give none.
    """
    key = X25519PrivateKey.generate()
    public = key.public_key().public_bytes_raw()
    token = await attester.passport(client_claims(public, await attester.challenge()))
    return Credential.made(key, token, attester.attest.refresh_s)
