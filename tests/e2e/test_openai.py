"""Real clients through an attested pair to a real engine: the ``openai`` package and ``curl``.

The engine is vLLM on the processor, run by the interpreter that ``CAI_VLLM_PYTHON`` names; without
it those tests are skipped. ``CAI_IDLE_S`` makes the idle stream longer than its 60 s (``make soak``
waits for 30 minutes).
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bench.gateway import agent_socket, gateway
from tests.models import tiny_llama
from tng.ingress.exchange import RESPONSE_TIMEOUT_S

openai = pytest.importorskip("openai", reason="the openai package is not installed")

PYTHON = os.environ.get("CAI_VLLM_PYTHON", "")
needs_vllm = pytest.mark.skipif(
    not PYTHON, reason="CAI_VLLM_PYTHON names no interpreter that has vLLM"
)
START_S = 240.0
IDLE_S = float(os.environ.get("CAI_IDLE_S", "60"))
STREAMS, TOKENS = 200, 32
SETTLE_S = 20.0
PROMPT = "tell me something long"
SAMPLING = {"temperature": 0, "extra_body": {"ignore_eos": True}}


@dataclass
class Service:
    """An engine behind an attested pair."""

    engine: Path
    proxy: int
    origin: str

    def client(self) -> Any:
        return openai.OpenAI(
            base_url=f"{self.origin}/v1", api_key="none", max_retries=0, timeout=120,
            http_client=openai.DefaultHttpxClient(
                proxy=f"http://127.0.0.1:{self.proxy}", trust_env=False
            ),
        )  # fmt: skip

    def ask_engine(self, path: str) -> str:
        """What the engine answers when it is asked without the pair."""
        connection = http.client.HTTPConnection("localhost", timeout=30)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(str(self.engine))
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read().decode()
        assert response.status == 200, body
        return body

    def metric(self, name: str, **labels: str) -> float:
        total = 0.0
        for line in self.ask_engine("/metrics").splitlines():
            if line.startswith(name) and all(f'{k}="{v}"' in line for k, v in labels.items()):
                total += float(line.rpartition(" ")[2])
        return total


@contextlib.contextmanager
def pair(work: Path, engine: Path) -> Iterator[Service]:
    """A tng egress before the engine's socket, and an ingress, as processes of their own."""
    egress = {
        "add_egress": [
            {
                "mapping": {"in": {"host": "127.0.0.1", "port": 0}, "out": {"unix": str(engine)}},
                "attest": {"aa_addr": f"unix://{work}/channel.sock"},
            }
        ]
    }
    verify = {
        "as_type": "builtin", "policy": str(work / "policy.toml"),
        "collateral": str(work / "anchors" / "collateral"),
        "unsafe_simulated_root": str(work / "anchors"),
    }  # fmt: skip
    mode = {"http_proxy": {"proxy_listen": {"host": "127.0.0.1", "port": 0}}}
    ingress = {"add_ingress": [{**mode, "verify": verify}]}
    with (
        agent_socket(work),
        gateway(egress, "egress[0]") as far,
        gateway(ingress, "ingress[0]") as near,
    ):
        yield Service(engine, near, f"http://127.0.0.1:{far}")


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    work = tmp_path_factory.mktemp("openai")
    model = tiny_llama.write(work / "model")
    address, log = work / "engine.sock", work / "engine.log"
    command = [
        PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--uds", address,
        "--max-model-len", "512", "--enforce-eager", "--served-model-name", "tiny",
        "--max-num-seqs", "256",
    ]  # fmt: skip
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
                   "VLLM_NO_USAGE_STATS": "1"}  # fmt: skip
    with (
        log.open("wb") as out,
        subprocess.Popen(command, env=environment, stdout=out, stderr=out, cwd=work) as server,
    ):
        try:
            with pair(work, address) as service:
                until(lambda: _answers(service), START_S, lambda: log.read_text()[-4000:])
                yield service
        finally:
            server.terminate()
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()


def _answers(service: Service) -> bool:
    with contextlib.suppress(OSError, AssertionError):
        service.ask_engine("/health")
        return True
    return False


def until(done: Callable[[], bool], limit_s: float, why: Callable[[], object] = str) -> None:
    end = time.monotonic() + limit_s
    while not done():
        assert time.monotonic() < end, why()
        time.sleep(0.2)


@needs_vllm
@pytest.mark.timeout(400)
def test_completion_and_streaming(vllm: Service) -> None:
    with vllm.client() as client:
        whole = client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=TOKENS, **SAMPLING
        )
        assert whole.usage.completion_tokens == TOKENS
        pieces = list(
            client.completions.create(
                model="tiny", prompt=PROMPT, max_tokens=TOKENS, stream=True, **SAMPLING
            )
        )
        assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
        # Not held back and sent as one.
        assert len(pieces) > TOKENS // 2
        chat = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hello"}], max_tokens=4, **SAMPLING
        )
        assert chat.choices[0].finish_reason == "length"
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="another", prompt=PROMPT)


@needs_vllm
@pytest.mark.timeout(400)
def test_cancel_in_the_middle_stops_the_engine(vllm: Service) -> None:
    def finished() -> float:
        return vllm.metric("vllm:request_success_total", finished_reason="length")

    most = 480
    before, made = finished(), vllm.metric("vllm:generation_tokens_total")
    with vllm.client() as client:
        stream = client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=most, stream=True, **SAMPLING
        )
        for _ in range(3):
            next(iter(stream))
        until(lambda: vllm.metric("vllm:generation_tokens_total") > made, SETTLE_S)
        assert vllm.metric("vllm:num_requests_running") == 1
        stream.close()
        until(lambda: vllm.metric("vllm:num_requests_running") == 0, SETTLE_S)
    # It ended, and not because all was said.
    assert finished() == before
    assert vllm.metric("vllm:generation_tokens_total") - made < most


@needs_vllm
@pytest.mark.timeout(600)
def test_many_streams_at_once_lose_nothing(vllm: Service) -> None:
    async def one(client: Any, number: int) -> tuple[int, str]:
        ids: list[int] = []
        reason = ""
        stream = await client.completions.create(
            model="tiny", prompt=f"{number}: {PROMPT}", max_tokens=TOKENS, stream=True,
            temperature=0, extra_body={"ignore_eos": True, "return_token_ids": True},
        )  # fmt: skip
        async for piece in stream:
            for choice in piece.choices:
                ids += choice.model_extra.get("token_ids") or []
                reason = choice.finish_reason or reason
        return len(ids), reason

    async def everything() -> list[tuple[int, str]]:
        http = openai.DefaultAsyncHttpxClient(
            proxy=f"http://127.0.0.1:{vllm.proxy}", trust_env=False,
        )  # fmt: skip
        async with openai.AsyncOpenAI(
            base_url=f"{vllm.origin}/v1", api_key="none", max_retries=0, timeout=300,
            http_client=http,
        ) as client:  # fmt: skip
            return await asyncio.gather(*(one(client, number) for number in range(STREAMS)))

    assert asyncio.run(everything()) == [(TOKENS, "length")] * STREAMS


@needs_vllm
@pytest.mark.timeout(400)
@pytest.mark.parametrize("tunnel", [False, True], ids=["plain", "CONNECT"])
def test_curl(vllm: Service, tunnel: bool) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl")
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 8, "stream": True}
    done = subprocess.run(
        ["curl", "-sS", "-N", "-i", "--noproxy", "", "-x", f"http://127.0.0.1:{vllm.proxy}",
         *(["--proxytunnel"] if tunnel else []), "-H", "content-type: application/json",
         "-d", json.dumps(body), f"{vllm.origin}/v1/completions"],
        capture_output=True, text=True, timeout=120, env={"PATH": os.environ["PATH"]},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "200 OK" in done.stdout
    assert "cai-attested: " in done.stdout
    assert done.stdout.rstrip().endswith("data: [DONE]")


def test_no_time_out_below_half_an_hour() -> None:
    assert RESPONSE_TIMEOUT_S >= 30 * 60


@pytest.mark.timeout(IDLE_S + 120)
def test_a_stream_that_is_idle_is_kept(tmp_path: Path) -> None:
    event = {
        "id": "c", "object": "text_completion", "created": 0, "model": "tiny",
        "choices": [{"index": 0, "text": "token", "logprobs": None, "finish_reason": None}],
    }  # fmt: skip
    data = b"data: " + json.dumps(event).encode() + b"\n\n"

    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            asked = b""
            while b"\r\n\r\n" not in asked:
                asked += connection.recv(65536)
            connection.sendall(
                b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
                b"transfer-encoding: chunked\r\n\r\n" + b"%x\r\n%s\r\n" % (len(data), data)
            )
            time.sleep(IDLE_S)
            for piece in (data, b"data: [DONE]\n\n"):
                connection.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
            connection.sendall(b"0\r\n\r\n")
            connection.recv(1)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "engine.sock"))
        listener.listen()
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        with pair(tmp_path, tmp_path / "engine.sock") as service, service.client() as client:
            started = time.monotonic()
            stream = client.completions.create(
                model="tiny", prompt=PROMPT, stream=True, timeout=IDLE_S + 60
            )
            pieces = [(piece.choices[0].text, time.monotonic() - started) for piece in stream]
    assert [text for text, _ in pieces] == ["token", "token"]
    # The first came at once, the second after the pause.
    assert pieces[0][1] < IDLE_S / 2
    assert pieces[1][1] >= IDLE_S - 1
