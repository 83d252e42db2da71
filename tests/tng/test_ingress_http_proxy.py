"""Requests that a proxy must not take at their word."""

from __future__ import annotations

import asyncio
import io

import pytest

from tests.tng.gateways import error_of, port_of, proxy_config, running, serving, talk

pytestmark = pytest.mark.anyio

STOCK = {"as_addr": "http://127.0.0.1:9/as/", "policy_ids": ["default"]}

GET = b"GET http://peer.example/ HTTP/1.1\r\n"
HOST = b"host: peer.example\r\n"


@pytest.mark.parametrize(
    ("request_bytes", "status", "words"),
    [
        # not a proxy request
        (b"GET / HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n", 400, "no absolute URI"),
        (b"GET /v1 HTTP/1.1\r\nhost: elsewhere.example\r\n\r\n", 400, "no absolute URI"),
        (b"OPTIONS * HTTP/1.1\r\nhost: a\r\n\r\n", 400, "no absolute URI"),
        (b"GET https://a.example/ HTTP/1.1\r\nhost: a.example\r\n\r\n", 400, "http://"),
        (b"GET ftp://a.example/ HTTP/1.1\r\nhost: a.example\r\n\r\n", 400, "http://"),
        (b"GET a.example HTTP/1.1\r\nhost: a.example\r\n\r\n", 400, "http://"),
        (b"hello\r\n\r\n", 400, "not an HTTP/1.1 request"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, "bare"),
        (b"GET http://a/ HTTP/2.0\r\nhost: a\r\n\r\n", 400, "HTTP/1.1"),
        # two opinions on the destination
        (b"GET http://a.example/ HTTP/1.1\r\nhost: b.example\r\n\r\n", 400, "different"),
        (b"GET http://a.example/ HTTP/1.1\r\nhost: a.example:81\r\n\r\n", 400, "different"),
        (b"GET http://a.example:81/ HTTP/1.1\r\nhost: a.example\r\n\r\n", 400, "different"),
        (b"CONNECT a.example:443 HTTP/1.1\r\nhost: b.example:443\r\n\r\n", 400, "different"),
        (GET + HOST + HOST + b"\r\n", 400, "twice"),
        (GET + b"\r\n", 400, "Host"),
        # destinations in disguise
        (b"GET http://user@a.example/ HTTP/1.1\r\nhost: a.example\r\n\r\n", 400, "host name"),
        (b"GET http://a.example@b/ HTTP/1.1\r\nhost: b\r\n\r\n", 400, "host name"),
        (b"GET http://a%2eexample/ HTTP/1.1\r\nhost: a.example\r\n\r\n", 400, "host name"),
        (b"GET http://127.1/ HTTP/1.1\r\nhost: 127.1\r\n\r\n", 400, "number"),
        (b"GET http://2130706433/ HTTP/1.1\r\nhost: 2130706433\r\n\r\n", 400, "number"),
        (b"GET http://0x7f000001/ HTTP/1.1\r\nhost: 0x7f000001\r\n\r\n", 400, "number"),
        (b"GET http://0177.0.0.1/ HTTP/1.1\r\nhost: 0177.0.0.1\r\n\r\n", 400, "number"),
        (b"GET http://a:b/ HTTP/1.1\r\nhost: a\r\n\r\n", 400, "port"),
        (b"GET http://a:0/ HTTP/1.1\r\nhost: a:0\r\n\r\n", 400, "port"),
        (b"GET http://a:65536/ HTTP/1.1\r\nhost: a:65536\r\n\r\n", 400, "port"),
        (b"GET http://a:80:80/ HTTP/1.1\r\nhost: a\r\n\r\n", 400, "port"),
        (b"GET http:///x HTTP/1.1\r\nhost: a\r\n\r\n", 400, "host name"),
        (b"GET http://[::1/ HTTP/1.1\r\nhost: a\r\n\r\n", 400, "bracket"),
        (b"GET http://[fe80::1%25eth0]/ HTTP/1.1\r\nhost: a\r\n\r\n", 400, "zone"),
        (b"GET http://a/#x HTTP/1.1\r\nhost: a\r\n\r\n", 400, "fragment"),
        (b"CONNECT a.example HTTP/1.1\r\nhost: a.example\r\n\r\n", 400, "no port"),
        (b"CONNECT http://a:1/ HTTP/1.1\r\nhost: a:1\r\n\r\n", 400, "port"),
        (b"CONNECT /a:1 HTTP/1.1\r\nhost: a:1\r\n\r\n", 400, "host name"),
        # smuggling
        (GET + HOST + b"content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n", 400, "chunked"),
        (GET + HOST + b"content-length: 3\r\ncontent-length: 3\r\n\r\nabc", 400, "twice"),
        (GET + HOST + b"content-length: 3\r\ncontent-length: 4\r\n\r\nabc", 400, "twice"),
        (GET + HOST + b"content-length: +3\r\n\r\nabc", 400, "one number"),
        (GET + HOST + b"content-length: 3, 3\r\n\r\nabc", 400, "one number"),
        (GET + HOST + b"transfer-encoding: identity\r\n\r\n", 400, "chunked"),
        (GET + HOST + b"transfer-encoding: gzip, chunked\r\n\r\n", 400, "chunked"),
        (GET + HOST + b"transfer-encoding: xchunked\r\n\r\n", 400, "chunked"),
        (GET + HOST + b"transfer-encoding: \x0bchunked\r\n\r\n", 400, "chunked"),
        (
            GET + HOST + b"transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n",
            400,
            "chunked",
        ),
        (GET + HOST + b"transfer-encoding : chunked\r\n\r\n", 400, "space"),
        (GET + HOST + b" x: folded\r\n\r\n", 400, "folded"),
        (GET + b"x: 1\r\n\thost: b\r\n\r\n", 400, "folded"),
        (GET.replace(b"\r\n", b"\n") + HOST + b"\r\n", 400, "bare"),
        (GET + HOST + b"x: 1\nhost: b\r\n\r\n", 400, "bare"),
        (GET + HOST + b"x: 1\rhost: b\r\n\r\n", 400, "bare"),
        (GET + HOST + b"x: \x00\r\n\r\n", 400, "NUL"),
        (GET.replace(b"\r\n", b"\n") + HOST.replace(b"\r\n", b"\n") + b"\n", 400, "bare"),
        (GET + HOST + b"x-" * 40000 + b": 1\r\n\r\n", 431, "longer"),
        (GET + HOST + b"x: " + b"a" * 70000, 431, "longer"),
        (GET + HOST + b"x: 1\r\n" * 200 + b"\r\n", 400, "headers"),
        # places where a proxy must not go
        (b"GET http://169.254.169.254/ HTTP/1.1\r\nhost: 169.254.169.254\r\n\r\n", 403, "metadata"),
        (b"GET http://169.254.1.1/ HTTP/1.1\r\nhost: 169.254.1.1\r\n\r\n", 403, "link-local"),
        (b"GET http://100.100.100.200/ HTTP/1.1\r\nhost: 100.100.100.200\r\n\r\n", 403, "metadata"),
        (b"GET http://[fe80::1]/ HTTP/1.1\r\nhost: [fe80::1]\r\n\r\n", 403, "link-local"),
        (b"GET http://[::ffff:a9fe:a9fe]/ HTTP/1.0\r\n\r\n", 403, "metadata"),
        (b"GET http://0.0.0.0:99/ HTTP/1.1\r\nhost: 0.0.0.0:99\r\n\r\n", 403, "no address"),
        (b"GET http://[::]:99/ HTTP/1.1\r\nhost: [::]:99\r\n\r\n", 403, "no address"),
        (b"GET http://224.0.0.1/ HTTP/1.1\r\nhost: 224.0.0.1\r\n\r\n", 403, "no address"),
        (b"CONNECT 169.254.169.254:80 HTTP/1.1\r\nhost: 169.254.169.254:80\r\n\r\n", 403, "meta"),
    ],
)  # fmt: skip
async def test_attacks(request_bytes: bytes, status: int, words: str) -> None:
    async with running(proxy_config(STOCK)) as inside:
        answer = await talk(port_of(inside, "ingress[0]"), request_bytes)
    assert answer.startswith(f"HTTP/1.1 {status} ".encode()), answer[:300]
    assert words in error_of(answer)["message"]
    assert answer.count(b"HTTP/1.1 ") == 1 + answer.count(b"an HTTP/1.1 request")


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]"])
async def test_the_proxy_does_not_ask_itself(name: str) -> None:
    async with running(proxy_config(STOCK)) as inside:
        port = port_of(inside, "ingress[0]")
        request = f"GET http://{name}:{port}/ HTTP/1.1\r\nhost: {name}:{port}\r\n\r\n"
        answer = await talk(port, request.encode())
    assert answer.startswith(b"HTTP/1.1 403 ")
    assert "this gateway itself" in error_of(answer)["message"]


async def test_a_listener_on_every_address_is_itself_on_every_address() -> None:
    config = proxy_config(STOCK, proxy_listen={"host": "0.0.0.0", "port": 0})
    async with running(config) as inside:
        port = port_of(inside, "ingress[0]")
        request = f"CONNECT 127.0.0.2:{port} HTTP/1.1\r\nhost: 127.0.0.2:{port}\r\n\r\n"
        answer = await talk(port, request.encode())
    assert answer.startswith(b"HTTP/1.1 403 ")


async def test_a_slow_head_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tng.ingress.http1.HEAD_TIMEOUT_S", 0.2)
    async with running(proxy_config(STOCK)) as inside:
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", port_of(inside, "ingress[0]")
        )
        writer.write(GET)
        async with asyncio.timeout(10):
            answer = await reader.read()
        writer.close()
    assert answer.startswith(b"HTTP/1.1 408 ")


async def test_an_idle_connection_is_closed_without_a_word(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tng.ingress.http1.KEEP_ALIVE_S", 0.2)
    async with running(proxy_config(STOCK)) as inside:
        assert await talk(port_of(inside, "ingress[0]"), b"") == b""


@pytest.mark.parametrize(
    ("filters", "allowed"),
    [
        ([{"domain": "other.example"}], False),
        ([{"domain": "*.example"}], False),
        ([{"ip_cidr": "10.0.0.0/8"}], False),
        ([{"port": 1}], False),
        ([{"ip": "127.0.0.1", "port": 1}], False),
        ([{"ip": "127.0.0.1"}], True),
        ([{"domain": "*"}], True),
        ([{"domain": "x"}, {"ip_cidr": "127.0.0.0/8"}], True),
    ],
)
async def test_a_destination_that_no_filter_names_is_refused_and_never_sent_in_clear(
    filters: list[dict[str, object]], allowed: bool
) -> None:
    contacted = asyncio.Event()

    async def peer(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        contacted.set()
        await reader.read(10)

    async with (
        serving(peer) as port,
        running(proxy_config(STOCK, dst_filters=filters)) as inside,
    ):
        request = f"GET http://127.0.0.1:{port}/ HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\n\r\n"
        answer = await talk(port_of(inside, "ingress[0]"), request.encode())
    assert answer.startswith(b"HTTP/1.1 502 " if allowed else b"HTTP/1.1 403 ")
    assert contacted.is_set() is allowed


async def test_stock_syntax_with_nothing_there_names_the_attestation_service() -> None:
    """The common client command, before anything else runs (issue 2, must show 4)."""
    async with serving(_plain_http) as dead:
        pass
    async with running(proxy_config(STOCK)) as inside:
        error = error_of(await _ask(inside, dead))
    assert "attestation service http://127.0.0.1:9/as/" in error["message"]
    assert "cannot be reached" in error["message"]


async def test_stock_syntax_and_a_peer_without_evidence() -> None:
    async with serving(_plain_http) as peer, running(proxy_config(STOCK)) as inside:
        error = error_of(await _ask(inside, peer))
    assert error["code"] == "peer-no-evidence"
    assert "answers without evidence" in error["message"]
    assert "attestation service" in error["message"]


async def test_stock_syntax_with_a_service_and_a_peer_without_evidence() -> None:
    asked: list[bytes] = []

    async def service(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\npem")

    async with serving(service) as port, serving(_plain_http) as peer:
        verify = {
            "as_addr": f"http://127.0.0.1:{port}/as",
            "policy_ids": [],
            "as_headers": {"x-tenant": "7"},
        }
        async with running(proxy_config(verify)) as inside:
            error = error_of(await _ask(inside, peer))
    assert error["code"] == "peer-no-evidence"
    assert "attestation service" not in error["message"]
    assert asked[0].startswith(b"GET /as/certificate HTTP/1.1")
    assert b"x-tenant: 7" in asked[0]


async def test_a_service_without_a_certificate_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    # A variable of the environment must not lead the question through the proxy itself.
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")

    async def service(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")

    async with serving(service) as port, serving(_plain_http) as peer:
        verify = {"as_addr": f"http://127.0.0.1:{port}/as/", "policy_ids": []}
        async with running(proxy_config(verify)) as inside:
            error = error_of(await _ask(inside, peer))
    assert "HTTP 404" in error["message"]


async def test_the_log_shows_no_control_characters() -> None:
    log = io.StringIO()
    async with running(proxy_config(STOCK), log=log) as inside:
        port = port_of(inside, "ingress[0]")
        await talk(port, b"GET http://a\x1b[2J/ HTTP/1.1\r\nhost: a\r\n\r\n")
    assert "400" in log.getvalue()
    assert "\x1b" not in log.getvalue()


async def test_the_log_quotes_no_malformed_request() -> None:
    log = io.StringIO()
    async with running(proxy_config(STOCK), log=log) as inside:
        await talk(port_of(inside, "ingress[0]"), b"my secret prompt\r\n\r\n")
    assert "400" in log.getvalue()
    assert "secret" not in log.getvalue()


async def _plain_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(100)
    writer.write(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")


async def _ask(inside: dict[str, list[str]], port: int) -> bytes:
    request = f"GET http://127.0.0.1:{port}/ HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\n\r\n"
    answer = await talk(port_of(inside, "ingress[0]"), request.encode())
    assert answer.startswith(b"HTTP/1.1 502 ")
    return answer
