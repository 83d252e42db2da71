"""Several worker processes: one gateway to the outside, in life and in death."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cai.errors import ListenerFailed, SettingError
from tng.config.entries import parse
from tng.operation.gathered import gather, merge_expositions
from tng.operation.journal import Journal, LogFormat
from tng.operation.places import Places
from tng.operation.workers import Workers

LOCAL = {"host": "127.0.0.1", "port": 0}


class Engine(BaseHTTPRequestHandler):
    """A backend that takes its time where it is asked to."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/slow":
            time.sleep(2)
        self.send_response(200)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *_args: object) -> None:
        pass


@pytest.fixture(scope="module")
def engine() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Engine) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


class Running:
    """A gateway of several workers."""

    def __init__(self, process: subprocess.Popen[str], ready: dict[str, Any]) -> None:
        self.process = process
        self.ready = ready

    def port(self, name: str) -> int:
        return int(self.ready["listen"][name][0].rpartition(":")[2])

    def workers(self) -> list[int]:
        told = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(self.process.pid)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        return [int(pid) for pid in told.stdout.split()]

    def control(self, path: str) -> tuple[int, bytes]:
        return fetch(self.port("control_interface"), path)


@contextlib.contextmanager
def gateway(config: dict[str, Any], *options: str) -> Iterator[Running]:
    config = {"control_interface": {"restful": LOCAL}, **config}
    process = subprocess.Popen(
        [sys.executable, "-m", "tng", "launch", "--json", *options,
         "--config-content", json.dumps(config)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        text = ""
        while not text.rstrip().endswith("}"):
            line = process.stdout.readline()
            assert line, process.communicate()[1]
            text += line
            with contextlib.suppress(ValueError):
                json.loads(text)
                break
        yield Running(process, json.loads(text))
    finally:
        process.kill()
        process.communicate()


def egress(engine: int) -> dict[str, Any]:
    mode = {"in": LOCAL, "out": {"host": "127.0.0.1", "port": engine}}
    return {"add_egress": [{"mapping": mode, "no_ra": True}]}


def ingress(port: int) -> dict[str, Any]:
    mode = {"in": LOCAL, "out": {"host": "127.0.0.1", "port": port}}
    return {"add_ingress": [{"mapping": mode, "no_ra": True}]}


def fetch(port: int, path: str = "/") -> tuple[int, bytes]:
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        link.request("GET", path)
        answer = link.getresponse()
        return answer.status, answer.read()
    finally:
        link.close()


def gone(pids: list[int], wait_s: float = 15) -> bool:
    end = time.monotonic() + wait_s
    while time.monotonic() < end:
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.1)
    return False


def test_a_pair_of_two_workers_each_is_one_gateway(engine: int) -> None:
    with gateway(egress(engine), "--workers", "2") as outside:
        inside_config = {**ingress(outside.port("egress[0]")), "workers": 2}
        with gateway(inside_config) as inside:
            assert inside.ready["workers"] == outside.ready["workers"] == 2
            assert len(outside.workers()) == 2
            port = inside.port("ingress[0]")
            assert [fetch(port) for _ in range(40)] == [(200, b"ok")] * 40
            assert inside.control("/readyz")[0] == inside.control("/livez")[0] == 200
            status = json.loads(inside.control("/status")[1])
            assert len(status["workers"]) == 2
            text = inside.control("/metrics")[1].decode()
            counted = [
                line for line in text.splitlines()
                if line.startswith("tng_connections_total") and 'ingress[0]' in line
            ]  # fmt: skip
            assert [line.rpartition(" ")[2] for line in counted] == ["40"]
            assert inside.control("/none")[0] == 404
            process, pids = inside.process, inside.workers()
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=30) == 143
            assert gone(pids)


def test_a_dead_worker_is_replaced_and_nobody_is_refused_meanwhile(engine: int) -> None:
    with (
        gateway(egress(engine), "--workers", "2") as outside,
        gateway(ingress(outside.port("egress[0]"))) as inside,
    ):
        before = outside.workers()
        os.kill(before[0], signal.SIGKILL)
        assert gone(before[:1])
        port = inside.port("ingress[0]")
        assert [fetch(port)[0] for _ in range(10)] == [200] * 10
        end = time.monotonic() + 15
        while len(outside.workers()) < 2 or outside.control("/readyz")[0] != 200:
            assert time.monotonic() < end
            time.sleep(0.2)
        assert before[0] not in outside.workers()
        assert before[1] in outside.workers()


def test_workers_do_not_go_to_the_keepers_control_interface() -> None:
    proxy = {"http_proxy": {"proxy_listen": LOCAL}, "no_ra": True}
    with gateway({"add_ingress": [proxy]}, "--workers", "2") as inside:
        link = http.client.HTTPConnection("127.0.0.1", inside.port("ingress[0]"), timeout=20)
        link.request("GET", f"http://127.0.0.1:{inside.port('control_interface')}/status")
        answer = link.getresponse()
        assert answer.status == 403
        assert b"this gateway itself" in answer.read()


def test_sigterm_lets_running_requests_end(engine: int) -> None:
    with (
        gateway(egress(engine), "--workers", "2") as outside,
        gateway(ingress(outside.port("egress[0]"))) as inside,
    ):
        answers: list[tuple[int, bytes]] = []
        port = inside.port("ingress[0]")
        asked = threading.Thread(target=lambda: answers.append(fetch(port, "/slow")))
        asked.start()
        time.sleep(0.7)
        pids = outside.workers()
        outside.process.send_signal(signal.SIGTERM)
        asked.join(20)
        assert answers == [(200, b"ok")]
        assert outside.process.wait(timeout=30) == 143
        assert gone(pids)


def test_no_worker_outlives_a_killed_keeper(engine: int) -> None:
    with gateway(egress(engine), "--workers", "3") as outside:
        pids = outside.workers()
        assert len(pids) == 3
        outside.process.kill()
        outside.process.wait()
        assert gone(pids)


@pytest.mark.parametrize("shared", [False, True])
def test_a_port_of_somebody_else_is_not_shared(engine: int, *, shared: bool) -> None:
    with socket.socket() as other:
        if shared:
            # Two gateways by mistake: the kernel would let the second one in.
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        config = egress(engine)
        config["add_egress"][0]["mapping"]["in"] = {
            "host": "127.0.0.1", "port": other.getsockname()[1],
        }  # fmt: skip
        with pytest.raises(ListenerFailed, match="cannot listen"):
            Places().take(parse(config, where="t"))


def test_a_worker_that_cannot_start_is_the_gateways_failure(tmp_path: Path) -> None:
    config = ingress(9)
    config["add_ingress"][0] |= {"no_ra": False, "verify": {
        "as_type": "builtin", "policy": str(tmp_path / "none"), "collateral": str(tmp_path),
    }}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "tng", "launch", "--workers", "2",
         "--config-content", json.dumps(config)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode not in (0, 1)
    assert "none" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("count", [0, -1, 65, "2", True, None, 1.5])
def test_what_is_no_number_of_workers(engine: int, count: object) -> None:
    if count is None:
        assert parse({**egress(engine), "workers": None}, where="t").workers == 1
        return
    with pytest.raises(SettingError):
        parse({**egress(engine), "workers": count}, where="t")


def test_each_worker_would_make_an_ohttp_key_of_its_own(engine: int, tmp_path: Path) -> None:
    config = egress(engine)
    config["add_egress"][0]["ohttp"] = {}
    with pytest.raises(SettingError, match="OHTTP key"):
        Workers(parse(config, where="t"), 2, LogFormat.TEXT, Journal())
    config["add_egress"][0]["ohttp"] = {"key": {"source": "file", "path": str(tmp_path / "k")}}
    Workers(parse(config, where="t"), 2, LogFormat.TEXT, Journal())


ONE = """# HELP tng_a_total x
# TYPE tng_a_total counter
tng_a_total{entry="e 1"} 3
# TYPE tng_evidence_age_seconds gauge
tng_evidence_age_seconds 9
# TYPE tng_ready gauge
tng_ready 1
# TYPE tng_t_seconds histogram
tng_t_seconds_bucket{le="+Inf"} 2
tng_t_seconds_sum 0.5
"""
OTHER = """# HELP tng_a_total x
# TYPE tng_a_total counter
tng_a_total{entry="e 1"} 4
tng_a_total{entry="e 2"} 1
# TYPE tng_evidence_age_seconds gauge
tng_evidence_age_seconds 5
# TYPE tng_ready gauge
tng_ready 0
# TYPE tng_t_seconds histogram
tng_t_seconds_bucket{le="+Inf"} 1
tng_t_seconds_sum 0.25
"""


def test_metrics_of_several_workers_are_one_exposition() -> None:
    merged = merge_expositions([ONE, OTHER]).splitlines()
    assert 'tng_a_total{entry="e 1"} 7' in merged
    assert merged.index('tng_a_total{entry="e 2"} 1') < merged.index(
        "# TYPE tng_evidence_age_seconds gauge"
    )
    assert "tng_evidence_age_seconds 9" in merged
    assert "tng_ready 0" in merged
    assert 'tng_t_seconds_bucket{le="+Inf"} 3' in merged
    assert "tng_t_seconds_sum 0.75" in merged
    assert len([line for line in merged if line.startswith("#")]) == 5


def test_one_worker_that_is_not_ready_is_a_gateway_that_is_not() -> None:
    good = b"HTTP/1.1 200 OK\r\n\r\nok\n"
    bad = b"HTTP/1.1 503 Service Unavailable\r\n\r\nnot ok\n"
    assert gather(b"/readyz", [good, bad]) == bad
    assert gather(b"/readyz", [good, b""]).startswith(b"HTTP/1.1 503")
    assert gather(b"/readyz", [b"", b""]).startswith(b"HTTP/1.1 503")
    assert gather(b"/livez", [good, b""]) == good
    assert gather(b"/readyz", [good, good]) == good
