"""Fetching the release record: the guest's end of Trustee's handshake.

Request, challenge, attestation, then the resource (Trustee KBS protocol 0.4.0): from a CAI key
broker under a lease, from a stock one by a plain GET; which of the two is a measured setting and
never learnt from the network (decisions §2.3). Each run makes a fresh key, fresh GPU reports and a
fresh quote, all bound to the broker's nonce; the answer opens only with that key. An encrypted
answer proves nothing about its sender, so the record counts only once its signature verifies under
the owner's key that ``launch.json`` names (decisions §3.1).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

import httpx

from cai import __version__, jcs
from cai.attest import jwe, rcar
from cai.attest.evidence import DeviceEvidence
from cai.attest.lease import MAX_ANSWER as MAX_LEASE_ANSWER
from cai.attest.statement import ReleaseStatement, stock_report_data
from cai.errors import (
    CaiError,
    FormatError,
    InputMissing,
    PeerError,
    PeerUnreachable,
    PolicyDenied,
    Refused,
    Unauthenticated,
)
from cai.host.agent import Agent, now
from cai.host.lease_client import HeldLease, LeaseCall
from cai.host.quoting import Urgency
from cai.model.record import ReleaseRecord

CONNECT_S = 5.0
"""Longest wait for a connection to the broker, seconds."""

ANSWER_S = 60.0
"""Longest wait for one answer, seconds (as stock clients wait)."""

DEFAULT_POLICY: Final = "default"
"""Policy id that need not be named."""

_CODE: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Release:
    """What one handshake brought.

    Attributes:
        record: the owner's signed record, with the key in it.
        nonce: the nonce of the GPU reports, 32 bytes.
        devices: the GPU evidence that the broker accepted.
        collected_at: when it was collected, seconds since boot.
        sent_at: when the last request was sent; lifetimes count from here (decisions §5).
        lease: the lease; ``None`` from a stock broker.
    """

    record: ReleaseRecord
    nonce: bytes
    devices: tuple[DeviceEvidence, ...]
    collected_at: float
    sent_at: float
    lease: HeldLease | None = None

    @property
    def ttl_s(self) -> int:
        """Seconds after ``sent_at`` in which new requests may start."""
        ttl_s = self.record.lease.ttl_s
        return ttl_s if self.lease is None else min(ttl_s, self.lease.ttl_s)

    @property
    def drain_s(self) -> int:
        """Seconds more for running requests."""
        drain_s = self.record.lease.drain_s
        return drain_s if self.lease is None else min(drain_s, self.lease.drain_s)

    @property
    def expires_at(self) -> float:
        """When nothing new may start any more, seconds since boot."""
        return self.sent_at + self.ttl_s


async def fetch_release(
    agent: Agent,
    trustee_url: str,
    key_path: str,
    *,
    policy: str = DEFAULT_POLICY,
    held: HeldLease | None = None,
) -> Release:
    """Run one handshake and open the record.

    Args:
        agent: this guest.
        trustee_url: base of the broker, without ``/kbs/v0``.
        key_path: ``repo/type/tag``.
        policy: id of the policy that the host expects to be appraised under.
        held: the lease that is renewed; ``None`` asks for a first one.

    Raises:
        PeerUnreachable: the broker does not answer.
        PolicyDenied, Refused, Unauthenticated: it refuses, with its reason and code.
        InputMissing: it has no such resource.
        PeerError: it answers something else.
        FormatError, WrongKey, Tampered: the answer or the record is not what it should be.
    """
    timeout = httpx.Timeout(ANSWER_S, connect=CONNECT_S)
    headers = {"User-Agent": f"cai-host/{__version__}"}
    base = f"{trustee_url}/kbs/v0"
    # The environment's proxy must not see a release, and must not be able to divert it.
    async with httpx.AsyncClient(timeout=timeout, headers=headers, trust_env=False) as client:
        answer = await _post(client, f"{base}/auth", _request(policy).encode())
        challenge = rcar.Challenge.parse(answer)
        key = rcar.TeeKey.generate()
        nonce = rcar.device_digest(challenge.nonce, key.jwk)[: rcar.GPU_NONCE_SIZE]
        devices = await agent.collect_devices(nonce)
        collected_at = now()
        body = await _attestation(agent, challenge.nonce, key, devices)
        await _post(client, f"{base}/attest", body)
        sent_at = now()
        lease = None
        if agent.launch.kbs == "cai":
            call = LeaseCall.about(agent, key_path, held)
            answer = await _post(
                client, f"{base}/lease", call.request.encode(), limit=MAX_LEASE_ANSWER
            )
            contents, lease = call.open(answer, key)
        else:
            sealed = await _answer(client.get(f"{base}/resource/{key_path}"), trustee_url)
            contents = jwe.decrypt(sealed, key)
    record = ReleaseRecord.parse(contents.reveal(), owner_key=agent.launch.owner_key)
    if lease is not None:
        lease.require_model(record.manifest_root)
    return Release(record, nonce, devices, collected_at, sent_at, lease)


def _request(policy: str) -> rcar.Request:
    if policy == DEFAULT_POLICY:
        return rcar.Request()
    return rcar.Request(extra_params={rcar.SELECTOR: policy})


async def _attestation(
    agent: Agent, nonce: str, key: rcar.TeeKey, devices: tuple[DeviceEvidence, ...]
) -> bytes:
    statement = None
    if agent.launch.kbs == "cai":
        statement = ReleaseStatement(
            launch_digest=agent.launch.digest,
            guest_facts=agent.guest_facts(),
            agent_version=__version__,
        )
    # Stock brokers get no statement; the launch event in RTMR3 says what was launched.
    additional = rcar.additional_evidence(devices, statement)
    digest = rcar.primary_digest(nonce, key.jwk, additional)
    quote = await agent.quotes.quote(stock_report_data(digest), Urgency.RELEASE)
    return rcar.Attestation(
        nonce=nonce,
        tee_pubkey=key.jwk,
        primary_evidence=rcar.encode_tdx_evidence(quote, agent.source.event_log()),
        additional_evidence=additional,
    ).encode()


async def _post(
    client: httpx.AsyncClient, url: str, body: bytes, *, limit: int = rcar.MAX_MESSAGE
) -> bytes:
    call = client.post(url, content=body, headers={"Content-Type": "application/json"})
    return await _answer(call, url, limit=limit)


async def _answer(call: object, where: str, *, limit: int = rcar.MAX_MESSAGE) -> bytes:
    try:
        response: httpx.Response = await call  # type: ignore[misc]
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise PeerUnreachable(
            f"key broker at {where} does not answer: {error or type(error).__name__}",
            hint="check TRUSTEE_URL and that `kbs serve` runs",
        ) from error
    if len(response.content) > limit:
        raise PeerError(f"key broker: answer of {len(response.content)} bytes")
    if response.status_code != 200:
        raise _refusal(response)
    return response.content


def _refusal(response: httpx.Response) -> CaiError:
    try:
        information = rcar.ErrorInformation.parse(response.content)
        code = _stable_code(response.content)
    except CaiError:
        return PeerError(f"key broker answers {response.status_code} without a reason")
    message = f"key broker: {information.detail} ({information.kind})"
    if response.status_code == 404:
        return InputMissing(message, hint="check MODEL_KEY_ID", code=code)
    if response.status_code == 403:
        kind = Refused if information.kind == "AttestationError" else PolicyDenied
        hint = "`kbs audit show` at the broker lists every check"
        return kind(message, hint=hint, code=code)
    if response.status_code == 401:
        return Unauthenticated(message, code=code)
    if response.status_code in (400, 413):
        return FormatError(message, code=code)
    return PeerError(message, code=code)


def _stable_code(body: bytes) -> str | None:
    """The broker's machine code, where the answer has one."""
    value = jcs.parse(body, what="error answer", limit=rcar.MAX_MESSAGE)
    code = value.get("code") if isinstance(value, dict) else None
    return code if isinstance(code, str) and _CODE.fullmatch(code) else None
