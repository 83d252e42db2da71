"""A stock TNG ingress before our egress: our agent's evidence, our key broker's service.

Needs the binary of the wheel ``tng-sdk`` (CAI_STOCK_TNG names the folder); skipped without.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import re
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("kbs.appraisal.service", reason="this key broker has no attestation service")

from cai.attest.anchors import simulated_anchors
from cai.attest.evidence import Evidence
from cai.attest.policy import policy_for
from cai.attest.tdx.collateral import load_collateral
from cai.attest.verify import verify_evidence
from cai.host.agent import Agent, now
from kbs.admin.tokens import make_admin_token
from kbs.instance import read_admin_key
from tests.interop.test_stock_tng import BODY, ask, echo, free_port, reachable
from tests.kbs.program import Program
from tests.tng.gateways import MODEL, NONCE, running
from tests.tng.guests import BOTH, at_socket
from tests.tng.stock_peers import binary, stock_tng

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(binary("2.12.0") is None, reason="no tng 2.12.0 (set CAI_STOCK_TNG)"),
]

LOOSE = b"unsafe_any_launch_digest = true\nunsafe_without_facts = true"


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def hardware(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    from cai.attest.sim import SimulatedPlatform

    directory = tmp_path_factory.mktemp("simulated")
    SimulatedPlatform.create(directory, now=datetime.now(UTC))
    return directory, SimulatedPlatform.load(directory / "platform")


def guest_of(hardware: tuple[Path, Any], *, gpus: int, debug: bool = False) -> Agent:
    from cai.attest.sim import GuestSettings

    platform = hardware[1]
    devices = platform.devices(gpus)
    agent = Agent(BOTH, platform.guest(GuestSettings(debug=debug)), devices)
    agent.keep_devices(NONCE, devices.collect(NONCE), now())
    agent.models = (MODEL,)
    return agent


@pytest.fixture(scope="module")
def service(
    hardware: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Address of ``/as/`` of a key broker whose policy takes guests with one GPU."""
    anchors = hardware[0] / "anchors"
    devices = hardware[1].devices(1).collect(NONCE)
    quote = guest_of(hardware, gpus=1).source.quote(bytes(64))
    verdict, facts = verify_evidence(
        Evidence(quote, devices), subject="guest", report_data=bytes(64), gpu_nonce=NONCE,
        anchors=simulated_anchors(anchors), collateral=load_collateral(anchors / "collateral"),
        now=datetime.now(UTC),
    )  # fmt: skip
    verdict.require()
    assert facts is not None
    text = policy_for(facts, profile="operated", launch_digest="ab" * 48)
    directory = tmp_path_factory.mktemp("kbs")
    program = Program(directory, "--data", "data", "--unsafe-simulated-root", anchors)
    try:
        key = read_admin_key(directory / "data" / "admin.key")
        policy = base64.urlsafe_b64encode(re.sub(rb"launch_digest = .*", LOOSE, text))
        done = httpx.post(
            f"{program.ready['admin']}/kbs/v0/verification-policy",
            json={"policy": policy.decode().rstrip("=")},
            trust_env=False,
            headers={"Authorization": f"Bearer {make_admin_token(key, now=datetime.now(UTC))}"},
        )
        assert done.status_code == 200, done.text
        yield f"{program.url}/as/"
    finally:
        program.close()


@contextlib.asynccontextmanager
async def tunnel(agent: Agent, service: str, directory: Path) -> AsyncIterator[tuple[int, Path]]:
    """Port of a stock ingress that leads through our egress to an echo, and its log."""
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    near, far = free_port(), free_port()
    host = "127.0.0.1"
    backend = server.sockets[0].getsockname()[1]
    verify = {"as_addr": service, "policy_ids": ["default"]}
    inside = {
        "mapping": {"in": {"host": host, "port": near}, "out": {"host": host, "port": far}},
        "verify": verify,
    }
    async with at_socket(agent, directory / "aa.sock") as address:
        outside = {
            "mapping": {"in": {"host": host, "port": far}, "out": {"host": host, "port": backend}},
            "attest": {"aa_addr": address},
        }
        async with running({"add_egress": [outside]}, None, io.StringIO()):
            with stock_tng("2.12.0", {"add_ingress": [inside]}, directory) as log:
                await reachable(near)
                yield near, log
    server.close()


async def test_a_stock_client_is_satisfied_with_our_guest(
    hardware: tuple[Path, Any], service: str, tmp_path: Path
) -> None:
    async with tunnel(guest_of(hardware, gpus=1), service, tmp_path) as (port, log):
        assert await ask(port) == b"ok:" + BODY, log.read_text()[-2000:]


@pytest.mark.parametrize(("gpus", "debug"), [(0, False), (1, True)], ids=["no-gpu", "debug"])
async def test_a_stock_client_refuses_what_our_service_refuses(
    hardware: tuple[Path, Any], service: str, tmp_path: Path, gpus: int, debug: bool
) -> None:
    agent = guest_of(hardware, gpus=gpus, debug=debug)
    async with tunnel(agent, service, tmp_path) as (port, _log):
        assert b"ok:" not in await ask(port, whole=True)


async def test_other_devices_than_the_claims_bind(
    hardware: tuple[Path, Any], service: str, tmp_path: Path
) -> None:
    """Genuine reports of the same GPU under another nonce, in the place of those that are bound."""
    agent = guest_of(hardware, gpus=1)
    others = hardware[1].devices(1).collect(bytes(32))
    asked = 0
    honest = agent.stock_devices

    def swapped() -> bytes:
        nonlocal asked
        asked += 1
        if asked > 1:
            agent.keep_devices(bytes(32), others, now())
        return honest()

    agent.stock_devices = swapped  # type: ignore[method-assign]
    async with tunnel(agent, service, tmp_path) as (port, log):
        assert b"ok:" not in await ask(port, whole=True)
        assert asked > 1
        assert "claims bind" in log.read_text()
