"""A guard behind OHTTP: served, refused, streamed, and cancelled."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from tests.tng.guard.guarded import PROMPT, Engine, request
from tests.tng.guard.test_streaming import HEAD, chunk, three_words, word
from tests.tng.ohttp.world import ask_once, pair, status_of

pytestmark = pytest.mark.anyio

GUARD = {"guard": {"health": {"path": ""}}}


async def test_a_request_and_a_refusal(tmp_path: Path) -> None:
    engine = Engine()
    async with pair(tmp_path, engine.serve, egress=GUARD) as made:
        close = {"connection": "close"}
        answer = await ask_once(made.ingress, request(headers=close))
        assert status_of(answer) == 200, made.log.getvalue()
        answer = await ask_once(made.ingress, request("/metrics", method="GET", headers=close))
        assert status_of(answer) == 403
        assert b"path_not_allowed" in answer
        answer = await ask_once(made.ingress, request(raw=b'{"a":1,"a":2}', headers=close))
        assert status_of(answer) == 400
    assert len(engine.heads) == 1


async def test_a_stream_passes(tmp_path: Path) -> None:
    body = json.dumps({**PROMPT, "stream": True}).encode()
    async with pair(tmp_path, Engine(three_words).serve, egress=GUARD) as made:
        answer = await ask_once(made.ingress, request(raw=body, headers={"connection": "close"}))
    assert status_of(answer) == 200
    for text in (b"one", b"two", b"three", b"[DONE]"):
        assert text in answer
    assert b"prompt_tokens" not in answer


async def test_a_cancel_stops_the_engine(tmp_path: Path) -> None:
    async def endless(_engine: Engine, _body: object, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD)
        while True:
            writer.write(chunk(word("more")))
            await writer.drain()
            await asyncio.sleep(0.01)

    engine = Engine(endless)
    async with pair(tmp_path, engine.serve, egress=GUARD) as made:
        reader, writer = await asyncio.open_connection("127.0.0.1", made.ingress)
        writer.write(request(body={**PROMPT, "stream": True}))
        async with asyncio.timeout(10):
            await reader.readuntil(b"more")
            writer.transport.abort()
            await engine.stopped.wait()
