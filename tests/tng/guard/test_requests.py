"""What of a request reaches the backend, and what is refused before it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.tng.guard.guarded import CHAT, PROMPT, Engine, guarded, request
from tng.guard import http
from tng.guard.routes import INFERENCE
from tng.streams import Code

pytestmark = pytest.mark.anyio


def chat(**more: Any) -> dict[str, Any]:
    return {**PROMPT, **more}


def saying(*parts: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": list(parts)}]}


async def test_a_request_reaches_the_engine_written_anew(tmp_path: Path) -> None:
    engine = Engine()
    async with guarded(tmp_path, engine) as bench:
        raw = b'{ "model":"m",\n "messages" : [{"role":"user","content":"h\\u00e9"}], "seed": 1 }'
        answer = await bench.ask(
            CHAT + "?beta=true", raw=raw,
            headers={"cookie": "c=1", "x-data-parallel-rank": "1", "user-agent": "test"},
        )
    assert answer.status == 200
    assert answer.json["choices"] == [{"text": "ok"}]
    expected = '{"model":"m","messages":[{"role":"user","content":"hé"}],"seed":1,'
    assert engine.raw[0].startswith(expected.encode())
    head = engine.heads[0].lower()
    assert head.startswith(b"post /v1/chat/completions http/1.1\r\n")
    assert b"user-agent: test" in head
    for word in (b"cookie", b"x-data-parallel-rank", b"authorization", b"beta"):
        assert word not in head


async def test_headers_beyond_ascii_pass_as_they_are(tmp_path: Path) -> None:
    engine = Engine()
    async with guarded(tmp_path, engine) as bench:
        assert (await bench.ask(headers={"user-agent": "t\u00e9st", "accept": "*/*"})).status == 200
        assert (await bench.ask(headers={"accept": "a", "Accept": "b"})).status == 400
    assert "user-agent: t\u00e9st".encode() in engine.heads[0].lower()


async def test_a_fault_of_our_own_ends_one_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with guarded(tmp_path) as bench:
        monkeypatch.setattr(bench.desk, "route", lambda _request: 1 // 0)
        client = bench.connect()
        client.send(request())
        await client.task
        assert client.stream.reset_code is Code.INTERNAL
        assert "fault of our own: ZeroDivisionError" in bench.log.getvalue()
        monkeypatch.undo()
        assert (await bench.ask()).status == 200


async def test_an_idle_stream_that_breaks_is_no_request(tmp_path: Path) -> None:
    async with guarded(tmp_path) as bench:
        client = bench.connect()
        await client.ask()
        client.stream.reset_code = Code.CANCELLED
        client.leave()
        await client.task
        assert bench.log.getvalue().count("->") == 1


async def test_two_callers_with_one_prompt_get_different_salts(tmp_path: Path) -> None:
    engine = Engine()
    async with guarded(tmp_path, engine) as bench:
        await bench.ask(session="aa")
        await bench.ask(body=chat(cache_salt="of somebody else"), session="aa")
        await bench.ask(session="bb")
        await bench.ask(session="bb", key="aa")
        await bench.ask(session="cc", key="aa")
    salts = [body["cache_salt"] for body in engine.bodies]
    assert salts[0] == salts[1]
    assert salts[3] == salts[4]
    assert len(set(salts)) == 3
    assert all(len(salt) == 64 for salt in salts)


async def test_another_boot_has_other_salts(tmp_path: Path) -> None:
    engine = Engine()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        async with guarded(tmp_path / name, engine) as bench:
            await bench.ask()
    assert engine.bodies[0]["cache_salt"] != engine.bodies[1]["cache_salt"]


async def test_a_client_cannot_choose_a_salt_even_where_none_is_set(tmp_path: Path) -> None:
    engine = Engine()
    async with guarded(tmp_path, engine, unsafe_shared_prompt_cache=True) as bench:
        await bench.ask(body=chat(cache_salt="of somebody else"))
        assert "unsafe_shared_prompt_cache" in str(bench.desk.status()["unsafe"])
    assert "cache_salt" not in engine.bodies[0]


@pytest.mark.parametrize("path", [
    "/metrics", "/sleep", "/wake_up", "/collective_rpc", "/v1/load_lora_adapter", "/docs",
    "/openapi.json", "/health", "/tokenize", "/v1/responses/resp_1", "/inference/v1/generate",
    "/v1/audio/transcriptions", "/pooling", "/", "/v1/chat/completions/", "//v1/chat/completions",
    "/v1/./chat/completions", "/v1/../metrics", "/v1/chat%2fcompletions", "/v1/chat/completions%20",
    "/V1/chat/completions", "/v1/chat/completions;a=b", "/v1/chat/completions/render",
    "/v1/messages/render", "http://guest/v1/chat/completions", "*",
])  # fmt: skip
async def test_every_other_path_is_refused(tmp_path: Path, path: str) -> None:
    engine = Engine()
    async with guarded(tmp_path, engine) as bench:
        answer = await bench.ask(path)
    assert answer.status == 403
    assert answer.error["code"] == "path_not_allowed"
    assert answer.error["type"] == "permission_error"
    assert not engine.heads


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"])
async def test_a_path_takes_one_method(tmp_path: Path, method: str) -> None:
    engine = Engine()
    async with guarded(tmp_path, engine) as bench:
        answer = await bench.ask(method=method)
    assert (answer.status, answer.headers["allow"]) == (405, "POST")
    assert not engine.heads


async def test_every_inference_route_says_what_it_is_for() -> None:
    assert all(route.why for route in INFERENCE)
    assert all(route.fields or route.method == "GET" for route in INFERENCE)


async def test_models_are_listed_without_a_body(tmp_path: Path) -> None:
    engine = Engine()
    async with guarded(tmp_path, engine) as bench:
        assert (await bench.ask("/v1/models", method="GET")).status == 200
    assert engine.raw == [b""]


@pytest.mark.parametrize("raw", [
    b"", b"null", b"[]", b'"text"', b"{", b'{"model":"m"}x', b"\xff", b'{"model":"m","model":"n"}',
    b'{"messages":[{"role":"a","role":"b"}]}', b'{"seed":NaN}', b'{"seed":Infinity}',
    b'{"temperature":1e999}', b'{"seed":9223372036854775808}', b'{"seed":' + b"1" * 70 + b"}",
    b'{"seed":' + b"1" * 5000 + b"}", b'{"temperature":0.' + b"1" * 100 + b"}",
    b'{"messages":' + b"[" * 60 + b"]" * 60 + b"}",
    b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"messages":[' + b"{}," * 200_001 + b"{}]}", b'{"user":"\\ud800"}', b'{"\\ud800":1}',
    "\ufeff{}".encode(), '{"model":"m"}'.encode("utf-16"), b'{"model":"m",}', b"{'model':1}",
], ids=lambda raw: repr(raw[:24]))  # fmt: skip
async def test_a_malformed_body_is_refused(tmp_path: Path, raw: bytes) -> None:
    engine = Engine()
    async with guarded(tmp_path, engine) as bench:
        answer = await bench.ask(raw=raw)
    assert answer.status == 400
    assert answer.error["type"] == "invalid_request_error"
    assert not engine.heads


@pytest.mark.parametrize("member", [
    {"prompt_embeds": "x"}, {"kv_transfer_params": {}}, {"ec_transfer_params": {"a": 1}},
    {"mm_payload": "x"}, {"media_io_kwargs": {}}, {"mm_processor_kwargs": {}},
    {"vllm_xargs": {"a": 1}}, {"chat_template": "{{ x }}"}, {"priority": -1}, {"request_id": "x"},
    {"session_id": "x"}, {"background": True}, {"what_is_new": 1}, {"prompt": "x"},
    {"chat_template_kwargs": {"chat_template": "x"}}, {"chat_template_kwargs": {"tokenize": True}},
    {"chat_template_kwargs": []}, {"n": 17}, {"n": 0}, {"n": True}, {"best_of": 10**6},
    {"n": 1.5}, {"stream": "yes"}, {"stream": 1}, {"stream_options": [], "stream": True},
    {"tools": {}}, {"tools": [{"type": "mcp", "server_url": "http://127.0.0.1"}]},
    {"tools": [{"type": "web_search"}]}, {"tools": ["x"]}, {"tools": [None]},
], ids=lambda member: json.dumps(member)[:40])  # fmt: skip
async def test_a_member_that_may_not_pass_is_named(tmp_path: Path, member: dict[str, Any]) -> None:
    engine = Engine()
    async with guarded(tmp_path, engine) as bench:
        answer = await bench.ask(body=chat(**member))
    assert answer.status == 400
    assert answer.error["param"] in member
    assert not engine.heads


async def test_unknown_members_may_be_dropped_but_never_dangerous_ones(tmp_path: Path) -> None:
    engine = Engine()
    async with guarded(tmp_path, engine, unknown_fields="drop") as bench:
        assert (await bench.ask(body=chat(what_is_new=1, metadata={"a": "b"}))).status == 200
        assert (await bench.ask(body=chat(kv_transfer_params={}))).status == 400
    assert set(engine.bodies[0]) == {"model", "messages", "cache_salt"}
    assert len(engine.bodies) == 1


@pytest.mark.parametrize("part", [
    {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest"}},
    {"type": "image_url", "image_url": {"url": "HTTPS://example.org/a.png"}},
    {"type": "image_url", "image_url": "https://example.org/a.png"},
    {"image_url": "file:///etc/passwd"}, {"image_url": {"url": "/etc/passwd"}},
    {"image_url": {"url": " http://example.org"}}, {"image_url": {"url": "ht\ntp://example.org"}},
    {"image_url": {"url": ""}}, {"type": "video_url", "video_url": {"url": "ftp://a"}},
    {"type": "audio_url", "audio_url": {"url": "http://a"}}, {"type": "image_embeds"},
    {"image_embeds": "AAAA"}, {"type": "prompt_embeds", "data": "AAAA"}, {"audio_embeds": {}},
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}, "uuid": "of-another"},
    {"type": "input_image", "image_url": "http://a"}, {"type": "input_file", "file_id": "f-1"},
    {"type": "image", "source": {"type": "url", "url": "http://a"}},
    {"type": "tool_result", "content": [{"type": "image_url", "image_url": {"url": "http://a"}}]},
], ids=lambda part: json.dumps(part)[:48])  # fmt: skip
async def test_nothing_is_fetched_for_a_client(tmp_path: Path, part: dict[str, Any]) -> None:
    engine = Engine()
    async with guarded(tmp_path, engine) as bench:
        answer = await bench.ask(body=saying(part))
    assert answer.status == 400
    assert answer.error["param"] == "messages"
    assert not engine.heads


async def test_media_as_data_and_the_words_of_tools_pass(tmp_path: Path) -> None:
    engine = Engine()
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    called = {"type": "tool_use", "id": "1", "name": "get", "input": {"url": "https://a"}}
    schema = {"type": "object", "properties": {"image_url": {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    async with guarded(tmp_path, engine) as bench:
        answer = await bench.ask(body={**saying(image, called), "tools": tools})
    assert answer.status == 200
    assert engine.bodies[0]["messages"][0]["content"] == [image, called]


async def test_remote_media_only_by_an_unsafe_setting(tmp_path: Path) -> None:
    engine = Engine()
    part = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
    async with guarded(tmp_path, engine, unsafe_remote_media=True) as bench:
        assert (await bench.ask(body=saying(part))).status == 200
        assert (await bench.ask(body=saying({"image_embeds": "AA"}))).status == 400
        assert bench.desk.guard.unsafe == ("unsafe_remote_media",)


@pytest.mark.parametrize(("path", "name", "most"), [
    ("/v1/completions", "prompt", 128), ("/v1/embeddings", "input", 2048),
])  # fmt: skip
async def test_a_batch_has_an_end(tmp_path: Path, path: str, name: str, most: int) -> None:
    async with guarded(tmp_path) as bench:
        for value, status in (
            (["a"] * most, 200), (["a"] * (most + 1), 400), ([5] * 4000, 200),
            ([[5]] * (most + 1), 400), ([*[5] * most, "a"], 400),
        ):  # fmt: skip
            assert (await bench.ask(path, {"model": "m", name: value})).status == status


async def test_responses_are_not_stored(tmp_path: Path) -> None:
    engine = Engine()
    async with guarded(tmp_path, engine) as bench:
        body = {"model": "m", "input": "hello", "store": True}
        assert (await bench.ask("/v1/responses", body)).status == 200
        for more in ({"previous_response_id": "resp_1"}, {"background": True},
                     {"prompt": {"id": "x"}}):
            assert (await bench.ask("/v1/responses", {**body, **more})).status == 400
    assert [body["store"] for body in engine.bodies] == [False]


@pytest.mark.parametrize(("headers", "status"), [
    ({"content-type": "text/plain"}, 415), ({"content-type": "multipart/form-data"}, 415),
    ({"content-encoding": "gzip"}, 415), ({"content-length": "999999999999"}, 413),
    ({"content-length": "9" * 19}, 413),
])  # fmt: skip
async def test_bodies_of_other_kinds_are_refused(
    tmp_path: Path, headers: dict[str, str], status: int
) -> None:
    engine = Engine()
    async with guarded(tmp_path, engine) as bench:
        lines = [f"POST {CHAT} HTTP/1.1", "host: a"]
        fields = {"content-type": "application/json", "content-length": "2", **headers}
        lines += [f"{name}: {value}" for name, value in fields.items()]
        client = bench.connect()
        client.send("\r\n".join(lines).encode() + b"\r\n\r\n{}")
        answer = await client.read()
    assert answer.status == status
    assert not engine.heads


async def test_a_chunked_body_is_bounded_as_it_comes(tmp_path: Path) -> None:
    engine = Engine()
    async with guarded(tmp_path, engine, max_body_mib=1) as bench:
        client = bench.connect()
        head = f"POST {CHAT} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
        client.send(head.encode() + b"transfer-encoding: chunked\r\n\r\n")
        for _ in range(17):
            client.send(b"10000\r\n" + b" " * 65536 + b"\r\n")
        answer = await client.read()
    assert (answer.status, answer.error["code"]) == (413, "body_too_large")
    assert not engine.heads


SMUGGLED = b"\r\n\r\nGET /metrics HTTP/1.1\r\nhost: a\r\n\r\n"
START = f"POST {CHAT} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n".encode()


@pytest.mark.parametrize("head", [
    b"content-length: 4\r\ntransfer-encoding: chunked",
    b"transfer-encoding: chunked\r\ncontent-length: 4",
    b"content-length: 4\r\ncontent-length: 5", b"content-length: 4, 4", b"content-length: +4",
    b"content-length: 0x4", b"content-length: -1", b"transfer-encoding: chunked, identity",
    b"transfer-encoding: xchunked", b"transfer-encoding: identity",
    b"transfer-encoding: chunked\r\ntransfer-encoding: chunked", b"transfer-encoding : chunked",
    b"transfer-encoding:\x0bchunked", b"content-length : 4", b" content-length: 4",
    b"content-length: 4\nx: y", b"x: a\rb\r\ncontent-length: 4", b"x: \x00\r\ncontent-length: 4",
    b"host: b\r\ncontent-length: 4",
], ids=repr)  # fmt: skip
async def test_a_request_cannot_hide_another(tmp_path: Path, head: bytes) -> None:
    engine = Engine()
    async with guarded(tmp_path, engine) as bench:
        client = bench.connect()
        client.send(START + head + SMUGGLED)
        answer = await client.read()
        assert answer.status == 400
        assert answer.headers["connection"] == "close"
        assert await client.stream.answer.read() == b""
    assert not engine.heads


async def test_what_follows_a_body_is_its_own_request(tmp_path: Path) -> None:
    engine = Engine()
    async with guarded(tmp_path, engine) as bench:
        client = bench.connect()
        client.send(request() + request("/metrics", method="GET"))
        assert (await client.read()).status == 200
        assert (await client.read()).status == 403
    assert len(engine.heads) == 1


async def test_a_chunk_extension_does_not_reach_the_engine(tmp_path: Path) -> None:
    engine = Engine()
    data = json.dumps(PROMPT).encode()
    async with guarded(tmp_path, engine) as bench:
        client = bench.connect()
        client.send(START + b"transfer-encoding: chunked\r\n\r\n%x;a=b\r\n%s\r\n0\r\nx: y\r\n\r\n"
                    % (len(data), data))
        assert (await client.read()).status == 200
    assert b"chunked" not in engine.heads[0]
    assert b"x: y" not in engine.heads[0]


@pytest.mark.parametrize("data", [
    b"GET /v1/models HTTP/1.1\r\nx: " + b"a" * 40_000 + b"\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nx: " + b"a" * 40_000,
    b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\n\r\n",
])  # fmt: skip
async def test_an_oversized_head_is_refused(tmp_path: Path, data: bytes) -> None:
    async with guarded(tmp_path) as bench:
        client = bench.connect()
        client.send(data)
        answer = await client.read()
    assert (answer.status, answer.error["code"]) == (431, "head_too_large")


@pytest.mark.parametrize("data", [
    b"GET /v1/models HTTP/1.1\r\n" + b"x: y\r\n" * 200 + b"\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET /v1/models HTTP/1.1\n\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    b"GET /v1/models\r\n\r\n", b"GET  /v1/models HTTP/1.1\r\n\r\n",
])  # fmt: skip
async def test_what_is_no_request_is_refused(tmp_path: Path, data: bytes) -> None:
    async with guarded(tmp_path) as bench:
        client = bench.connect()
        client.send(data)
        assert (await client.read()).status == 400


async def test_a_slow_head_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "HEAD_TIMEOUT_S", 0.2)
    async with guarded(tmp_path) as bench:
        client = bench.connect()
        drip = asyncio.create_task(_drip(client.send, request()))
        answer = await client.read()
        drip.cancel()
    assert (answer.status, answer.error["code"]) == (408, "slow_request")


async def test_a_slow_body_ends_however_steadily_it_drips(tmp_path: Path) -> None:
    engine = Engine()
    async with guarded(tmp_path, engine, request_timeout_s=1) as bench:
        client = bench.connect()
        client.send(START + b"content-length: 100000\r\n\r\n")
        drip = asyncio.create_task(_drip(client.send, b" " * 1000))
        answer = await client.read()
        drip.cancel()
        assert bench.desk.ledger.running == 0
    assert answer.status == 408
    assert not engine.heads


async def test_a_silent_stream_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "KEEP_ALIVE_S", 0.1)
    monkeypatch.setattr(http, "LINGER_S", 0.1)
    async with guarded(tmp_path) as bench:
        client = bench.connect()
        async with asyncio.timeout(5):
            await client.task
        assert await client.stream.answer.read() == b""


async def _drip(send: Any, data: bytes) -> None:
    with contextlib.suppress(asyncio.CancelledError):
        for byte in data:
            send(bytes([byte]))
            await asyncio.sleep(0.02)


async def test_a_body_that_waits_to_be_asked_for(tmp_path: Path) -> None:
    engine = Engine()
    data = json.dumps(PROMPT).encode()
    async with guarded(tmp_path, engine) as bench:
        client = bench.connect()
        client.send(START + b"expect: 100-continue\r\ncontent-length: %d\r\n\r\n" % len(data))
        assert (await client.read()).status == 100
        client.send(data)
        assert (await client.read()).status == 200


async def test_the_log_has_no_content(tmp_path: Path) -> None:
    async with guarded(tmp_path) as bench:
        await bench.ask("/secret-path", chat(messages=[{"role": "user", "content": "prompt"}]))
        await bench.ask(body=chat(secret_member="prompt"))
        await bench.ask(raw=b'{"secret_member": prompt}')
        log = bench.log.getvalue()
    assert "403" in log
    assert "192.0.2.7:40312" in log
    assert "session:5e" in log
    for word in ("secret", "prompt\""):
        assert word not in log
