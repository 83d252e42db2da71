"""One origin of an ingress: its connections, and the proven key that requests are sealed to.

There is one key-config for an origin, whatever the outer paths are; stock TNG fetches and verifies
one for each path.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from cai import jcs
from cai.attest.verdict import Verdict
from cai.errors import CaiError, PeerError, Refused
from tng.config.transport import OhttpClient
from tng.config.trust import Model
from tng.ohttp.attester import Attester, Credential, own_passport
from tng.ohttp.chunked import Header, RequestSender
from tng.ohttp.exchange import Sending
from tng.ohttp.hpke import Aead
from tng.ohttp.judge import KeyJudge
from tng.ohttp.messages import (
    API_CHALLENGE,
    API_KEY_CONFIG,
    API_VERIFY,
    MAX_JSON,
    KeyAnswer,
    Metadata,
    client_claims,
    evidence_json,
)
from tng.ohttp.outer import OuterClient, OuterRefusal
from tng.ohttp.rewriting import fetch_paths
from tng.ohttp.stream import OhttpStream
from tng.operation.journal import Journal
from tng.peers.destination import Destination
from tng.streams import Code, Proven

RENEW = 0.8
"""Part of a key's time after which it is proven anew, while it still serves."""

RETRY_S = 5.0
"""Pause after a failed renewal while the old key still serves, seconds."""


@dataclass(frozen=True, slots=True)
class ProvenKey:
    """A key that may be used.

    Attributes:
        key_id: its identifier.
        public: the key, 32 bytes.
        aead: chosen from its offers.
        proven: the verdict.
        renew: when to prove it anew, by the event loop's clock.
        until: when it may no longer be used.
        credential: what this end proves itself with.
    """

    key_id: int
    public: bytes
    aead: Aead
    proven: Proven
    renew: float
    until: float
    credential: Credential | None

    def sender(self) -> tuple[RequestSender, bytes]:
        """A new encapsulation, and the metadata that stands before it."""
        own = self.credential
        metadata = (
            Metadata(self.public, own.token, own.public) if own else Metadata(self.public)
        )
        header = Header(self.key_id, self.aead)
        sender = RequestSender(header, self.public, own.key if own else None)
        return sender, metadata.encode()


class Owner(Protocol):
    """What the origins of one entry share."""

    name: str
    settings: OhttpClient
    judge: KeyJudge
    attester: Attester | None
    journal: Journal
    tls: ssl.SSLContext | None

    async def resolve(self, destination: Destination) -> tuple[str, ...]:
        """Its checked addresses."""


class Origin:
    """One origin: its connections and its key.

    Args:
        destination: where it is.
        peers: whose it is: its judge, its own proof, its settings.
    """

    def __init__(self, destination: Destination, peers: Owner) -> None:
        self.destination = destination
        self._peers = peers
        self._client = OuterClient(destination, peers.resolve, peers.tls)
        self._lock = asyncio.Lock()
        self._key: ProvenKey | None = None
        self._credential: Credential | None = None
        self._paths = fetch_paths(peers.settings)
        self._renewing: asyncio.Task[None] | None = None
        self.streams: set[OhttpStream] = set()
        self.verdict: Verdict | None = None
        self.error: CaiError | None = None
        self.at = datetime.now(UTC)

    @property
    def client(self) -> OuterClient:
        """Connections to it."""
        return self._client

    async def current(self) -> ProvenKey:
        """The key to use; an ageing one is renewed beside the request.

        Raises:
            EvidenceRefused, PeerUnreachable, CaiError: there is no proven one.
        """
        key, now = self._key, _now()
        if key is not None and now < key.until:
            if now >= key.renew and self._renewing is None:
                self._renewing = asyncio.create_task(self._renew(key))
            return key
        return await self._fetched(key)

    async def replaced(self, old: Sending, path: str) -> ProvenKey:
        """A fresh key, after the origin did not know the old one.

        Raises:
            EvidenceRefused, PeerUnreachable, CaiError: there is no proven one.
        """
        # Where the request went is where its key is served.
        self._paths = tuple(dict.fromkeys((path, *self._paths)))[:8]
        return await self._fetched(old)

    async def close(self) -> None:
        """Drop everything."""
        if self._renewing is not None:
            self._renewing.cancel()
        for stream in list(self.streams):
            stream.reset(Code.SHUTTING_DOWN)
            await stream.closed()
        self._client.close()

    async def _fetched(self, old: Sending | None) -> ProvenKey:
        async with self._lock:
            key = self._key
            if key is not None and key is not old and _now() < key.until:
                return key
            try:
                key = await self._fetch()
            except CaiError as error:
                self.error, self.at = error, datetime.now(UTC)
                if isinstance(error, Refused) and error.verdict is not None:
                    self.verdict = error.verdict
                raise
            self._key = key
            self.verdict, self.error, self.at = key.proven.verdict, None, datetime.now(UTC)
            return key

    async def _renew(self, old: ProvenKey) -> None:
        try:
            await self._fetched(old)
        except CaiError as error:
            self._peers.journal.line(f"{self._peers.name} {self.destination}: {error.message}")
            if isinstance(error, Refused):
                # What no longer passes serves no further request.
                self._key = None
            await asyncio.sleep(RETRY_S)
        finally:
            self._renewing = None

    async def _fetch(self) -> ProvenKey:
        started = time.monotonic()
        try:
            return await self._proven()
        finally:
            meter = self._peers.journal.meters.attestation
            meter.observe(time.monotonic() - started, self._peers.name)

    async def _proven(self) -> ProvenKey:
        judge = self._peers.judge
        request = await judge.request()
        answer = KeyAnswer.decode(await self._ask(request.encode()))
        subject = f"guest at {self.destination}"
        key_id, public, aead = answer.config.choose()
        proven = await judge.judge(request, answer, subject)
        credential = await self._own()
        now = _now()
        age = proven.max_age_s
        if credential is not None:
            age = min(age, max(1.0, credential.until - now))
        return ProvenKey(
            key_id, public, aead, proven, now + RENEW * age, now + age, credential
        )

    async def _ask(self, body: bytes) -> bytes:
        """Ask where the last answer came from, then where a load balancer may send it on."""
        refused: OuterRefusal | None = None
        for path in self._paths:
            try:
                answer = await self._client.call("POST", path, API_KEY_CONFIG, body)
            except OuterRefusal as error:
                refused = refused or error
                continue
            self._paths = tuple(dict.fromkeys((path, *self._paths)))
            return answer
        assert refused is not None  # noqa: S101 - there is at least one path
        raise refused

    async def _own(self) -> Credential | None:
        attester = self._peers.attester
        if attester is None:
            return None
        kept = self._credential
        if kept is None or kept.until - _now() < RETRY_S:
            if attester.attest.model is Model.PASSPORT:
                kept = await own_passport(attester)
            else:
                kept = await self._appraised(attester)
            self._credential = kept
        return kept

    async def _appraised(self, attester: Attester) -> Credential:
        """A credential from the origin's own service (background check)."""
        path = self._paths[0]
        challenge = _member(
            await self._client.call("GET", path, API_CHALLENGE, b""), "challenge_token"
        )
        key = X25519PrivateKey.generate()
        claims = client_claims(key.public_key().public_bytes_raw(), challenge)
        evidence = await attester.evidence(claims)
        body = jcs.canonical({"evidence": evidence_json(evidence), "aa_provider": "coco"})
        token = _member(
            await self._client.call("POST", path, API_VERIFY, body), "attestation_result"
        )
        return Credential.made(key, token, attester.attest.refresh_s)


def _member(data: bytes, name: str) -> str:
    value = jcs.parse(data, what="the peer's answer", limit=MAX_JSON)
    text = value.get(name) if isinstance(value, dict) else None
    if not isinstance(text, str) or not text:
        raise PeerError(f"the peer's answer has no {name}")
    return text


def _now() -> float:
    return asyncio.get_running_loop().time()
