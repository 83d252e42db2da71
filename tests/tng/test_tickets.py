"""Admission tickets beside the evidence: a client with the broker's key takes no guest without."""

from __future__ import annotations

import contextlib
import io
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from cai.attest.anchors import simulated_anchors
from cai.attest.channel import ChannelEvidence
from cai.attest.tdx.collateral import load_collateral
from cai.attest.ticket import platform_id, ticket_digest
from cai.attest.verify import verify_evidence
from cai.errors import FormatError, LimitExceeded
from tests.tng.attackers import CountingEngine
from tests.tng.broker import Broker
from tests.tng.gateways import (
    NONCE,
    FakeAgent,
    World,
    egress_config,
    error_of,
    port_of,
    proxy_config,
    running,
    serving,
    talk,
)
from tng.peers.judge import proven
from tng.stock.judge import CertificateJudge

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="session")
def platform(world: World) -> str:
    verdict, facts = verify_evidence(
        FakeAgent(world, world.guest).evidence([bytes(32)]).evidence,
        subject="guest",
        report_data=_report_data(world),
        gpu_nonce=NONCE,
        anchors=simulated_anchors(world.anchors),
        collateral=load_collateral(world.anchors / "collateral"),
        now=datetime.now(UTC),
    )
    verdict.require()
    assert facts is not None
    return platform_id(facts.tdx)


def _report_data(world: World) -> bytes:
    from cai.attest.statement import Purpose, report_data

    statement = FakeAgent(world, world.guest).evidence([bytes(32)]).statement
    return report_data(statement, Purpose.CHANNEL)


class Admitted(FakeAgent):
    """A guest whose broker admits every channel key that it is asked about."""

    broker: Broker
    claims: dict[str, object]
    named: str | None = None
    stapled: bytes | None = None

    async def prove(self, request):  # type: ignore[no-untyped-def]
        claims = {"channel_keys": (request.key.hex(),), **self.claims}
        ticket = self.broker.ticket(**claims)
        self.changes = {"ticket_digest": ticket_digest(ticket)}
        if self.named is not None:
            self.changes["ticket_digest"] = self.named
        self.ticket = ticket if self.stapled is None else self.stapled
        return await super().prove(request)


def admitted(world: World, platform: object, **claims: object) -> Admitted:
    agent = Admitted(world, world.guest)
    agent.broker, agent.claims = Broker(), {"platform": platform, **claims}
    return agent


@contextlib.asynccontextmanager
async def asked(
    world: World, agent: FakeAgent, tmp_path: Path, **verify: object
) -> AsyncIterator[tuple[bytes, CountingEngine]]:
    engine, socket = CountingEngine(), tmp_path / "engine.sock"
    async with (
        serving(engine, socket),
        running(egress_config({"unix": str(socket)}), agent) as far,
        running(proxy_config(world.verify(**verify)), log=io.StringIO()) as near,
    ):
        port = port_of(far, "egress[0]")
        request = f"GET http://127.0.0.1:{port}/ HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\n"
        ending = "connection: close\r\n\r\n"
        yield await talk(port_of(near, "ingress[0]"), (request + ending).encode()), engine


async def test_an_admitted_guest_passes(world: World, platform: str, tmp_path: Path) -> None:
    agent = admitted(world, platform)
    async with asked(world, agent, tmp_path, kbs_key=agent.broker.public) as (answer, _engine):
        assert answer.startswith(b"HTTP/1.1 200")


OLD = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=1)


@pytest.mark.parametrize(
    ("claims", "seen"),
    [
        ({"issued": OLD}, "ticket.expired"),
        ({"issued": OLD + timedelta(hours=3)}, "ticket.issued"),
        ({"channel_keys": ("aa" * 32,)}, "ticket.channel_key"),
        ({"channel_keys": ()}, "ticket.channel_key"),
        ({"launch_digest": "ac" * 48}, "ticket.launch"),
        ({"platform": "0d" * 32}, "ticket.platform"),
        ({"models": ("0e" * 32,)}, "ticket.models"),
        ({"realm": "production"}, "ticket.realm"),
    ],
)
async def test_a_ticket_about_something_else(
    world: World, platform: str, tmp_path: Path, claims: dict[str, object], seen: str
) -> None:
    agent = admitted(world, **{"platform": platform} | claims)
    async with asked(world, agent, tmp_path, kbs_key=agent.broker.public) as (answer, engine):
        assert answer.startswith(b"HTTP/1.1 502 ")
        assert seen in error_of(answer)["message"]
        assert engine.connections == 0


async def test_another_broker_s_ticket(world: World, platform: str, tmp_path: Path) -> None:
    agent = admitted(world, platform)
    async with asked(world, agent, tmp_path, kbs_key=Broker().public) as (answer, _engine):
        assert "ticket.signature" in error_of(answer)["message"]


@pytest.mark.parametrize("named", ["", "0f" * 32])
async def test_a_ticket_that_the_statement_does_not_name(
    world: World, platform: str, tmp_path: Path, named: str
) -> None:
    agent = admitted(world, platform)
    agent.named = named
    async with asked(world, agent, tmp_path, kbs_key=agent.broker.public) as (answer, _engine):
        assert answer.startswith(b"HTTP/1.1 502 ")
        seen = "ticket.statement" if named else "ticket.present"
        assert seen in error_of(answer)["message"]


async def test_no_ticket_at_all(world: World, agent: FakeAgent, tmp_path: Path) -> None:
    async with asked(world, agent, tmp_path, kbs_key=Broker().public) as (answer, engine):
        assert answer.startswith(b"HTTP/1.1 502 ")
        assert "ticket.present" in error_of(answer)["message"]
        assert engine.connections == 0


async def test_a_ticket_that_was_left_out_on_the_way(
    world: World, platform: str, tmp_path: Path
) -> None:
    agent = admitted(world, platform)
    agent.stapled = b""
    async with asked(world, agent, tmp_path, kbs_key=agent.broker.public) as (answer, _engine):
        assert "ticket.present" in error_of(answer)["message"]


async def test_another_guest_s_ticket_stapled(world: World, platform: str, tmp_path: Path) -> None:
    agent = admitted(world, platform)
    agent.stapled = agent.broker.ticket(channel_keys=("aa" * 32,), platform=platform)
    async with asked(world, agent, tmp_path, kbs_key=agent.broker.public) as (answer, _engine):
        message = error_of(answer)["message"]
    assert "ticket.statement" in message
    assert "ticket.channel_key" in message


async def test_who_pins_no_broker_asks_for_no_ticket(
    world: World, platform: str, tmp_path: Path
) -> None:
    agent = admitted(world, platform, issued=OLD)
    async with asked(world, agent, tmp_path) as (answer, _engine):
        assert answer.startswith(b"HTTP/1.1 200")


def evidence(world: World, ticket: bytes) -> ChannelEvidence:
    from dataclasses import replace

    return replace(FakeAgent(world, world.guest).evidence([bytes(32)]), ticket=ticket)


def test_a_session_ends_with_its_ticket(world: World) -> None:
    from cai.attest.verdict import Verdict

    ticket = Broker().ticket(ttl_s=40, drain_s=7)
    result = proven(Verdict("x", ()), evidence(world, ticket), asks_ticket=True)
    assert 30 < result.max_age_s <= 40
    assert result.drain_s == 7
    assert proven(Verdict("x", ()), evidence(world, ticket), asks_ticket=False).max_age_s > 800
    gone = Broker().ticket(ttl_s=40, issued=OLD)
    assert proven(Verdict("x", ()), evidence(world, gone), asks_ticket=True).max_age_s == 0


def test_evidence_with_a_ticket_round_trips(world: World) -> None:
    carried = evidence(world, Broker().ticket())
    assert ChannelEvidence.decode(carried.encode()) == carried


@pytest.mark.parametrize("ticket", ['""', "1", "null", '"\\ud800"'])
def test_malformed_tickets_are_our_error(world: World, ticket: str) -> None:
    from cai.errors import SettingError

    data = evidence(world, b"T").encode().replace(b'"ticket":"T"', f'"ticket":{ticket}'.encode())
    with pytest.raises((FormatError, LimitExceeded, SettingError)):
        ChannelEvidence.decode(data)


def test_stock_evidence_has_no_ticket(world: World) -> None:
    from tng.config.entries import parse

    config = parse(proxy_config(world.verify(binding="key", kbs_key="ab" * 32)), where="test")
    judge = CertificateJudge(config.ingress[0].trust.verify, None)  # type: ignore[arg-type]
    failed = judge._ticket()
    assert failed.name == "ticket.present"
    assert failed.outcome.value == "fail"
