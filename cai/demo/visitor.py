"""A guest that speaks to the key broker by itself, so that its messages can be replayed.

It plays the network attacker of act 6: it records the attestation of a genuine session and sends
the same bytes, or the same evidence under the new nonce, in a session of its own.
"""

from __future__ import annotations

import secrets
from dataclasses import replace
from pathlib import Path

import httpx

from cai import __version__
from cai.attest import rcar
from cai.attest.statement import ReleaseStatement, stock_report_data
from cai.attest.tdx.runtime_events import launch_events
from cai.demo.asking import ANSWER_S, reason_of
from cai.demo.telling import StoryBroken
from cai.host.launch import parse_launch


def capture(kbs_url: str, sim: Path, launch: bytes) -> bytes:
    """Attest as the policy's own guest and return the body of that attestation.

    Args:
        kbs_url: base of the key broker.
        sim: directory of the simulated platform.
        launch: exact bytes of ``launch.json``.

    Raises:
        StoryBroken: the key broker did not accept it, so replaying it would show nothing.
    """
    # Deferred: production images delete the simulator.
    from cai.attest.sim import GuestSettings, SimulatedPlatform

    platform = SimulatedPlatform.load(sim / "platform")
    guest = platform.guest(GuestSettings(rtmr3_events=launch_events(launch)))
    with _client(kbs_url) as client:
        challenge = _challenge(client)
        key = rcar.TeeKey.generate()
        nonce = rcar.device_digest(challenge.nonce, key.jwk)[: rcar.GPU_NONCE_SIZE]
        statement = ReleaseStatement(
            launch_digest=parse_launch(launch).digest,
            guest_facts={"profile": "operated", "launched_by": "agent"},
            agent_version=__version__,
        )
        additional = rcar.additional_evidence(platform.devices().collect(nonce), statement)
        digest = rcar.primary_digest(challenge.nonce, key.jwk, additional)
        body = rcar.Attestation(
            nonce=challenge.nonce,
            tee_pubkey=key.jwk,
            primary_evidence=rcar.encode_tdx_evidence(
                guest.quote(stock_report_data(digest)), guest.event_log()
            ),
            additional_evidence=additional,
        ).encode()
        answer = _attest(client, body)
    if answer.status_code != 200:
        raise StoryBroken(f"the genuine session was refused: {reason_of(answer)}")
    return body


def replay(kbs_url: str, body: bytes, *, rewrite_nonce: bool) -> str:
    """Send captured evidence in a new session.

    Args:
        kbs_url: base of the key broker.
        body: from ``capture``.
        rewrite_nonce: put the new session's nonce in place of the captured one.

    Returns:
        Why the key broker refused.

    Raises:
        StoryBroken: it did not refuse.
    """
    with _client(kbs_url) as client:
        challenge = _challenge(client)
        if rewrite_nonce:
            body = replace(rcar.Attestation.parse(body), nonce=challenge.nonce).encode()
        answer = _attest(client, body)
    if answer.status_code == 200:
        raise StoryBroken("the key broker accepted a replayed quote")
    if answer.status_code >= 500:
        raise StoryBroken(f"the key broker failed: {answer.status_code} {reason_of(answer)}")
    return reason_of(answer)


def _client(kbs_url: str) -> httpx.Client:
    # A client keeps the session's cookie, so one client is one session.
    headers = {"User-Agent": f"cai-demo-{secrets.token_hex(4)}"}
    return httpx.Client(
        base_url=f"{kbs_url}/kbs/v0", trust_env=False, timeout=ANSWER_S, headers=headers
    )


def _challenge(client: httpx.Client) -> rcar.Challenge:
    answer = client.post("/auth", content=rcar.Request().encode(), headers=_JSON)
    if answer.status_code != 200:
        raise StoryBroken(f"the key broker gave no challenge: {reason_of(answer)}")
    return rcar.Challenge.parse(answer.content)


def _attest(client: httpx.Client, body: bytes) -> httpx.Response:
    return client.post("/attest", content=body, headers=_JSON)


_JSON = {"Content-Type": "application/json"}
