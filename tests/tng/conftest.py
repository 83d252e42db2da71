"""Fixtures of the gateway's tests: one simulated guest for all of them."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from cai.attest.anchors import simulated_anchors
from cai.attest.evidence import Evidence
from cai.attest.policy import policy_for
from cai.attest.tdx.collateral import load_collateral
from cai.attest.verify import verify_evidence
from tests.tng.gateways import LAUNCH, NONCE, FakeAgent, World


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    from cai.attest.sim import GuestSettings, SimulatedPlatform

    directory = tmp_path_factory.mktemp("simulated")
    SimulatedPlatform.create(directory, now=datetime.now(UTC))
    platform = SimulatedPlatform.load(directory / "platform")
    gpus = platform.devices()
    guest = platform.guest(GuestSettings())
    devices = gpus.collect(NONCE)
    told = {"profile": "operated", "launched_by": "agent", **gpus.facts()}
    verdict, facts = verify_evidence(
        Evidence(guest.quote(bytes(64)), devices),
        subject="guest",
        report_data=bytes(64),
        gpu_nonce=NONCE,
        anchors=simulated_anchors(directory / "anchors"),
        collateral=load_collateral(directory / "anchors" / "collateral"),
        now=datetime.now(UTC),
    )
    verdict.require()
    assert facts is not None
    named = replace(facts, launch_digest=LAUNCH, guest=told)
    (directory / "policy.toml").write_bytes(policy_for(named))
    return World(directory, guest, platform.guest(GuestSettings(debug=True)), devices, told)


@pytest.fixture
def agent(world: World) -> FakeAgent:
    return FakeAgent(world, world.guest)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
