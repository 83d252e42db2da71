"""The guard before a real engine: prompt caches apart, what it takes, cancels, counts.

The engine is vLLM on the processor, run by the interpreter that ``CAI_VLLM_PYTHON`` names; without
it these tests are skipped.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.models import tiny_llama
from tests.tng.guard.guarded import CHAT, Bench, before, request
from tng.guard.tokens import create_token

PYTHON = os.environ.get("CAI_VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.anyio,
    pytest.mark.timeout(400),
    pytest.mark.skipif(not PYTHON, reason="CAI_VLLM_PYTHON names no interpreter that has vLLM"),
]
START_S = 240.0
HITS = "vllm:prefix_cache_hits_total"
RUNNING = "vllm:num_requests_running"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    work = tmp_path_factory.mktemp("guard")
    model = tiny_llama.write(work / "model")
    address, log = work / "engine.sock", work / "engine.log"
    command = [
        PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--uds", address,
        "--max-model-len", "512", "--enforce-eager", "--served-model-name", "tiny",
        "--enable-prompt-tokens-details",
    ]  # fmt: skip
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
                   "VLLM_NO_USAGE_STATS": "1"}  # fmt: skip
    with (
        log.open("wb") as out,
        subprocess.Popen(command, env=environment, stdout=out, stderr=out, cwd=work) as server,
    ):
        try:
            end = time.monotonic() + START_S
            while not _answers(address):
                assert server.poll() is None, log.read_text()[-4000:]
                assert time.monotonic() < end, log.read_text()[-4000:]
                time.sleep(0.5)
            yield address
        finally:
            server.terminate()
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()


def _answers(address: Path) -> bool:
    import http.client
    import socket

    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as plain:
        plain.connect(str(address))
        connection = http.client.HTTPConnection("localhost")
        connection.sock = plain
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    return False


async def metric(address: Path, name: str) -> float:
    reader, writer = await asyncio.open_unix_connection(str(address))
    writer.write(b"GET /metrics HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
    text = (await reader.read()).decode()
    writer.close()
    return sum(
        float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name)
    )


def chat(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 4,
            "temperature": 0, **more}  # fmt: skip


async def cached(bench: Bench, body: dict[str, Any], token: str, path: str = CHAT) -> int:
    found = await bench.ask(path, body, token=token)
    assert found.status == 200, found.body
    details = found.json["usage"].get("prompt_tokens_details") or {}
    return details.get("cached_tokens") or 0


async def test_two_callers_with_one_prompt_share_no_prompt_cache(
    engine: Path, tmp_path: Path
) -> None:
    file = tmp_path / "tokens.json"
    alice, again, bob = (
        create_token(file, name)[1].reveal().decode() for name in ("alice", "alice", "bob")
    )
    body = chat("a secret that is longer than a few blocks of the cache " * 6)
    async with before(engine, tokens=str(file)) as bench:
        assert await cached(bench, body, alice) == 0
        hits = await metric(engine, HITS)
        # The cache works, for its owner under either of two tokens.
        assert await cached(bench, body, again) > 0
        assert await metric(engine, HITS) > hits
        hits = await metric(engine, HITS)
        # Another caller cannot tell that the prompt was asked before, whatever salt it names.
        assert await cached(bench, body, bob) == 0
        await cached(bench, {**body, "cache_salt": "x"}, bob)
        own = await metric(engine, HITS) - hits
        assert own > 0
        text = {"model": "tiny", "prompt": "p" * 400, "max_tokens": 2}
        assert await cached(bench, text, alice, "/v1/completions") == 0
        assert await cached(bench, text, bob, "/v1/completions") == 0
        assert await cached(bench, text, bob, "/v1/completions") > 0


async def test_without_salts_the_prompt_cache_is_shared(engine: Path) -> None:
    """What the test above would see if it saw nothing."""
    body = chat("a prompt of everybody that is longer than a few blocks " * 6)
    async with before(engine, unsafe_shared_prompt_cache=True) as bench:
        for session, shared in (("aa", False), ("bb", True)):
            found = await bench.ask(CHAT, body, session=session)
            details = found.json["usage"].get("prompt_tokens_details") or {}
            assert bool(details.get("cached_tokens")) is shared


async def test_the_engine_takes_what_the_guard_lets_through(engine: Path) -> None:
    more = {
        "temperature": 0.5, "top_p": 0.9, "seed": 1, "stop": ["x"], "logit_bias": {"5": 1.0},
        "min_p": 0.0, "n": 2,
        "presence_penalty": 0.1, "response_format": {"type": "text"}, "top_k": 3, "user": "u",
        "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "logprobs": True,
        "top_logprobs": 1, "chat_template_kwargs": {"enable_thinking": False},
    }  # fmt: skip
    said = {"role": "user", "content": "hello"}
    asked: list[tuple[str, dict[str, Any]]] = [
        (CHAT, chat("hello", **more)),
        ("/v1/completions", {"model": "tiny", "prompt": ["a", "b"], "max_tokens": 3}),
        ("/v1/completions", {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 3}),
        ("/v1/responses", {"model": "tiny", "input": "hello", "max_output_tokens": 3}),
        ("/v1/messages", {"model": "tiny", "messages": [said], "max_tokens": 3}),
        ("/v1/messages/count_tokens", {"model": "tiny", "messages": [said]}),
    ]
    async with before(engine) as bench:
        for path, body in asked:
            found = await bench.ask(path, body)
            assert found.status == 200, (path, found.body)
        assert (await bench.ask("/v1/models", method="GET")).json["data"][0]["id"] == "tiny"
        assert (await bench.ask(CHAT, chat("x" * 600))).status == 400
        account = bench.desk.ledger.status()["session:5e"]
    assert account["prompt_tokens"] > 20
    assert account["completion_tokens"] > 10


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses", "/v1/messages"])
async def test_a_stream_is_counted_as_the_engine_counts(engine: Path, path: str) -> None:
    said = [{"role": "user", "content": "hello"}]
    body: dict[str, Any] = {"model": "tiny", "stream": True}
    if path == "/v1/completions":
        body |= {"prompt": "hello", "max_tokens": 16, "ignore_eos": True}
    elif path == "/v1/responses":
        body |= {"input": "hello", "max_output_tokens": 16, "ignore_eos": True}
    else:
        body |= {"messages": said, "max_tokens": 16}
    async with before(engine) as bench:
        found = await bench.ask(path, body)
        assert found.status == 200, found.body
        assert found.headers["content-type"].startswith("text/event-stream")
        whole = await bench.ask(path, {**body, "stream": False}, session="other")
        usage = whole.json["usage"]
        accounts = bench.desk.ledger.status()
    assert b'"usage":{"prompt' not in found.body.replace(b" ", b"")
    told = usage.get("prompt_tokens", usage.get("input_tokens"))
    assert accounts["session:5e"]["prompt_tokens"] == told
    assert accounts["session:5e"]["completion_tokens"] > 0
    assert accounts["session:other"]["prompt_tokens"] == told


async def test_a_cancel_stops_the_engine(engine: Path) -> None:
    body = chat("tell me", stream=True, max_tokens=480, ignore_eos=True)
    async with before(engine) as bench:
        clients = [bench.connect() for _ in range(8)]
        for client in clients:
            client.send(request(CHAT, body))
        async with asyncio.timeout(60):
            for client in clients:
                await client.stream.answer.readuntil(b"data:")
            for client in clients:
                client.leave()
            while await metric(engine, RUNNING):
                await asyncio.sleep(0.1)
            while bench.desk.ledger.running:
                await asyncio.sleep(0.01)
        account = bench.desk.ledger.status()["session:5e"]
    assert 0 < account["completion_tokens"] < 8 * 480


async def test_what_the_engine_refuses_is_told_in_its_own_words(engine: Path) -> None:
    async with before(engine) as bench:
        found = await bench.ask(CHAT, {**chat("hello"), "model": "another"})
        assert found.status == 404
        assert "another" in json.dumps(found.json)
