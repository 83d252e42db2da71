"""The certificate of this end: made in time, kept while its successor cannot be made."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from cai.errors import CaiError, PeerUnreachable, Refused
from tests.tng.stock_peers import StockAgent, StockService
from tng.config.trust import Attest, Model, Service
from tng.operation.journal import Journal
from tng.stock import identity as identity_module
from tng.stock.certificate import DIALECT_CLAIM, GPU_CLAIM, LIFETIME_S, parse_certificate
from tng.stock.identity import IdentityKeeper

pytestmark = pytest.mark.anyio


@contextlib.asynccontextmanager
async def kept(
    tmp_path: Path, *, agent: StockAgent | None = None, dialect: bool = False, **attest: Any
) -> AsyncIterator[tuple[IdentityKeeper, StockAgent, io.StringIO]]:
    served, log = agent or StockAgent(tmp_path / "aa.sock"), io.StringIO()
    keeper = IdentityKeeper(
        "egress[0]", Attest(served.socket, **attest), Journal(log), dialect=dialect
    )
    async with served.running():
        yield keeper, served, log
    await keeper.close()


async def test_one_certificate_serves_everybody_who_waits(tmp_path: Path) -> None:
    async with kept(tmp_path) as (keeper, agent, _log):
        made = await asyncio.gather(*(keeper.identity() for _ in range(5)))
        assert all(item is made[0] for item in made)
        assert await keeper.identity() is made[0]
        assert agent.calls.count("GetEvidence") == 1
    lived = made[0].certificate.not_valid_after_utc - dt.datetime.now(dt.UTC)
    assert lived <= dt.timedelta(seconds=LIFETIME_S)


async def test_no_refresh_interval_makes_it_each_time(tmp_path: Path) -> None:
    async with kept(tmp_path, refresh_s=0) as (keeper, agent, _log):
        first, second = await keeper.identity(), await keeper.identity()
    assert first is not second
    # Each has a key of its own.
    assert parse_certificate(first.der).spki != parse_certificate(second.der).spki
    assert agent.calls.count("GetEvidence") == 2


async def test_nothing_is_made_without_an_agent(tmp_path: Path) -> None:
    keeper = IdentityKeeper(
        "x", Attest(tmp_path / "absent"), Journal(io.StringIO()), dialect=False
    )
    with pytest.raises(PeerUnreachable):
        await keeper.identity()


async def test_whoever_attests_nothing_presents_nothing() -> None:
    keeper = IdentityKeeper("x", None, Journal(io.StringIO()), dialect=False)
    presented = parse_certificate((await keeper.identity()).der)
    assert presented.evidence is None
    assert presented.token == ""


async def test_the_old_one_serves_while_no_new_one_can_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity_module, "RETRY_S", 0.0)
    async with kept(tmp_path, refresh_s=0) as (keeper, _agent, log):
        first = await keeper.identity()

        async def refuse(_now: object) -> object:
            raise Refused("the agent is busy")

        monkeypatch.setattr(keeper, "_make", refuse)
        assert await keeper.identity() is first
        assert "keeps its old certificate" in log.getvalue()
        # But never beyond its own end.
        late = dt.datetime.now(dt.UTC) + dt.timedelta(hours=2)

        class Clock(dt.datetime):
            @classmethod
            def now(cls, tz: dt.tzinfo | None = None) -> dt.datetime:
                del tz
                return late

        monkeypatch.setattr(identity_module.dt, "datetime", Clock)
        with pytest.raises(CaiError):
            await keeper.identity()


async def test_a_stock_agent_s_evidence_claims_no_dialect_of_ours(tmp_path: Path) -> None:
    """A claim that is not true would keep our own clients away."""
    async with kept(tmp_path, dialect=True) as (keeper, _agent, _log):
        evidence = parse_certificate((await keeper.identity()).der).evidence
    assert evidence is not None
    assert not {DIALECT_CLAIM, GPU_CLAIM} & set(evidence.claims)


async def test_a_passport_lives_no_longer_than_its_token(tmp_path: Path) -> None:
    service = StockService(lifetime_s=60)
    async with service.running():
        attest = {
            "model": Model.PASSPORT,
            "service": Service(service.address, ("default",)),
        }
        async with kept(tmp_path, **attest) as (keeper, _agent, _log):
            identity = await keeper.identity()
    presented = parse_certificate(identity.der)
    assert presented.token
    assert presented.not_after <= dt.datetime.now(dt.UTC) + dt.timedelta(seconds=61)


async def test_a_service_that_is_away_makes_no_passport(tmp_path: Path) -> None:
    attest = {"model": Model.PASSPORT, "service": Service("http://127.0.0.1:9/", ())}
    async with kept(tmp_path, **attest) as (keeper, _agent, _log):
        with pytest.raises(PeerUnreachable):
            await keeper.identity()
