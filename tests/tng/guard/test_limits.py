"""Limits of callers, addresses that may connect, and the settings of a guard."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from cai.errors import SettingError
from tests.tng.gateways import (
    FakeAgent,
    World,
    echo_engine,
    egress_config,
    error_of,
    port_of,
    proxy_config,
    running,
    serving,
    talk,
)
from tests.tng.guard.guarded import CHAT, Engine, guard_of, guarded, plain
from tng.config.guard import RESPONSE_S, Guard
from tng.config.load import load_content
from tng.guard import desk, limits
from tng.guard.addresses import may_connect
from tng.guard.limits import Ledger, Limits
from tng.guard.refusals import GuardRefused, error_headers
from tng.guard.routes import INFERENCE

pytestmark = pytest.mark.anyio


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def refused(ledger: Ledger, caller: str, found: Limits) -> GuardRefused:
    with pytest.raises(GuardRefused) as caught:
        ledger.admit(caller, found)
    return caught.value


def once(ledger: Ledger, caller: str, found: Limits, tokens: int = 0) -> None:
    ledger.admit(caller, found)
    ledger.done(caller, found, prompt=tokens)


async def test_requests_a_minute_come_back_steadily() -> None:
    clock, found = Clock(), Limits(requests=6)
    ledger = Ledger(10, clock)
    for _ in range(6):
        once(ledger, "a", found)
    error = refused(ledger, "a", found)
    assert (error.status, error.machine_code) == (429, "requests_per_minute")
    assert error.retry_after_s == pytest.approx(10)
    once(ledger, "b", found)
    clock.now += 9.9
    refused(ledger, "a", found)
    clock.now += 0.2
    once(ledger, "a", found)
    refused(ledger, "a", found)
    clock.now += 3600
    for _ in range(6):
        once(ledger, "a", found)
    refused(ledger, "a", found)


async def test_tokens_a_minute_are_paid_back() -> None:
    clock, found = Clock(), Limits(tokens=60)
    ledger = Ledger(10, clock)
    once(ledger, "a", found, tokens=120)
    error = refused(ledger, "a", found)
    assert (error.status, error.machine_code) == (429, "tokens_per_minute")
    assert error.retry_after_s == pytest.approx(61)
    clock.now += 59
    refused(ledger, "a", found)
    clock.now += 2
    once(ledger, "a", found)


async def test_requests_at_once_of_one_caller_and_of_all() -> None:
    ledger, found = Ledger(3, Clock()), Limits(concurrent=2)
    ledger.admit("a", found)
    ledger.admit("a", found)
    assert refused(ledger, "a", found).status == 429
    ledger.admit("b", found)
    assert refused(ledger, "c", found).status == 503
    ledger.done("a", found)
    ledger.admit("a", found)
    assert ledger.running == 3


async def test_callers_without_work_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_ACCOUNTS", 10)
    clock = Clock()
    ledger = Ledger(100, clock)
    ledger.admit("busy", Limits())
    for index in range(50):
        once(ledger, f"s{index}", Limits())
        clock.now += limits.FORGET_S
    assert "busy" in ledger.status()
    assert len(ledger.status()) <= 12


async def test_a_limit_is_429_with_a_time(tmp_path: Path) -> None:
    engine = Engine()
    async with guarded(tmp_path, engine, limits={"requests_per_minute": 2}) as bench:
        for _ in range(2):
            assert (await bench.ask()).status == 200
        found = await bench.ask()
        assert found.status == 429
        assert found.error["type"] == "rate_limit_error"
        assert 1 <= int(found.headers["retry-after"]) <= 30
        assert (await bench.ask(session="another")).status == 200
        assert bench.journal.meters.refusals.value("egress[0]", "requests_per_minute") == 1
    assert len(engine.heads) == 3


async def test_used_tokens_count_against_the_limit(tmp_path: Path) -> None:
    async with guarded(tmp_path, limits={"tokens_per_minute": 12}) as bench:
        assert (await bench.ask()).status == 200
        assert (await bench.ask()).status == 429


async def test_concurrent_requests_end_however_they_end(tmp_path: Path) -> None:
    go = asyncio.Event()

    async def waits(engine: Engine, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await go.wait()
        await plain(engine, body, writer)

    engine = Engine(waits)
    async with guarded(tmp_path, engine, limits={"concurrent_requests": 1}) as bench:
        first = asyncio.create_task(bench.ask())
        async with asyncio.timeout(5):
            while not engine.bodies:
                await asyncio.sleep(0.01)
        assert (await bench.ask()).status == 429
        go.set()
        assert (await first).status == 200
        assert (await bench.ask(raw=b"{")).status == 400
        assert (await bench.ask()).status == 200
        assert bench.desk.ledger.running == 0


async def test_bodies_in_memory_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desk, "MAX_HELD_MIB", 1)
    engine = Engine()
    async with guarded(tmp_path, engine) as bench:
        client = bench.connect()
        head = f"POST {CHAT} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
        client.send(head.encode() + b"content-length: 1000000\r\n\r\n")
        async with asyncio.timeout(5):
            while not bench.desk._held:
                await asyncio.sleep(0.01)
            found = await bench.ask(raw=b" " * 60_000)
            assert (found.status, found.error["code"]) == (503, "overloaded")
            assert found.headers["retry-after"] == "1"
            client.leave()
            await client.task
        assert (await bench.ask()).status == 200
        async with asyncio.timeout(5):
            while bench.desk._held:
                await asyncio.sleep(0.01)


def test_a_time_to_wait_is_a_whole_number_of_seconds() -> None:
    for wait, shown in ((0.0, b"1"), (0.2, b"1"), (1.01, b"2"), (61.0, b"61")):
        headers = dict(error_headers(GuardRefused(429, "x", "x", retry_after_s=wait), 0))
        assert headers[b"retry-after"] == shown


# Addresses.


@pytest.mark.parametrize(("peer", "passes"), [
    (("10.1.2.3", 1), True), (("10.9.0.1", 1), False), (("11.0.0.1", 1), False),
    (("::ffff:10.1.2.3", 1, 0, 0), True), (("::ffff:10.9.0.1", 1, 0, 0), False),
    (("2001:db8::1", 1, 0, 0), True), (("fe80::1%eth0", 1, 0, 2), False), (("", 1), False),
    ("", False), (None, False), (("name", 1), False), ((), False),
])  # fmt: skip
def test_addresses_that_may_connect(peer: object, passes: bool) -> None:
    guard = guard_of(allow=["10.0.0.0/8", "2001:db8::/32"], deny=["10.9.0.0/16"])
    assert may_connect(guard, peer) is passes


def test_only_a_list_of_the_denied() -> None:
    guard = guard_of(deny=["10.0.0.0/8"])
    assert not may_connect(guard, ("10.0.0.1", 1))
    assert may_connect(guard, ("11.0.0.1", 1))
    assert may_connect(guard, "")
    assert may_connect(guard_of(), None)


@pytest.mark.parametrize(("rules", "passes"), [
    ({"allow": ["127.0.0.0/8"]}, True), ({"allow": ["10.0.0.0/8"]}, False),
    ({"deny": ["127.0.0.1/32"]}, False), ({"deny": ["10.0.0.0/8"]}, True),
])  # fmt: skip
async def test_an_address_is_judged_before_the_handshake(
    world: World, agent: FakeAgent, tmp_path: Path, rules: dict[str, Any], passes: bool
) -> None:
    socket = tmp_path / "engine.sock"
    guard = {"paths": [{"path": "/a", "method": "GET"}], "health": {"path": ""}, **rules}
    async with (
        serving(echo_engine, socket),
        running(egress_config({"unix": str(socket)}, guard=guard), agent) as outside,
        running(proxy_config(world.verify())) as inside,
    ):
        peer = f"127.0.0.1:{port_of(outside, 'egress[0]')}"
        answer = await talk(
            port_of(inside, "ingress[0]"),
            f"GET http://{peer}/a HTTP/1.1\r\nhost: {peer}\r\nconnection: close\r\n\r\n".encode(),
        )
    assert answer.startswith(b"HTTP/1.1 200" if passes else b"HTTP/1.1 502")
    assert bool(agent.calls) is passes


async def test_a_guarded_pair_refuses_in_openais_shape(
    world: World, agent: FakeAgent, tmp_path: Path
) -> None:
    socket = tmp_path / "engine.sock"
    async with (
        serving(Engine().serve, socket),
        running(egress_config({"unix": str(socket)}, guard={}), agent) as outside,
        running(proxy_config(world.verify())) as inside,
    ):
        peer = f"127.0.0.1:{port_of(outside, 'egress[0]')}"
        head = f"GET http://{peer}/metrics HTTP/1.1\r\nhost: {peer}\r\nconnection: close\r\n\r\n"
        answer = await talk(port_of(inside, "ingress[0]"), head.encode())
        assert answer.startswith(b"HTTP/1.1 403")
        assert error_of(answer)["code"] == "path_not_allowed"
        assert b"cai-attested: session" in answer
        body = json.dumps({"model": "m", "messages": []})
        head = (
            f"POST http://{peer}{CHAT} HTTP/1.1\r\nhost: {peer}\r\nconnection: close\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n{body}"
        )
        answer = await talk(port_of(inside, "ingress[0]"), head.encode())
        assert answer.startswith(b"HTTP/1.1 200")


# Settings.


def test_an_empty_guard_is_strict() -> None:
    guard = guard_of()
    assert set(guard.routes) == {route.path for route in INFERENCE}
    assert guard.salted
    assert not guard.unsafe
    assert guard.response_s == RESPONSE_S >= 1800


def test_paths_may_be_named() -> None:
    guard = guard_of(paths=["/v1/models", "/tokenize", {"path": "/x", "fields": ["a"]}])
    assert set(guard.routes) == {"/v1/models", "/tokenize", "/x"}


@pytest.mark.parametrize("settings", [
    {"token": "/x"}, {"tokens": "relative"}, {"tokens": 1}, {"paths": []}, {"paths": "/v1/models"},
    {"paths": ["/metrics"]}, {"paths": ["/v1/models", "/v1/models"]}, {"paths": [{"path": "x"}]},
    {"paths": [{"path": "/x"}]}, {"paths": [{"path": "/x/", "fields": ["a"]}]},
    {"paths": [{"path": "/../x", "fields": ["a"]}]}, {"paths": [{"path": "/%78", "fields": ["a"]}]},
    {"paths": [{"path": "/x", "method": "PUT", "fields": ["a"]}]}, {"paths": [1]},
    {"allow": ["10.0.0.1/8"]}, {"allow": "10.0.0.0/8"}, {"deny": ["name"]}, {"deny": [1]},
    {"limits": {"requests": 1}}, {"limits": {"requests_per_minute": -1}},
    {"limits": {"tokens_per_minute": "1"}}, {"unknown_fields": "ignore"}, {"max_body_mib": 0},
    {"max_body_mib": 1000}, {"max_head_kib": 65}, {"max_requests": 0}, {"drain_s": 0},
    {"drain_s": 301},
    {"response_timeout_s": 0}, {"response_timeout_s": True}, {"health": {"path": "health"}},
    {"health": {"path": "/health", "more": 1}}, {"health": {"interval_s": 0}}, {"receipts": "no"},
    {"jwt": {}}, {"jwt": {"jwks": "/j", "issuer": "i"}}, {"unsafe_remote_media": 1},
    {"jwt": {"jwks": "j", "issuer": "i", "audience": "a"}},
    {"jwt": {"jwks": "http://id.example.org/j", "issuer": "i", "audience": "a"}},
    {"jwt": {"jwks": "file:///j", "issuer": "i", "audience": "a"}},
    {"jwt": {"jwks": "https://u:p@id.example.org/j", "issuer": "i", "audience": "a"}},
    {"jwt": {"jwks": "/j", "issuer": "", "audience": "a"}},
    {"jwt": {"jwks": "/j", "issuer": "i", "audience": "a", "algorithms": ["HS256"]}},
], ids=lambda settings: json.dumps(settings)[:60])  # fmt: skip
def test_what_is_no_guard_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingError):
        guard_of(**settings)


def test_a_guard_belongs_to_an_egress() -> None:
    found = load_content(json.dumps(egress_config({"unix": "/run/x.sock"}, guard={})))
    assert isinstance(found.egress[0].guard, Guard)
    assert any("neither tokens nor jwt" in note.text for note in found.notes)
    plain = egress_config(
        {"unix": "/run/x.sock"}, guard={}, direct_forward=[{"http_path": "/health"}], ohttp={}
    )
    with pytest.raises(SettingError, match="around the guard"):
        load_content(json.dumps(plain))
    ingress = proxy_config({"as_type": "builtin", "policy": "/p"})
    ingress["add_ingress"][0]["guard"] = {}  # type: ignore[index]
    with pytest.raises(SettingError):
        load_content(json.dumps(ingress))
