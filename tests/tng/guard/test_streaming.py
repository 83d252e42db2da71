"""Answers as they come: nothing held back, cancels that reach the engine, counts, refusals."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from tests.tng.guard.guarded import PROMPT, Engine, answer, guarded, request
from tng.streams import Code

pytestmark = pytest.mark.anyio

STREAM = {**PROMPT, "stream": True}
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
USAGE = {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14}


def event(value: object) -> bytes:
    text = value if isinstance(value, str) else json.dumps(value)
    return f"data: {text}\n\n".encode()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def word(text: str) -> bytes:
    return event({"choices": [{"index": 0, "delta": {"content": text}}]})


async def three_words(_engine: Engine, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    assert body["stream_options"]["include_usage"] is True
    writer.write(HEAD)
    for text in ("one", "two", "three"):
        writer.write(chunk(word(text)))
        await writer.drain()
    writer.write(chunk(event({"choices": [], "usage": USAGE})) + chunk(event("[DONE]")))
    writer.write(b"0\r\n\r\n")
    await writer.drain()


async def test_tokens_are_counted_and_the_extra_event_taken_out(tmp_path: Path) -> None:
    async with guarded(tmp_path, Engine(three_words)) as bench:
        found = await bench.ask(body=STREAM)
        account = bench.desk.ledger.status()["session:5e"]
        assert bench.journal.meters.tokens.value("session", "prompt") == 11
    assert found.headers["content-type"] == "text/event-stream"
    assert found.body == word("one") + word("two") + word("three") + event("[DONE]")
    assert (account["prompt_tokens"], account["completion_tokens"]) == (11, 3)
    assert account["running"] == 0


async def test_who_asks_for_the_usage_gets_it(tmp_path: Path) -> None:
    body = {**STREAM, "stream_options": {"include_usage": True, "continuous_usage_stats": False}}
    async with guarded(tmp_path, Engine(three_words)) as bench:
        found = await bench.ask(body=body)
    assert event({"choices": [], "usage": USAGE}) in found.body


async def test_every_event_passes_before_the_next_is_made(tmp_path: Path) -> None:
    step = asyncio.Event()

    async def stepwise(_engine: Engine, _body: object, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD)
        for text in ("one", "two", "three"):
            writer.write(chunk(word(text)))
            await writer.drain()
            await step.wait()
            step.clear()
        writer.write(b"0\r\n\r\n")

    async with guarded(tmp_path, Engine(stepwise)) as bench:
        client = bench.connect()
        client.send(request(body=STREAM))
        answer_ = client.stream.answer
        async with asyncio.timeout(5):
            await answer_.readuntil(b"\r\n\r\n")
            for text in ("one", "two", "three"):
                await answer_.readuntil(word(text))
                step.set()
            await answer_.readuntil(b"0\r\n\r\n")


async def endless(_engine: Engine, _body: object, writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD)
    while True:
        writer.write(chunk(word("more")))
        await writer.drain()
        await asyncio.sleep(0.01)


async def mute(_engine: Engine, _body: object, _writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(60)


@pytest.mark.parametrize("behave", [endless, mute])
@pytest.mark.parametrize("how", ["fin", "reset"])
async def test_a_cancel_stops_the_engine(tmp_path: Path, behave: Any, how: str) -> None:
    engine = Engine(behave)
    async with guarded(tmp_path, engine) as bench:
        client = bench.connect()
        client.send(request(body=STREAM))
        async with asyncio.timeout(5):
            while not engine.bodies:
                await asyncio.sleep(0.01)
            if behave is endless:
                await client.stream.answer.readuntil(word("more"))
            if how == "reset":
                client.stream.reset_code = Code.CANCELLED
            client.leave()
            await engine.stopped.wait()
            while bench.desk.ledger.running:
                await asyncio.sleep(0.01)
        account = bench.desk.ledger.status()["session:5e"]
        # What was cut short is estimated, so that leaving early is not free.
        assert (account["prompt_tokens"] > 0) == (behave is endless)
        assert (account["completion_tokens"] > 0) == (behave is endless)


async def test_a_silent_backend_is_504_before_the_answer(tmp_path: Path) -> None:
    engine = Engine(mute)
    async with guarded(tmp_path, engine, response_timeout_s=1) as bench:
        found = await bench.ask()
        async with asyncio.timeout(5):
            await engine.stopped.wait()
    assert (found.status, found.error["code"]) == (504, "gateway_timeout")
    assert found.error["type"] == "server_error"


async def test_a_backend_that_falls_silent_breaks_the_answer(tmp_path: Path) -> None:
    async def silent(_engine: Engine, _body: object, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + chunk(word("one")))
        await asyncio.sleep(60)

    async with guarded(tmp_path, Engine(silent), response_timeout_s=1) as bench:
        client = bench.connect()
        client.send(request(body=STREAM))
        async with asyncio.timeout(5):
            await client.task
        assert client.stream.reset_code is Code.UPSTREAM


@pytest.mark.parametrize("data", [
    b"", b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n",
    b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nx: " + b"a" * 10**5,
], ids=lambda data: repr(data[:20]))  # fmt: skip
async def test_a_broken_backend_is_502(tmp_path: Path, data: bytes) -> None:
    async def broken(_engine: Engine, _body: object, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()

    async with guarded(tmp_path, Engine(broken)) as bench:
        found = await bench.ask()
    assert (found.status, found.error["code"]) == (502, "bad_gateway")


@pytest.mark.parametrize("data", [
    b"content-length: 100\r\n\r\nshort", b"transfer-encoding: chunked\r\n\r\n5\r\nab",
    b"transfer-encoding: chunked\r\n\r\nzz\r\n",
])  # fmt: skip
async def test_a_cut_answer_does_not_look_whole(tmp_path: Path, data: bytes) -> None:
    async def cut(_engine: Engine, _body: object, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n" + data)
        await writer.drain()

    async with guarded(tmp_path, Engine(cut)) as bench:
        client = bench.connect()
        client.send(request())
        async with asyncio.timeout(5):
            await client.task
        assert client.stream.reset_code is Code.UPSTREAM


async def test_the_engines_own_refusal_passes_and_costs_nothing(tmp_path: Path) -> None:
    async def refuses(_engine: Engine, _body: object, writer: asyncio.StreamWriter) -> None:
        data = json.dumps({"error": {"message": "too long"}, "usage": USAGE}).encode()
        await answer(writer, data, status="400 Bad Request", more="server: x\r\nset-cookie: a\r\n")

    async with guarded(tmp_path, Engine(refuses)) as bench:
        found = await bench.ask()
        account = bench.desk.ledger.status()["session:5e"]
    assert found.status == 400
    assert found.json["error"] == {"message": "too long"}
    assert "server" not in found.headers
    assert "set-cookie" not in found.headers
    assert account["prompt_tokens"] == 0


async def test_no_backend_is_502_in_the_shape_of_openai(tmp_path: Path) -> None:
    async with guarded(tmp_path) as bench:
        (tmp_path / "engine.sock").unlink()
        found = await bench.ask()
        assert not bench.backend.ready
    assert (found.status, found.error["type"]) == (502, "server_error")
    assert str(tmp_path) not in found.body.decode()


async def test_draining_ends_idle_streams_and_keeps_running_ones(tmp_path: Path) -> None:
    go = asyncio.Event()

    async def waits(engine: Engine, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await go.wait()
        await three_words(engine, body, writer)

    engine = Engine(waits)
    async with guarded(tmp_path, engine) as bench:
        idle, busy = bench.connect(), bench.connect()
        busy.send(request(body=STREAM))
        async with asyncio.timeout(5):
            while not engine.bodies:
                await asyncio.sleep(0.01)
            bench.backend.leave()
            assert await idle.stream.answer.read() == b""
            go.set()
            found = await busy.read()
            assert found.body.endswith(event("[DONE]"))
            assert await busy.stream.answer.read() == b""


async def test_a_stream_is_kept_between_requests(tmp_path: Path) -> None:
    engine = Engine()
    async with guarded(tmp_path, engine) as bench:
        client = bench.connect()
        for _ in range(3):
            assert (await client.ask()).status == 200
    assert len(engine.heads) == 3


async def test_many_streams_at_once(tmp_path: Path) -> None:
    async with guarded(tmp_path, Engine(three_words)) as bench:
        found = await asyncio.gather(*(bench.ask(body=STREAM) for _ in range(200)))
        assert bench.desk.ledger.running == 0
    assert {item.body for item in found} == {found[0].body}
    assert len(found) == 200
