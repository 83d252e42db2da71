"""The host's end against the broker itself: lease, renewal, revocation, and the stock form."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial
from hashlib import sha384
from typing import Any

import httpx
import pytest

from cai.attest.policy import policy_for
from cai.attest.tdx.runtime_events import launch_events
from cai.attest.ticket import ticket_digest
from cai.errors import InputMissing, PeerError, PolicyDenied, Tampered
from cai.host import release as release_module
from cai.host.agent import Agent, now
from cai.host.launch import Launch
from cai.host.release import Release, fetch_release
from cai.model.record import public_key_hex
from tests.kbs.release.guests import CHANNEL_KEY, MODEL_ID, OWNER, record, ticket_key
from tests.kbs.release.test_must_show import STOCK_REGO
from tests.kbs.world import URI, Site, Visitor

ENCODED = b'{"cai-launch":1,"for":"tests"}'


class Gpus:
    """The simulated GPU, with the facts of a guest in ready state."""

    simulated = True

    def __init__(self, visitor: Visitor) -> None:
        self._devices = visitor.platform.devices(1)

    def collect(self, nonce: bytes) -> Any:
        return self._devices.collect(nonce)

    def facts(self) -> dict[str, str]:
        return {
            "cc_feature": "on", "devtools": "off", "multi_gpu_mode": "none", "count": "1",
            "driver": "580.95.05",
        }  # fmt: skip


def agent_of(visitor: Visitor, **launch: str) -> Agent:
    """A guest launched from ``ENCODED``."""
    from cai.attest.sim import GuestSettings

    guest = visitor.platform.guest(GuestSettings(rtmr3_events=launch_events(ENCODED)))
    document = Launch(
        ENCODED, settings={}, owner_key=public_key_hex(OWNER), service_id="tests", **launch
    )
    return Agent(document, guest, Gpus(visitor), channel_keys=(CHANNEL_KEY,))


@pytest.fixture
def hosting(site: Site, visitor: Visitor, monkeypatch: pytest.MonkeyPatch) -> Site:
    """The site, reached without sockets; its policies name the guest of ``agent_of``."""
    site.broker.core.checkpoints.interval = 0.0
    site.allow(visitor)
    assert site.admin("POST", f"resource/{URI}", record()).status_code == 200
    text = policy_for(
        visitor.facts(), profile="operated", rtmr3_events=True,
        launch_digest=sha384(ENCODED).hexdigest(),
    )  # fmt: skip
    assert site.set_policy("verification-policy", text).status_code == 200
    assert site.set_policy("resource-policy", STOCK_REGO).status_code == 200
    transport = httpx.ASGITransport(app=site.apps["main"], raise_app_exceptions=False)
    client = partial(httpx.AsyncClient, transport=transport)
    monkeypatch.setattr(release_module.httpx, "AsyncClient", client)
    return site


def fetch(agent: Agent, held: Release | None = None, **more: Any) -> Release:
    return asyncio.run(
        fetch_release(
            agent, "http://kbs.test", URI, held=None if held is None else held.lease, **more
        )
    )


def test_the_host_leases_and_renews(hosting: Site, visitor: Visitor) -> None:
    agent = agent_of(visitor, kbs_key=ticket_key(hosting).hex())
    first = fetch(agent)
    assert first.record.model_id == MODEL_ID
    assert first.lease is not None
    assert (first.ttl_s, first.drain_s) == (900, 120)
    assert first.expires_at <= now() + 900
    second = fetch(agent, first)
    assert second.lease is not None
    assert second.lease.id == first.lease.id
    assert second.lease.checkpoint.size > first.lease.checkpoint.size
    assert ticket_digest(second.lease.ticket) != ticket_digest(first.lease.ticket)
    assert hosting.last("renewal")["details"]["renewals"] == 1


def test_a_revoked_host_hears_the_code_and_the_reason(hosting: Site, visitor: Visitor) -> None:
    agent = agent_of(visitor)
    held = fetch(agent)
    hosting.admin("POST", f"block/model/{MODEL_ID}", {"reason": "weights leaked"})
    with pytest.raises(PolicyDenied) as caught:
        fetch(agent, held)
    assert caught.value.machine_code == "revoked.model"
    assert "weights leaked" in caught.value.message


def test_another_pinned_key_is_refused_by_the_host(hosting: Site, visitor: Visitor) -> None:
    with pytest.raises(Tampered) as caught:
        fetch(agent_of(visitor, kbs_key="07" * 32))
    assert caught.value.machine_code == "ticket.signature"


def test_the_stock_form_gets_what_needs_no_lease(hosting: Site, visitor: Visitor) -> None:
    text = policy_for(
        visitor.facts(), profile="operated", rtmr3_events=True,
        launch_digest=sha384(ENCODED).hexdigest(),
    ).replace(b"[guest]\n", b"[guest]\nunsafe_without_facts = true\n")  # fmt: skip
    assert hosting.set_policy("verification-policy", text).status_code == 200
    agent = agent_of(visitor, kbs="trustee")
    with pytest.raises(PolicyDenied) as caught:
        fetch(agent)
    assert caught.value.machine_code == "lease-required"
    stored = hosting.admin("POST", f"resource-lease/{URI}", b"optional")
    assert stored.status_code == 200, stored.text
    release = fetch(agent)
    assert release.lease is None
    assert (release.ttl_s, release.drain_s) == (900, 120)
    assert "cai" not in hosting.last("attest")["evidence"]


def test_a_named_policy_is_asked_for(hosting: Site, visitor: Visitor) -> None:
    with pytest.raises(PolicyDenied) as caught:
        fetch(agent_of(visitor), policy="strict")
    assert caught.value.machine_code == "policy.selector"


def test_a_missing_record_is_not_found(hosting: Site, visitor: Visitor) -> None:
    with pytest.raises(InputMissing):
        asyncio.run(fetch_release(agent_of(visitor), "http://kbs.test", "a/b/c"))


def test_a_broker_in_trouble_decides_nothing(
    hosting: Site, visitor: Visitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cai.errors import Unavailable

    def unavailable(_sealed: Any) -> Any:
        raise Unavailable("the key provider does not answer")

    monkeypatch.setattr(hosting.broker.core.resources, "open", unavailable)
    with pytest.raises(PeerError):
        fetch(agent_of(visitor))
    assert hosting.last("release")["decision"] == "deny"


def test_statements_name_the_ticket_and_end_with_the_lease(
    hosting: Site, visitor: Visitor
) -> None:
    from cai.attest.statement import ChannelStatement, ServedModel
    from cai.errors import Refused

    agent = agent_of(visitor)
    release = fetch(agent)
    assert release.lease is not None
    agent.models = (ServedModel(release.record.manifest_root, "00" * 32),)
    agent.keep_devices(release.nonce, release.devices, release.collected_at)
    agent.ticket, agent.expires_at = release.lease.ticket, release.expires_at
    signed = asyncio.run(agent.sign_sessions(bytes(32), 1))
    statement = ChannelStatement.decode(signed.statement)
    assert statement.ticket_digest == ticket_digest(release.lease.ticket)
    agent.expires_at = now() - 1
    with pytest.raises(Refused, match="lease has ended"):
        asyncio.run(agent.sign_sessions(bytes(32), 1))


def test_a_renewed_lease_is_of_the_same_model(hosting: Site, visitor: Visitor) -> None:
    held = fetch(agent_of(visitor))
    hosting.admin("POST", f"resource/{URI}", record(manifest_root="44" * 32))
    renewed = fetch(agent_of(visitor), held)
    # The host compares, and withdraws; the broker only says what the record says.
    assert renewed.record.manifest_root != held.record.manifest_root
    assert renewed == replace(renewed)
