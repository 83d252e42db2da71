"""Clients of the real TNG binaries before our guarded egress: served, refused, heard to leave.

The binaries come from the wheel ``tng-sdk`` (``CAI_STOCK_TNG``, default ``build/peers``); a version
that is not there is skipped by name.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from tests.interop.test_stock_tng import (
    OURS,
    configurations,
    free_port,
    gateway,
    peers,
    reachable,
)
from tests.tng.guard.guarded import PROMPT, Engine, request
from tests.tng.guard.test_streaming import HEAD, chunk, word
from tests.tng.stock_peers import VERSIONS, binary

QUICK_S = 8.0
"""Well below the time that the guard waits for a client to end its side, seconds."""


async def endless(_engine: Engine, body: dict[str, object], writer: asyncio.StreamWriter) -> None:
    if not body.get("stream"):
        data = json.dumps({"salt": body["cache_salt"]}).encode()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(data), data))
        await writer.drain()
        return
    writer.write(HEAD)
    while True:
        writer.write(chunk(word("more")))
        await writer.drain()
        await asyncio.sleep(0.01)


async def asked(port: int, data: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    async with asyncio.timeout(QUICK_S):
        answer = await reader.read()
    writer.close()
    return answer


@pytest.mark.anyio
@pytest.mark.parametrize("multiplex", [False, True], ids=["raw", "h2"])
@pytest.mark.parametrize("ingress", [OURS, *VERSIONS])
async def test_a_guarded_egress(ingress: str, multiplex: bool, tmp_path: Path) -> None:
    if ingress != OURS and binary(ingress) is None:
        pytest.skip(f"no tng {ingress} (set CAI_STOCK_TNG)")
    engine, close = Engine(endless), {"connection": "close"}
    port = free_port()
    server = await asyncio.start_server(engine.serve, "127.0.0.1", port)
    async with server, peers(tmp_path) as (agent, service, _backend):
        near, far = configurations(agent, service, port, multiplex=multiplex)
        far["add_egress"][0]["guard"] = {"health": {"path": ""}}
        async with gateway(OURS, far, tmp_path), gateway(ingress, near, tmp_path):
            local = near["add_ingress"][0]["mapping"]["in"]["port"]
            await reachable(far["add_egress"][0]["mapping"]["in"]["port"])
            await reachable(local)

            answer = await asked(local, request(headers=close))
            assert answer.startswith(b"HTTP/1.1 200")
            assert len(json.loads(answer.partition(b"\r\n\r\n")[2])["salt"]) == 64

            answer = await asked(local, request("/metrics", method="GET"))
            assert answer.startswith(b"HTTP/1.1 403")
            assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"]
            assert len(engine.heads) == 1

            reader, writer = await asyncio.open_connection("127.0.0.1", local)
            engine.stopped.clear()
            writer.write(request(body={**PROMPT, "stream": True}))
            async with asyncio.timeout(QUICK_S):
                await reader.readuntil(word("more"))
                writer.transport.abort()
                await engine.stopped.wait()
