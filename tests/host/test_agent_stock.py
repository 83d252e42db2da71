"""The channel socket for stock TNG: three methods, where the launch measured that dialect."""

from __future__ import annotations

import asyncio
import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cai.attest import ttrpc
from cai.attest.agent_client import (
    STOCK_SERVICE,
    Busy,
    ChannelAgent,
    Dialect,
    ProofRequest,
    call,
    dialects_of,
)
from cai.attest.channel import MAX_GPU_AGE_S
from cai.attest.rcar import parse_additional_evidence
from cai.attest.statement import ChannelStatement
from cai.attest.ticket import ticket_digest
from cai.host import agent as agent_module
from cai.host.agent import Agent, now
from tests.host.test_agent import DEVICE, LAUNCH, LEAF, MODEL, Gpus, Guest, with_socket
from tests.tng.broker import Broker

BOTH = replace(LAUNCH, dialects=("cai/1", "rats-tls"))


def serving() -> Agent:
    agent = Agent(BOTH, Guest(), Gpus())
    agent.keep_devices(bytes(32), (DEVICE,), now())
    agent.models = (MODEL,)
    return agent


def ask(path: Path, agent: Agent, method: str, payload: bytes = b"") -> ttrpc.Response:
    async def work(_client: ChannelAgent) -> ttrpc.Response:
        return await call(path, ttrpc.Request(STOCK_SERVICE, method, payload))

    response = with_socket(agent, path, work)
    assert isinstance(response, ttrpc.Response)
    return response


def value(response: ttrpc.Response) -> bytes:
    assert response.status == ttrpc.Status.OK, response.message
    found = dict(ttrpc.read_fields(response.payload)).get(1, b"")
    assert isinstance(found, bytes)
    return found


def test_what_it_quotes_ends_in_zeros(tmp_path: Path) -> None:
    digest = bytes(range(48))
    answer = ask(tmp_path / "s", serving(), "GetEvidence", ttrpc.bytes_field(1, digest))
    quote = base64.b64decode(json.loads(value(answer))["quote"])
    assert quote == b"quote over " + digest + bytes(16)


def test_a_short_digest_is_padded_too(tmp_path: Path) -> None:
    answer = ask(tmp_path / "s", serving(), "GetEvidence", ttrpc.bytes_field(1, b"x"))
    quote = base64.b64decode(json.loads(value(answer))["quote"])
    assert quote == b"quote over x" + bytes(63)


@pytest.mark.parametrize(
    "payload", [ttrpc.bytes_field(1, bytes(49)), ttrpc.bytes_field(1, bytes(64)), b"",
                ttrpc.bytes_field(1, b""), ttrpc.varint_field(1, 3), b"\xff"],
)  # fmt: skip
def test_no_tag_can_be_asked_for(tmp_path: Path, payload: bytes) -> None:
    answer = ask(tmp_path / "s", serving(), "GetEvidence", payload)
    assert answer.status == ttrpc.Status.INVALID_ARGUMENT
    assert not answer.payload


def test_the_other_two_methods(tmp_path: Path) -> None:
    assert value(ask(tmp_path / "s", serving(), "GetTeeType")) == b"tdx"
    additional = value(ask(tmp_path / "s", serving(), "GetAdditionalEvidence"))
    devices, statement = parse_additional_evidence(additional.decode())
    assert devices == (DEVICE,)
    assert statement is None


@pytest.mark.parametrize("method", ["GetToken", "ExtendRuntimeMeasurement", "BindInitData", ""])
def test_nothing_else_is_served(tmp_path: Path, method: str) -> None:
    assert ask(tmp_path / "s", serving(), method).status == ttrpc.Status.UNIMPLEMENTED


@pytest.mark.parametrize("method", ["GetEvidence", "GetTeeType", "GetAdditionalEvidence"])
def test_a_launch_without_that_dialect_serves_none(tmp_path: Path, method: str) -> None:
    agent = serving()
    agent.launch = LAUNCH
    answer = ask(tmp_path / "s", agent, method, ttrpc.bytes_field(1, bytes(48)))
    assert answer.status == ttrpc.Status.UNIMPLEMENTED


def stopped(agent: Agent) -> None:
    agent.stop("the release was revoked")


def unreleased(agent: Agent) -> None:
    agent.models = ()


def aged(agent: Agent) -> None:
    agent.keep_devices(bytes(32), (DEVICE,), now() - MAX_GPU_AGE_S - 5)


def ended(agent: Agent) -> None:
    agent.expires_at = now() - 1


@pytest.mark.parametrize("change", [stopped, unreleased, aged, ended])
@pytest.mark.parametrize("method", ["GetEvidence", "GetAdditionalEvidence"])
def test_who_may_not_prove_sessions_proves_nothing_here(
    tmp_path: Path, change: Any, method: str
) -> None:
    agent = serving()
    change(agent)
    answer = ask(tmp_path / "s", agent, method, ttrpc.bytes_field(1, bytes(48)))
    assert answer.status == ttrpc.Status.FAILED_PRECONDITION
    assert not answer.payload


def test_only_so_many_wait_for_a_quote_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_module, "MAX_WAITING_STOCK", 0)
    answer = ask(tmp_path / "s", serving(), "GetEvidence", ttrpc.bytes_field(1, bytes(48)))
    assert answer.status == ttrpc.Status.RESOURCE_EXHAUSTED


def test_both_dialects_are_seen(tmp_path: Path) -> None:
    async def look(_client: ChannelAgent) -> frozenset[Dialect]:
        return await dialects_of(tmp_path / "s")

    assert with_socket(serving(), tmp_path / "s", look) == set(Dialect)
    only = serving()
    only.launch = LAUNCH
    assert with_socket(only, tmp_path / "s", look) == {Dialect.SESSION}


def test_one_connection_serves_many_calls(tmp_path: Path) -> None:
    """Stock clients keep theirs."""

    async def work(_client: ChannelAgent) -> list[bytes]:
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "s"))
        answers = []
        for stream in (1, 3, 5):
            payload = ttrpc.Request(STOCK_SERVICE, "GetTeeType", b"").encode()
            head = ttrpc.Header(len(payload), stream, ttrpc.MessageType.REQUEST)
            writer.write(head.encode() + payload)
            header = ttrpc.Header.decode(await reader.readexactly(ttrpc.HEADER_SIZE))
            assert header.stream == stream
            answers.append(value(ttrpc.Response.decode(await reader.readexactly(header.length))))
        writer.close()
        return answers

    assert with_socket(serving(), tmp_path / "s", work) == [b"tdx"] * 3


def test_a_request_that_is_too_long_is_dropped(tmp_path: Path) -> None:
    async def work(_client: ChannelAgent) -> bytes:
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "s"))
        writer.write(ttrpc.Header(1 << 20, 1, ttrpc.MessageType.REQUEST).encode())
        answer = await reader.read()
        writer.close()
        return answer

    assert with_socket(serving(), tmp_path / "s", work) == b""


# Admission tickets


def test_the_ticket_is_stapled_and_named(tmp_path: Path) -> None:
    agent = serving()
    agent.keep_ticket(Broker().ticket())
    agent.expires_at = now() + 600

    async def work(client: ChannelAgent) -> Any:
        return await client.prove(ProofRequest(LEAF))

    proof = with_socket(agent, tmp_path / "s", work)
    assert proof.evidence.ticket == agent.ticket
    assert ChannelStatement.decode(proof.evidence.statement).ticket_digest == ticket_digest(
        agent.ticket
    )
    assert 590 < proof.good_for_s <= 600


def test_a_new_channel_key_is_admitted_before_it_is_proven(tmp_path: Path) -> None:
    broker, agent, asked = Broker(), serving(), []
    agent.keep_ticket(broker.ticket())
    key = bytes(range(32))

    def renew() -> None:
        asked.append(agent.channel_keys)
        loop = asyncio.get_running_loop()
        loop.call_later(
            0.1, lambda: agent.keep_ticket(broker.ticket(channel_keys=agent.channel_keys))
        )

    agent.renew = renew

    async def work(client: ChannelAgent) -> Any:
        many = [client.prove(ProofRequest(LEAF, key=key)) for _ in range(3)]
        return await asyncio.gather(*many)

    proofs = with_socket(agent, tmp_path / "s", work)
    assert asked == [(key.hex(),)]
    for proof in proofs:
        assert key.hex().encode() in proof.evidence.ticket


def test_a_broker_that_does_not_answer_holds_nobody_up_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_module, "ADMISSION_WAIT_S", 0.1)
    agent, asked = serving(), []
    agent.keep_ticket(Broker().ticket())
    agent.renew = lambda: asked.append(1)

    async def work(client: ChannelAgent) -> Any:
        first = await client.prove(ProofRequest(LEAF, key=bytes(32)))
        start = asyncio.get_running_loop().time()
        await client.prove(ProofRequest(LEAF, key=bytes(32)))
        assert asyncio.get_running_loop().time() - start < 0.09
        return first

    proof = with_socket(agent, tmp_path / "s", work)
    assert proof.evidence.ticket == agent.ticket
    assert asked == [1]


def test_keys_are_bounded_and_the_newest_stay(tmp_path: Path) -> None:
    agent = serving()

    async def work() -> None:
        agent.keep_ticket(Broker().ticket())
        for number in range(70):
            await agent.prove(ProofRequest(LEAF, key=number.to_bytes(32)))

    asyncio.run(work())
    assert len(agent.channel_keys) == 64
    assert agent.channel_keys[-1] == (69).to_bytes(32).hex()


def test_a_busy_agent_is_told_from_one_that_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cai.host.quoting.MAX_WAITING_LEAVES", 0)

    async def work(client: ChannelAgent) -> None:
        with pytest.raises(Busy):
            await client.prove(ProofRequest(LEAF))

    with_socket(serving(), tmp_path / "s", work)
