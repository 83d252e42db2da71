"""The agent's channel socket: it fills the statement itself and proves only when it may."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from cai import merkle
from cai.attest import ttrpc
from cai.attest.agent_client import CHANNEL_SERVICE, ChannelAgent, ProofRequest, SessionProof
from cai.attest.channel import MAX_GPU_AGE_S, ChannelEvidence
from cai.attest.evidence import DeviceEvidence
from cai.attest.statement import ChannelStatement, Purpose, ServedModel, report_data
from cai.errors import ListenerFailed, PeerUnreachable, Refused
from cai.host.agent import Agent, now
from cai.host.agent_socket import serve_channel_socket
from cai.host.launch import Launch

LAUNCH = Launch(b"{}", settings={}, owner_key="ab" * 32, service_id="demo")
MODEL = ServedModel("01" * 32, "02" * 32)
DEVICE = DeviceEvidence("HOPPER", "GPU-1", b"report", b"chain")
LEAF = merkle.leaf_hash(b"leaf")


class Guest:
    """Echoes the report data it was asked for."""

    simulated = True

    def quote(self, report_data: bytes) -> bytes:
        return b"quote over " + report_data

    def event_log(self) -> bytes | None:
        return None


class Gpus:
    """One device that reports nothing real."""

    simulated = True

    def collect(self, nonce: bytes) -> tuple[DeviceEvidence, ...]:
        return (DEVICE,)

    def facts(self) -> dict[str, str]:
        return {"cc_feature": "on"}


def serving_agent() -> Agent:
    agent = Agent(LAUNCH, Guest(), Gpus())
    agent.keep_devices(bytes(32), (DEVICE,), now())
    agent.models = (MODEL,)
    return agent


def with_socket(
    agent: Agent, path: Path, work: Callable[[ChannelAgent], Awaitable[Any]]
) -> Any:
    async def serve() -> Any:
        server = await serve_channel_socket(agent, path)
        try:
            return await asyncio.wait_for(work(ChannelAgent(path)), 20)
        finally:
            server.close()

    return asyncio.run(serve())


async def prove(client: ChannelAgent) -> ChannelEvidence:
    proof = await client.prove(ProofRequest(LEAF))
    assert isinstance(proof, SessionProof)
    return proof.evidence


def test_the_agent_fills_the_statement(tmp_path: Path) -> None:
    agent = serving_agent()
    proof = with_socket(agent, tmp_path / "s", prove)
    statement = ChannelStatement.decode(proof.statement)
    assert statement.session_root == LEAF.hex()
    assert statement.models == (MODEL,)
    assert statement.service_id == "demo"
    assert statement.launch_digest == LAUNCH.digest
    assert statement.guest_facts == {
        "profile": "operated", "launched_by": "agent", "cc_feature": "on",
    }
    assert proof.evidence.quote == b"quote over " + report_data(proof.statement, Purpose.CHANNEL)
    assert proof.evidence.gpu_digest.hex() == statement.gpu.digest


def test_the_socket_is_the_owners_alone(tmp_path: Path) -> None:
    async def look(_client: ChannelAgent) -> int:
        return stat.S_IMODE((tmp_path / "s").stat().st_mode)

    assert with_socket(serving_agent(), tmp_path / "s", look) == 0o600


def test_epochs_count_quotes(tmp_path: Path) -> None:
    async def twice(client: ChannelAgent) -> list[int]:
        proofs = [await prove(client) for _ in range(2)]
        return [ChannelStatement.decode(proof.statement).epoch for proof in proofs]

    assert with_socket(serving_agent(), tmp_path / "s", twice) == [1, 2]


def stopped(agent: Agent) -> None:
    agent.stop("the release was revoked")


def unreleased(agent: Agent) -> None:
    agent.models = ()


def aged(agent: Agent) -> None:
    agent.keep_devices(bytes(32), (DEVICE,), now() - MAX_GPU_AGE_S - 5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (stopped, "the release was revoked"),
        (unreleased, "no model is served yet"),
        (aged, "the GPU evidence is"),
    ],
)
def test_an_agent_that_may_not_prove_says_why(
    tmp_path: Path, change: Callable[[Agent], None], reason: str
) -> None:
    agent = serving_agent()
    change(agent)
    with pytest.raises(Refused, match=reason):
        with_socket(agent, tmp_path / "s", prove)
    assert agent.epoch == 0


@pytest.mark.parametrize("leaf", [b"", bytes(70), bytes(31)])
def test_only_a_leaf_hash_is_accepted(tmp_path: Path, leaf: bytes) -> None:
    with pytest.raises(Refused, match="32 bytes"):
        with_socket(
            serving_agent(), tmp_path / "s", lambda client: client.prove(ProofRequest(leaf))
        )


async def raw_call(path: Path, data: bytes) -> bytes:
    reader, writer = await asyncio.open_unix_connection(str(path))
    writer.write(data)
    writer.write_eof()
    answer = await reader.read()
    writer.close()
    return answer


@pytest.mark.parametrize(
    ("service", "method"),
    [
        (CHANNEL_SERVICE, "GetEvidence"),
        ("attestation_agent.AttestationAgentService", "GetEvidence"),
        ("", ""),
    ],
)
def test_the_channel_socket_is_no_quoting_oracle(
    tmp_path: Path, service: str, method: str
) -> None:
    payload = ttrpc.Request(service, method, ttrpc.bytes_field(1, bytes(64))).encode()
    frame = ttrpc.Header(len(payload), 1, ttrpc.MessageType.REQUEST).encode() + payload

    async def call(_client: ChannelAgent) -> bytes:
        return await raw_call(tmp_path / "s", frame)

    answer = with_socket(serving_agent(), tmp_path / "s", call)
    response = ttrpc.Response.decode(answer[ttrpc.HEADER_SIZE :])
    assert response.status == ttrpc.Status.UNIMPLEMENTED
    assert not response.payload


@pytest.mark.parametrize("data", [b"", b"\x00" * 5, b"\xff" * 40, b"GET / HTTP/1.1\r\n\r\n"])
def test_garbage_callers_are_dropped_and_others_served(tmp_path: Path, data: bytes) -> None:
    async def work(client: ChannelAgent) -> int:
        assert await raw_call(tmp_path / "s", data) == b""
        return (await prove(client)).index

    assert with_socket(serving_agent(), tmp_path / "s", work) == 0


def test_no_agent_is_an_unreachable_peer(tmp_path: Path) -> None:
    with pytest.raises(PeerUnreachable, match="does not answer"):
        asyncio.run(prove(ChannelAgent(tmp_path / "absent")))


def test_a_socket_path_that_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(ListenerFailed):
        asyncio.run(serve_channel_socket(serving_agent(), tmp_path / "no" / "such" / "dir"))
