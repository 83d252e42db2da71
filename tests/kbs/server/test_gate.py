"""The gate in front of every surface: prefix, networks, limits, headers, and nothing else."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from cai.errors import FormatError, LimitExceeded
from kbs.server.answers import error_handlers, read_body
from kbs.server.gate import Door, Gate
from kbs.server.settings import Compat, HttpSettings, LimitSettings


async def echo(request: Request) -> Response:
    body = await read_body(request)
    return PlainTextResponse(
        f"{request.url.scheme} {request.scope['path']} {len(body)} {request.state.request_id}"
    )


async def fail(_request: Request) -> Response:
    raise RuntimeError("planted-secret-55d1")


async def refuse(_request: Request) -> Response:
    raise FormatError("no", hint="try")


def app() -> Starlette:
    methods = ["GET", "POST"]
    routes = [
        Route("/kbs/v0/fail", fail), Route("/kbs/v0/refuse", refuse),
        Route("/healthz", echo), Route("/{path:path}", echo, methods=methods),
    ]  # fmt: skip
    return Starlette(routes=routes, exception_handlers=error_handlers(admin=False))


def door(**more: Any) -> Door:
    given = {"http": HttpSettings(), "limits": LimitSettings(), **more}
    return Door(**given)


def call(
    gate: Gate, path: str = "/x", *, client: tuple[str, int] | None = ("192.0.2.1", 5),
    method: str = "GET", **more: Any,
) -> httpx.Response:  # fmt: skip
    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(app=gate, client=client)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://kbs.test") as http:
            return await http.request(method, path, **more)

    return asyncio.run(run())


def kind(answer: httpx.Response) -> str:
    found: str = answer.json()["type"].rpartition("/")[2]
    return found


# The prefix.


@pytest.mark.parametrize(
    ("path", "seen"),
    [("/p/kbs/v0/auth", "/kbs/v0/auth"), ("/p//kbs/v0/auth", "/kbs/v0/auth"), ("/p/", "/"),
     ("/p/p/x", "/p/x"), ("/healthz", "/healthz"), ("/p/healthz", "/healthz")],
)  # fmt: skip
def test_the_prefix_is_taken_off(path: str, seen: str) -> None:
    answer = call(Gate(app(), door(http=HttpSettings(prefix="/p"))), path)
    assert answer.text.split()[1] == seen


@pytest.mark.parametrize("path", ["/", "/p", "/px/y", "/kbs/v0/auth", "/P/x", "//p/x"])
def test_nothing_else_is_served(path: str) -> None:
    gate = Gate(app(), door(http=HttpSettings(prefix="/p")))
    answer = call(gate, f"http://kbs.test{path}")
    assert (answer.status_code, kind(answer)) == (404, "InvalidRequestPath")


def test_errors_link_below_the_prefix() -> None:
    answer = call(Gate(app(), door(http=HttpSettings(prefix="/a/b"))), "/a/b/kbs/v0/refuse")
    assert answer.json()["type"] == "/a/b/kbs/v0/errors/SerdeError"
    assert answer.json()["hint"] == "try"


# Who may speak.


def test_only_allowed_networks_speak() -> None:
    gate = Gate(app(), door(allow=(ipaddress.ip_network("192.0.2.0/24"),)))
    assert call(gate).status_code == 200
    for client in (("198.51.100.1", 1), ("2001:db8::1", 1)):
        refused = call(gate, client=client)
        assert (refused.status_code, kind(refused)) == (403, "AddressNotAllowed")
        # A load balancer may still ask whether we live.
        assert call(gate, "/healthz", client=client).status_code == 200


def test_a_forged_header_does_not_help() -> None:
    gate = Gate(app(), door(allow=(ipaddress.ip_network("192.0.2.0/24"),)))
    headers = {"X-Forwarded-For": "192.0.2.7"}
    assert call(gate, client=("198.51.100.1", 1), headers=headers).status_code == 403


def test_behind_a_trusted_proxy_the_client_counts() -> None:
    http = HttpSettings(trusted_proxies=(ipaddress.ip_network("10.0.0.0/8"),))
    gate = Gate(app(), door(http=http, allow=(ipaddress.ip_network("192.0.2.0/24"),)))
    proxy = ("10.0.0.1", 1)
    headers = {"X-Forwarded-For": "192.0.2.7", "X-Forwarded-Proto": "https"}
    answer = call(gate, client=proxy, headers=headers)
    assert answer.text.startswith("https ")
    assert call(gate, client=proxy, headers={"X-Forwarded-For": "198.51.100.1"}).status_code == 403
    assert call(gate, client=proxy).status_code == 403
    # The scheme is believed of nobody else.
    direct = call(gate, client=("192.0.2.9", 1), headers={"X-Forwarded-Proto": "https"})
    assert direct.text.startswith("http ")


# How much.


def test_one_address_sends_at_its_rate() -> None:
    gate = Gate(app(), door(limits=LimitSettings(rate=1, burst=2)))
    assert [call(gate).status_code for _ in range(3)] == [200, 200, 429]
    refused = call(gate)
    assert kind(refused) == "TooManyRequests"
    assert refused.headers["retry-after"] == "1"
    assert call(gate, client=("192.0.2.2", 1)).status_code == 200
    for local in (("127.0.0.1", 1), ("::1", 1)):
        assert [call(gate, client=local).status_code for _ in range(4)] == [200] * 4


def test_no_rate_is_no_limit() -> None:
    gate = Gate(app(), door(limits=LimitSettings(rate=0, burst=1)))
    assert [call(gate).status_code for _ in range(5)] == [200] * 5


def together(gate: Gate, clients: list[str]) -> list[int]:
    async def run() -> list[int]:
        async def one(host: str) -> int:
            transport = httpx.ASGITransport(app=gate, client=(host, 1))
            async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
                return (await http.get("/slow")).status_code

        return list(await asyncio.gather(*(one(host) for host in clients)))

    return asyncio.run(run())


def test_only_so_many_at_once() -> None:
    async def slow(_request: Request) -> Response:
        await asyncio.sleep(0.2)
        return PlainTextResponse("done")

    handlers = error_handlers(admin=False)
    behind = Starlette(routes=[Route("/slow", slow)], exception_handlers=handlers)
    limits = LimitSettings(requests=3, requests_per_source=2, rate=0)
    gate = Gate(behind, door(limits=limits))
    assert sorted(together(gate, ["192.0.2.1"] * 3)) == [200, 200, 503]
    found = together(gate, [f"192.0.2.{place}" for place in range(4)])
    assert sorted(found) == [200, 200, 200, 503]
    # Everyone who left makes room.
    assert together(gate, ["192.0.2.1"] * 2) == [200, 200]


def test_a_request_that_fails_makes_room_too() -> None:
    gate = Gate(app(), door(limits=LimitSettings(requests=1, requests_per_source=1)))
    for _ in range(3):
        assert call(gate, "/kbs/v0/fail").status_code == 500
        assert call(gate, "/kbs/v0/refuse").status_code == 400


def test_bodies_are_bounded() -> None:
    limits = LimitSettings(request_bytes=4096)
    gate = Gate(app(), door(limits=limits))
    assert call(gate, method="POST", content=b"x" * 4096).status_code == 200
    refused = call(gate, method="POST", content=b"x" * 4097)
    assert (refused.status_code, kind(refused)) == (413, "LimitExceeded")
    announced = call(gate, method="POST", content=b"", headers={"Content-Length": "9" * 30})
    assert announced.status_code == 413

    async def chunks() -> Any:
        for _ in range(5):
            yield b"x" * 1024

    assert call(gate, method="POST", content=chunks()).status_code == 413
    wider = Gate(app(), door(limits=limits, also_bytes=8192))
    assert call(wider, method="POST", content=b"x" * 8192).status_code == 200


# What is said.


def test_a_fault_says_where_but_not_what(caplog: pytest.LogCaptureFixture) -> None:
    answer = call(Gate(app(), door()), "/kbs/v0/fail")
    assert (answer.status_code, kind(answer)) == (500, "PluginInternalError")
    assert "planted-secret" not in answer.text + caplog.text
    assert answer.headers["x-request-id"] in caplog.text
    assert "test_gate.py" in caplog.text


@pytest.mark.parametrize("path", ["/x", "/kbs/v0/fail", "/kbs/v0/refuse"])
def test_every_answer_has_the_headers(path: str) -> None:
    answer = call(Gate(app(), door()), path)
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert len(answer.headers["x-request-id"]) == 32


@pytest.mark.parametrize(
    ("path", "ours", "theirs"),
    [("/kbs/v0/refuse", 400, 401), ("/kbs/v0/fail", 500, 401), ("/x", 200, 200)],
)
def test_compat_is_401_everywhere(path: str, ours: int, theirs: int) -> None:
    assert call(Gate(app(), door()), path).status_code == ours
    stock = Gate(app(), door(http=HttpSettings(compat=Compat.TRUSTEE)))
    assert call(stock, path).status_code == theirs


def test_what_is_no_request_is_not_served() -> None:
    told: list[Any] = []

    async def send(message: Any) -> None:
        told.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    serve: Callable[..., Any] = Gate(app(), door())
    asyncio.run(serve({"type": "websocket", "headers": []}, receive, send))
    assert told == []


def test_an_application_that_answers_nothing_is_a_fault() -> None:
    async def silent(_scope: Any, _receive: Any, _send: Any) -> None:
        raise LimitExceeded("nobody handles this")

    answer = call(Gate(silent, door()))
    assert (answer.status_code, kind(answer)) == (500, "PluginInternalError")
