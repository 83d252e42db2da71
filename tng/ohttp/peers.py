"""The OHTTP peers of one ingress entry: proven keys by origin, and streams that use them."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from cai import jcs
from cai.attest.verdict import Verdict
from cai.errors import CaiError, FormatError, PeerError, PeerUnreachable, Refused, from_os_error
from tng.config.filters import Filter
from tng.config.transport import OhttpClient
from tng.config.trust import Model
from tng.ohttp.attester import Attester, Credential, own_passport
from tng.ohttp.chunked import Header, RequestSender
from tng.ohttp.exchange import OhttpStream, Sending
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
from tng.operation.journal import Journal
from tng.peers.destination import Destination, resolve
from tng.streams import ByteStream, Code, Proven

MAX_ORIGINS = 256
"""Most origins of one entry."""

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


class Origin:
    """One origin: its connections and its key.

    Args:
        destination: where it is.
        peers: whose it is.
    """

    def __init__(self, destination: Destination, peers: OhttpPeers) -> None:
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


class OhttpPeers:
    """The peers of one entry.

    Args:
        name: of the entry.
        settings: its ``ohttp``.
        judge: of their keys.
        attester: how this end proves itself; ``None`` when it does not.
        filters: destination filters of the entry.
        journal: where its lines go.
        own: gives the addresses that this process listens on.
        unsafe: the ``unsafe_…`` settings of the entry.

    Raises:
        CaiError: a root certificate cannot be read.
    """

    def __init__(
        self,
        name: str,
        settings: OhttpClient,
        judge: KeyJudge,
        attester: Attester | None,
        *,
        filters: Sequence[Filter],
        journal: Journal,
        own: Callable[[], Iterable[tuple[str, int]]],
        unsafe: tuple[str, ...] = (),
    ) -> None:
        self.name = name
        self.settings = settings
        self.judge = judge
        self.attester = attester
        self.journal = journal
        self.tls = _tls(settings)
        self._filters = filters
        self._own = own
        self._unsafe = unsafe
        self._origins: dict[Destination, Origin] = {}
        self._leaving = False

    @property
    def unsafe(self) -> tuple[str, ...]:
        """The ``unsafe_…`` settings in force."""
        return self._unsafe

    async def resolve(self, destination: Destination) -> tuple[str, ...]:
        """Its checked addresses.

        Raises:
            DestinationRefused: they may not be gone to.
            PeerUnreachable: there are none.
        """
        return await resolve(destination, self._filters, self._own())

    async def open(self, destination: Destination) -> tuple[ByteStream, Proven]:
        """A stream whose requests are encapsulated to a proven key.

        Raises:
            DestinationRefused: the address may not be gone to.
            EvidenceRefused, PeerUnreachable, CaiError: there is no proven key.
        """
        if self._leaving:
            raise PeerUnreachable("the gateway is stopping")
        origin = self._origin(destination)
        key = await origin.current()
        origin.streams = {stream for stream in origin.streams if not stream.over}
        stream = OhttpStream(origin, self.settings)
        origin.streams.add(stream)
        return stream, key.proven

    def status(self) -> dict[str, object]:
        """What the control interface shows."""
        return {
            "dialect": "ohttp",
            "unsafe": list(self.unsafe),
            "peers": {
                str(where): {
                    "connected": origin.client.connected,
                    "streams": origin.client.busy,
                    "verdict": origin.verdict.to_json() if origin.verdict else None,
                    "error": origin.error.to_json() if origin.error else None,
                    "at": origin.at.isoformat(timespec="seconds"),
                }
                for where, origin in self._origins.items()
            },
        }

    def leave(self) -> None:
        """Take no new streams."""
        self._leaving = True

    async def close(self) -> None:
        """End every exchange now."""
        self._leaving = True
        for origin in self._origins.values():
            await origin.close()
        with contextlib.suppress(CaiError):
            await self.judge.close()
        if self.attester is not None:
            await self.attester.close()

    def _origin(self, destination: Destination) -> Origin:
        origin = self._origins.get(destination)
        if origin is None:
            while len(self._origins) >= MAX_ORIGINS:
                idle = next(
                    (where for where, item in self._origins.items() if not item.client.busy), None
                )
                if idle is None:
                    raise PeerUnreachable(f"{MAX_ORIGINS} peers are in use already")
                self._origins.pop(idle).client.close()
            origin = self._origins[destination] = Origin(destination, self)
        return origin


def _tls(settings: OhttpClient) -> ssl.SSLContext | None:
    if not settings.tls:
        return None
    context = ssl.create_default_context()
    if settings.ca_files:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        for path in settings.ca_files:
            try:
                context.load_verify_locations(str(path))
            except ssl.SSLError as error:
                raise FormatError(f"{path}: no PEM certificates") from error
            except OSError as error:
                raise from_os_error(error, f"read {path}") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    return context


def _member(data: bytes, name: str) -> str:
    value = jcs.parse(data, what="the peer's answer", limit=MAX_JSON)
    text = value.get(name) if isinstance(value, dict) else None
    if not isinstance(text, str) or not text:
        raise PeerError(f"the peer's answer has no {name}")
    return text


def _now() -> float:
    return asyncio.get_running_loop().time()
