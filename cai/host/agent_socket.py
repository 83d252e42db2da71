"""The agent's channel socket: ttrpc in, what the agent may say out.

One Unix socket per purpose, mounted into exactly one container (decisions §2.2). The channel socket
proves sessions of ours and, where the launch measured that dialect, answers the three methods that
stock TNG calls. What those quote ends in sixteen zero bytes, so no caller can make a statement.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from pathlib import Path

from cai.attest import ttrpc
from cai.attest.agent_client import (
    CHANNEL_SERVICE,
    PROVE,
    STOCK_SERVICE,
    Busy,
    ProofRequest,
)
from cai.errors import CaiError, FormatError, LimitExceeded, ListenerFailed, Refused
from cai.host.agent import Agent

MAX_CONNECTIONS = 8192
"""Most connections of one socket: each session that waits for a quote holds one."""

MAX_REQUEST = 4096
"""Longest request, bytes; none of the methods takes more."""

MAX_CALL_S = 30.0
"""Longest time a caller may take to send its request, seconds."""

IDLE_S = 600.0
"""How long a connection is kept between two calls, seconds; stock clients keep one."""

TEE = b"tdx"
"""What ``GetTeeType`` answers."""

log = logging.getLogger("cai.agent")


async def serve_channel_socket(agent: Agent, path: Path) -> asyncio.Server:
    """Serve the channel purpose on a Unix socket, mode 0600.

    Raises:
        ListenerFailed: the socket cannot be made.
    """
    open_now = 0

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal open_now
        open_now += 1
        try:
            if open_now <= MAX_CONNECTIONS:
                await _serve_calls(agent, reader, writer)
        except asyncio.IncompleteReadError as error:
            if error.partial:
                log.warning("channel socket: dropped a caller: %s", error)
        except (OSError, TimeoutError, FormatError, LimitExceeded) as error:
            log.warning("channel socket: dropped a caller: %s", error)
        finally:
            open_now -= 1
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    try:
        await asyncio.to_thread(path.unlink, missing_ok=True)
        server = await asyncio.start_unix_server(connected, path=str(path), backlog=1024)
        await asyncio.to_thread(path.chmod, 0o600)
    except OSError as error:
        raise ListenerFailed(
            f"cannot listen on {path}: {error.strerror or error}",
            hint="choose another --run-dir; a socket path has at most 107 bytes",
        ) from error
    return server


async def _serve_calls(
    agent: Agent, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    async with asyncio.timeout(MAX_CALL_S) as first:
        head = await reader.readexactly(ttrpc.HEADER_SIZE)
        first.reschedule(None)
    while True:
        header = ttrpc.Header.decode(head)
        if header.length > MAX_REQUEST:
            raise LimitExceeded(f"a request of {header.length} bytes, at most {MAX_REQUEST}")
        async with asyncio.timeout(MAX_CALL_S):
            request = ttrpc.Request.decode(await reader.readexactly(header.length))
        response = await _answer(agent, request)
        payload = response.encode()
        answer = ttrpc.Header(len(payload), header.stream, ttrpc.MessageType.RESPONSE)
        async with asyncio.timeout(MAX_CALL_S):
            writer.write(answer.encode() + payload)
            await writer.drain()
        async with asyncio.timeout(IDLE_S):
            head = await reader.readexactly(ttrpc.HEADER_SIZE)


async def _answer(agent: Agent, request: ttrpc.Request) -> ttrpc.Response:
    called = (request.service, request.method)
    try:
        if called == (CHANNEL_SERVICE, PROVE):
            payload = await _prove(agent, request.payload)
        elif agent.stock and called == (STOCK_SERVICE, "GetEvidence"):
            evidence = await agent.stock_evidence(_runtime_digest(request.payload))
            payload = ttrpc.bytes_field(1, evidence)
        elif agent.stock and called == (STOCK_SERVICE, "GetTeeType"):
            payload = ttrpc.bytes_field(1, TEE)
        elif agent.stock and called == (STOCK_SERVICE, "GetAdditionalEvidence"):
            payload = ttrpc.bytes_field(1, agent.stock_devices())
        else:
            return ttrpc.Response(
                ttrpc.Status.UNIMPLEMENTED, "this socket proves channels and nothing else", b""
            )
    except (FormatError, LimitExceeded) as error:
        return ttrpc.Response(ttrpc.Status.INVALID_ARGUMENT, error.message, b"")
    except Busy as error:
        return ttrpc.Response(ttrpc.Status.RESOURCE_EXHAUSTED, error.message, b"")
    except Refused as error:
        return ttrpc.Response(ttrpc.Status.FAILED_PRECONDITION, error.message, b"")
    except CaiError as error:
        return ttrpc.Response(ttrpc.Status.INTERNAL, error.message, b"")
    return ttrpc.Response(ttrpc.Status.OK, "", payload)


async def _prove(agent: Agent, payload: bytes) -> bytes:
    proof = await agent.prove(ProofRequest.decode(payload))
    answer = ttrpc.bytes_field(1, proof.evidence.encode())
    if math.isfinite(proof.good_for_s):
        answer += ttrpc.varint_field(2, int(proof.good_for_s))
    return answer


def _runtime_digest(payload: bytes) -> bytes:
    data = dict(ttrpc.read_fields(payload)).get(1, b"")
    if not isinstance(data, bytes) or not data:
        raise FormatError("runtime data is missing")
    return data
