"""Fetching the release record: the guest's end of Trustee's handshake.

Request, challenge, attestation, resource (Trustee KBS protocol 0.4.0). Each run makes a fresh
key, fresh GPU reports and a fresh quote, all bound to the broker's nonce; the answer opens only
with that key. An encrypted answer proves nothing about its sender, so the record counts only once
its signature verifies under the owner's key that ``launch.json`` names (decisions §3.1).
"""

from __future__ import annotations

from dataclasses import dataclass

import httpx

from cai import __version__
from cai.attest import jwe, rcar
from cai.attest.evidence import DeviceEvidence
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
from cai.host.quoting import Urgency
from cai.model.record import ReleaseRecord

CONNECT_S = 5.0
"""Longest wait for a connection to the broker, seconds."""

ANSWER_S = 60.0
"""Longest wait for one answer, seconds (as stock clients wait)."""

MAX_ANSWER = 2 * 1024 * 1024
"""Largest answer that is read, bytes."""


@dataclass(frozen=True, slots=True)
class Release:
    """What one handshake brought.

    Attributes:
        record: the owner's signed record, with the key in it.
        nonce: the nonce of the GPU reports, 32 bytes.
        devices: the GPU evidence that the broker accepted.
        collected_at: when it was collected, seconds since boot.
        sent_at: when the last request was sent; lifetimes count from here (decisions §5).
    """

    record: ReleaseRecord
    nonce: bytes
    devices: tuple[DeviceEvidence, ...]
    collected_at: float
    sent_at: float


async def fetch_release(agent: Agent, trustee_url: str, key_path: str) -> Release:
    """Run one handshake and open the record.

    Args:
        agent: this guest.
        trustee_url: base of the broker, without ``/kbs/v0``.
        key_path: ``repo/type/tag``.

    Raises:
        PeerUnreachable: the broker does not answer.
        PolicyDenied, Refused, Unauthenticated: it refuses, with its reason.
        InputMissing: it has no such resource.
        PeerError: it answers something else.
        FormatError, WrongKey, Tampered: the answer or the record is not what it should be.
    """
    timeout = httpx.Timeout(ANSWER_S, connect=CONNECT_S)
    headers = {"User-Agent": f"cai-host/{__version__}"}
    base = f"{trustee_url}/kbs/v0"
    # The environment's proxy must not see a release, and must not be able to divert it.
    async with httpx.AsyncClient(timeout=timeout, headers=headers, trust_env=False) as client:
        answer = await _post(client, f"{base}/auth", rcar.Request().encode())
        challenge = rcar.Challenge.parse(answer)
        key = rcar.TeeKey.generate()
        nonce = rcar.device_digest(challenge.nonce, key.jwk)[: rcar.GPU_NONCE_SIZE]
        devices = await agent.collect_devices(nonce)
        collected_at = now()
        body = await _attestation(agent, challenge.nonce, key, devices)
        await _post(client, f"{base}/attest", body)
        sent_at = now()
        sealed = await _answer(client.get(f"{base}/resource/{key_path}"), trustee_url)
    plain = jwe.decrypt(sealed, key)
    record = ReleaseRecord.parse(plain.reveal(), owner_key=agent.launch.owner_key)
    return Release(record, nonce, devices, collected_at, sent_at)


async def _attestation(
    agent: Agent, nonce: str, key: rcar.TeeKey, devices: tuple[DeviceEvidence, ...]
) -> bytes:
    statement = ReleaseStatement(
        launch_digest=agent.launch.digest,
        guest_facts=agent.guest_facts(),
        agent_version=__version__,
    )
    additional = rcar.additional_evidence(devices, statement)
    digest = rcar.primary_digest(nonce, key.jwk, additional)
    quote = await agent.quotes.quote(stock_report_data(digest), Urgency.RELEASE)
    return rcar.Attestation(
        nonce=nonce,
        tee_pubkey=key.jwk,
        primary_evidence=rcar.encode_tdx_evidence(quote, agent.source.event_log()),
        additional_evidence=additional,
    ).encode()


async def _post(client: httpx.AsyncClient, url: str, body: bytes) -> bytes:
    call = client.post(url, content=body, headers={"Content-Type": "application/json"})
    return await _answer(call, url)


async def _answer(call: object, where: str) -> bytes:
    try:
        response: httpx.Response = await call  # type: ignore[misc]
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise PeerUnreachable(
            f"key broker at {where} does not answer: {error or type(error).__name__}",
            hint="check TRUSTEE_URL and that `kbs serve` runs",
        ) from error
    if len(response.content) > MAX_ANSWER:
        raise PeerError(f"key broker: answer of {len(response.content)} bytes")
    if response.status_code != 200:
        raise _refusal(response)
    return response.content


def _refusal(response: httpx.Response) -> CaiError:
    try:
        information = rcar.ErrorInformation.parse(response.content)
    except CaiError:
        return PeerError(f"key broker answers {response.status_code} without a reason")
    message = f"key broker: {information.detail} ({information.kind})"
    if response.status_code == 404:
        return InputMissing(message, hint="check MODEL_KEY_ID")
    if response.status_code == 403:
        kind = PolicyDenied if information.kind == "PolicyDeny" else Refused
        return kind(message, hint="`kbs audit show` at the broker lists every check")
    if response.status_code == 401:
        return Unauthenticated(message)
    if response.status_code == 400:
        return FormatError(message)
    return PeerError(message)
