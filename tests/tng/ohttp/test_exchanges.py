"""Requests through our pair over OHTTP: what arrives, streaming, rotation, and who may see what."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path

import pytest

from tests.tng.gateways import serving, talk
from tests.tng.ohttp.world import (
    LOCAL,
    ask_once,
    echo,
    meddler,
    pair,
    post,
    read_any,
    read_raw,
    status_of,
)
from tests.tng.stock_peers import StockService

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("passport", [False, True], ids=["background", "passport"])
@pytest.mark.parametrize("mutual", [False, True], ids=["one-way", "mutual"])
async def test_a_request_arrives_whole(tmp_path: Path, mutual: bool, passport: bool) -> None:
    body = bytes(range(256)) * 400
    async with pair(tmp_path, mutual=mutual, passport=passport) as made:
        answer = await talk(made.ingress, post("/v1/x?secret=1", body, "x-a: b"))
    head, _, rest = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"x-inner: yes" in head.lower()
    assert rest.startswith(b"POST /v1/x?secret=1 HTTP/1.1\r\n")
    assert b"x-a: b" in rest.lower()
    assert b"connection: close" in rest.lower()
    assert rest.endswith(b"|" + body)
    assert made.agent.calls.count("GetEvidence") == (2 if mutual else 1)


async def test_a_chunked_request_stays_one(tmp_path: Path) -> None:
    head = b"POST /c HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n"
    async with pair(tmp_path) as made:
        answer = await talk(made.ingress, head + b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")
    assert b"transfer-encoding: chunked" in answer.lower()
    assert answer.endswith(b"|abcde")


@pytest.mark.parametrize("method", ["GET", "DELETE", "OPTIONS"])
async def test_a_request_without_body_has_none_there(tmp_path: Path, method: str) -> None:
    request = f"{method} /n HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n".encode()
    async with pair(tmp_path) as made:
        answer = await talk(made.ingress, request)
    assert status_of(answer) == 200
    inner = answer.partition(b"\r\n\r\n")[2].lower()
    assert b"transfer-encoding" not in inner
    assert b"content-length" not in inner


async def test_head_answers_without_body(tmp_path: Path) -> None:
    async with pair(tmp_path) as made:
        request = b"HEAD / HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n"
        answer = await talk(made.ingress, request)
    assert status_of(answer) == 200
    assert answer.endswith(b"\r\n\r\n")


async def test_one_connection_carries_many_requests_with_one_key(tmp_path: Path) -> None:
    async with pair(tmp_path, client={"path_default": "original"}) as made:
        reader, writer = await asyncio.open_connection(LOCAL, made.ingress)
        for number in range(5):
            writer.write(
                f"POST /p{number} HTTP/1.1\r\nhost: h\r\ncontent-length: 1\r\n\r\n{number}".encode()
            )
            head = await reader.readuntil(b"\r\n\r\n")
            size = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
            assert (await reader.readexactly(size)).endswith(f"|{number}".encode())
        writer.close()
    # Stock TNG would have fetched one for each path.
    assert made.agent.calls.count("GetEvidence") == 1
    assert made.service.calls.count("attestation") == 1


async def test_tokens_are_passed_on_as_they_come(tmp_path: Path) -> None:
    go = asyncio.Event()

    async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_any(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nfirst\r\n")
        await writer.drain()
        await go.wait()
        writer.write(b"6\r\nsecond\r\n0\r\n\r\n")
        await writer.drain()

    async with pair(tmp_path, engine) as made:
        reader, writer = await asyncio.open_connection(LOCAL, made.ingress)
        writer.write(post("/s", b"x"))
        async with asyncio.timeout(10):
            await reader.readuntil(b"first")
            go.set()
            assert b"second" in await reader.read()
        writer.close()


@pytest.mark.parametrize("proxy", [False, True], ids=["mapping", "http_proxy"])
async def test_a_client_that_leaves_stops_the_engine(tmp_path: Path, proxy: bool) -> None:
    stopped = asyncio.Event()

    async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_any(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        with contextlib.suppress(OSError):
            while True:
                writer.write(b"5\r\ntoken\r\n")
                await writer.drain()
                await asyncio.sleep(0.01)
        stopped.set()

    async with pair(tmp_path, engine, proxy=proxy) as made:
        reader, writer = await asyncio.open_connection(LOCAL, made.ingress)
        where = f"http://{LOCAL}:{made.egress}" if proxy else ""
        request = post(f"{where}/s", b"x")
        if proxy:
            request = request.replace(b"host: model", f"host: {LOCAL}:{made.egress}".encode())
        writer.write(request)
        async with asyncio.timeout(10):
            await reader.readuntil(b"token")
            writer.transport.abort()
            await stopped.wait()


async def test_rotating_keys_fail_no_request(tmp_path: Path) -> None:
    """Keys live two seconds while clients use them under load."""
    server = {"key": {"source": "self_generated", "rotation_interval": 1}}
    done = 0

    async def client(port: int, until: float) -> None:
        nonlocal done
        while asyncio.get_running_loop().time() < until:
            assert status_of(await talk(port, post("/r", b"x" * 100))) == 200
            done += 1

    async with pair(tmp_path, server=server) as made:
        until = asyncio.get_running_loop().time() + 4.5
        await asyncio.gather(*(client(made.ingress, until) for _ in range(4)))
    assert done > 40
    assert made.agent.calls.count("GetEvidence") >= 3


async def test_a_key_that_is_gone_is_replaced_within_the_request(tmp_path: Path) -> None:
    """The first tunnel request is told that its key is unknown; its client notices nothing."""
    refused = 0

    async def change(request: bytes, answer: bytes) -> tuple[bytes, bytes]:
        nonlocal refused
        if b"ohttp-chunked-req" in request and answer and not refused:
            refused += 1
            body = b'{"code":"ServerKeyConfigNotFound","message":"gone"}'
            head = b"HTTP/1.1 422 X\r\ncontent-length: " + str(len(body)).encode() + b"\r\n\r\n"
            return request, head + body
        return request, answer

    async with pair(tmp_path, between=meddler(change)) as made:
        answer = await talk(made.ingress, post("/again", b"once more"))
    assert refused == 1
    assert answer.endswith(b"|once more")
    assert made.agent.calls.count("GetEvidence") == 2


async def test_a_refused_key_whose_answer_was_lost_is_replaced_too(tmp_path: Path) -> None:
    """Stock egresses close before they have read everything, which may take their 422 away."""
    lost = 0

    def cuts(port: int) -> contextlib.AbstractAsyncContextManager[int]:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal lost
            head, body = await read_raw(reader)
            if b"ohttp-chunked-req" in head and not lost:
                lost += 1
                # The egress has made another key since.
                await asyncio.sleep(0.7)
                writer.transport.abort()
                return
            writer.write(await ask_once(port, head + body))
            await writer.drain()

        return serving(serve)

    server = {"key": {"source": "self_generated", "rotation_interval": 1}}
    async with pair(tmp_path, between=cuts, server=server) as made:
        # The key is fetched now, and rotated before the request has failed.
        opened = await asyncio.open_connection(LOCAL, made.ingress)
        await asyncio.sleep(0.5)
        answer = await talk(made.ingress, post("/again", b"once more"))
        opened[1].close()
    assert lost == 1
    assert answer.endswith(b"|once more")


async def test_a_broken_connection_under_the_same_key_is_an_error(tmp_path: Path) -> None:
    """Nobody knows whether such a request was served; it is not sent again."""
    tunnels = 0

    def cuts(port: int) -> contextlib.AbstractAsyncContextManager[int]:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal tunnels
            head, body = await read_raw(reader)
            if b"ohttp-chunked-req" in head:
                tunnels += 1
                writer.transport.abort()
                return
            writer.write(await ask_once(port, head + body))
            await writer.drain()

        return serving(serve)

    async with pair(tmp_path, between=cuts) as made:
        answer = await talk(made.ingress, post("/once", b"x"))
    assert status_of(answer) == 502
    assert tunnels == 1


async def test_a_key_that_stays_unknown_is_an_error(tmp_path: Path) -> None:
    async def change(request: bytes, answer: bytes) -> tuple[bytes, bytes]:
        if b"ohttp-chunked-req" in request and answer:
            return request, b"HTTP/1.1 422 X\r\ncontent-length: 2\r\n\r\n{}"
        return request, answer

    async with pair(tmp_path, between=meddler(change)) as made:
        answer = await talk(made.ingress, post("/again", b"x"))
    assert status_of(answer) == 502
    assert made.agent.calls.count("GetEvidence") == 2


async def test_outside_shows_nothing_that_was_not_asked_for(tmp_path: Path) -> None:
    outer: list[bytes] = []

    async def change(request: bytes, answer: bytes) -> tuple[bytes, bytes]:
        outer.append(request + answer)
        return request, answer

    client = {
        "path_rewrites": [{"match_regex": "/v1/(.*)", "substitution": "/gw/$1"}],
        "header_passthrough": {"request_headers": ["x-trace"], "response_headers": []},
    }
    server = {"header_passthrough": {"request_headers": [], "response_headers": ["x-inner"]}}
    async with pair(tmp_path, client=client, server=server, between=meddler(change)) as made:
        answer = await talk(
            made.ingress, post("/v1/m?q=SECRET", b"PROMPT", "x-trace: t1", "x-hidden: SECRET")
        )
    assert status_of(answer) == 200
    seen = b"".join(outer)
    tunnel = next(item for item in outer if b"ohttp-chunked-req" in item)
    assert tunnel.startswith(b"POST /gw/m HTTP/1.1")
    assert b"x-trace: t1" in tunnel
    assert b"x-inner: yes" in seen.lower()
    for secret in (b"SECRET", b"PROMPT", b"x-hidden", b"/v1/m"):
        assert secret not in seen
    assert b"POST /v1/m?q=SECRET" in answer


@pytest.mark.parametrize("forward", [True, False])
async def test_the_backend_learns_the_clients_address_only_if_it_may(
    tmp_path: Path, forward: bool
) -> None:
    async with pair(tmp_path, server={"forward_client_ip": forward}) as made:
        answer = await talk(made.ingress, post("/", b"", "x-forwarded-for: 192.0.2.1"))
    inner = answer.partition(b"\r\n\r\n")[2].lower()
    assert (b"x-real-ip: 127.0.0.1" in inner) is forward
    assert (b"x-forwarded-for: 192.0.2.1, 127.0.0.1" in inner) is forward


async def test_an_idle_backend_that_is_down_is_a_502(tmp_path: Path) -> None:
    async def closes(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with pair(tmp_path, closes) as made:
        answer = await talk(made.ingress, post("/", b"x"))
    assert status_of(answer) == 502
    assert b"upstream" in answer


async def test_a_backend_that_breaks_off_never_looks_whole(tmp_path: Path) -> None:
    async def breaks(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_any(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nfirst\r\n")
        await writer.drain()

    async with pair(tmp_path, breaks) as made:
        with contextlib.suppress(ConnectionError):
            answer = await talk(made.ingress, post("/", b"x"))
            assert not answer.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 101 Switching\r\nupgrade: x\r\n\r\n",
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
        b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n",
        b"HTTP/1.1 999 X\r\ncontent-length: 0\r\n\r\n",
    ],
    ids=["upgrade", "another protocol", "two lengths", "no length", "status"],
)
async def test_a_backend_that_speaks_no_http_is_a_502(tmp_path: Path, answer: bytes) -> None:
    async def odd(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_any(reader)
        writer.write(answer)
        await writer.drain()

    async with pair(tmp_path, odd) as made:
        given = await talk(made.ingress, post("/", b"x"))
    assert status_of(given) == 502


@pytest.mark.parametrize(
    ("service", "seen"),
    [
        (StockService(status="warning"), b"as.appraisal.cpu0"),
        (StockService(lifetime_s=-120), b"as.token.time"),
        (StockService(policies="other"), b"as.policy"),
    ],
    ids=["warning", "expired", "another policy"],
)
async def test_what_the_service_does_not_affirm_gets_no_request(
    tmp_path: Path, service: StockService, seen: bytes
) -> None:
    asked: list[bytes] = []

    async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append((await read_any(reader))[0])
        await echo(reader, writer)

    async with pair(tmp_path, engine, service=service) as made:
        answer = await talk(made.ingress, post("/", b"x"))
    assert status_of(answer) == 502
    assert seen in answer
    assert asked == []


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"CONNECT a:1 HTTP/1.1\r\nhost: a:1\r\n\r\n", 400),
        (b"GET http://a/ HTTP/1.1\r\nhost: a\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost: a\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n",
         400),
        (b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ncontent-length: 1\r\n\r\nx", 400),
        (b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost: a\r\nconnection: host\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost: a\r\nx: " + b"y" * 70000 + b"\r\n\r\n", 431),
        (b"\x16\x03\x01\x00\x05hello\r\n\r\n", 400),
    ],
    ids=["connect", "absolute", "websocket", "cl-te", "two lengths", "two hosts", "host is a hop",
         "large head", "tls"],
)  # fmt: skip
async def test_a_client_that_is_not_plain_http_is_told_so(
    tmp_path: Path, request_bytes: bytes, status: int
) -> None:
    async with pair(tmp_path) as made:
        answer = await talk(made.ingress, request_bytes)
    assert status_of(answer) == status
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"]


async def test_an_unknown_origin_is_no_peer(tmp_path: Path) -> None:
    """A plain web server where an egress was expected."""

    def other(_port: int) -> contextlib.AbstractAsyncContextManager[int]:
        return serving(echo)

    async with pair(tmp_path, between=other) as made:
        answer = await talk(made.ingress, post("/", b"PROMPT"))
    assert status_of(answer) == 502
    assert b"PROMPT" not in answer


async def test_expect_continue_is_answered(tmp_path: Path) -> None:
    async with pair(tmp_path) as made:
        reader, writer = await asyncio.open_connection(LOCAL, made.ingress)
        head = post("/", b"xyz", "expect: 100-continue")
        writer.write(head[:-3])
        async with asyncio.timeout(10):
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100")
            writer.write(head[-3:])
            answer = await reader.read()
        writer.close()
    assert answer.endswith(b"|xyz")
    assert b"expect" not in answer.lower()


@pytest.mark.parametrize("sends_on", [False, True])
async def test_an_answer_before_the_request_has_ended_is_passed_on(
    tmp_path: Path, sends_on: bool
) -> None:
    async def early(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Too Large\r\ncontent-length: 0\r\n\r\n")
        await writer.drain()

    async with pair(tmp_path, early) as made:
        reader, writer = await asyncio.open_connection(LOCAL, made.ingress)
        writer.write(b"POST / HTTP/1.1\r\nhost: h\r\ncontent-length: 5000000\r\n\r\nxx")
        async with asyncio.timeout(10):
            if sends_on:
                with contextlib.suppress(OSError):
                    writer.write(b"x" * 4_000_000)
            assert status_of(await reader.readuntil(b"\r\n\r\n")) == 413
        writer.close()


async def test_direct_forward_lets_whole_paths_through_and_nothing_else(tmp_path: Path) -> None:
    extra = {"direct_forward": [{"http_path": "/health"}]}
    async with pair(tmp_path, egress=extra) as made:
        plain = b"GET %s HTTP/1.1\r\nhost: h\r\n\r\n"
        assert status_of(await ask_once(made.egress, plain % b"/health")) == 200
        for path in (b"/", b"/health/x", b"/healthz", b"/v1/models", b"/%2e%2e/health"):
            answer = await ask_once(made.egress, plain % path)
            assert status_of(answer) == 403, path
        assert status_of(await talk(made.ingress, post("/v1/models", b"x"))) == 200
