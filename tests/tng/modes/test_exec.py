"""``tng exec``: what the command sees, and how it and its gateway end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cai.errors import SettingError
from tng.config.entries import parse
from tng.operation.child import proxy_variables

PROXY: dict[str, Any] = {"http_proxy": {"proxy_listen": {"port": 0}}, "no_ra": True}
SHOW = (
    "import json, os, sys;"
    "print(json.dumps({k: v for k, v in os.environ.items() if 'proxy' in k.lower()}))"
)


def command(config: dict[str, Any], *run: str) -> list[str]:
    given = ["--config-content", json.dumps(config)]
    return [sys.executable, "-m", "tng", "exec", *given, *run]


def tng_exec(config: dict[str, Any], *run: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(config, *run), capture_output=True, text=True, timeout=60, check=False, **more
    )


def test_the_command_gets_the_proxy_variables_and_its_own_exit_status() -> None:
    inherited = {**os.environ, "no_proxy": "*", "NO_PROXY": "*", "http_proxy": "http://elsewhere"}
    done = tng_exec(
        {"add_ingress": [PROXY]}, "--", sys.executable, "-c", SHOW + ";sys.exit(7)", env=inherited
    )
    assert done.returncode == 7
    told = json.loads(done.stdout)
    names = {"http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"}
    assert names | {"no_proxy", "NO_PROXY"} == set(told)
    assert len({told[name] for name in names}) == 1
    assert told["http_proxy"].startswith("http://127.0.0.1:")
    # An inherited list would be a way past the gateway.
    assert told["no_proxy"] == told["NO_PROXY"] == ""


def test_options_of_the_command_are_the_commands() -> None:
    done = tng_exec(
        {"add_ingress": [PROXY]}, "--no-proxy", "a.example",
        "--", "sh", "-c", 'echo "$no_proxy|$1|$2"', "sh", "--config-file", "-x",
    )  # fmt: skip
    assert done.stdout == "a.example|--config-file|-x\n"
    assert done.returncode == 0


def test_a_request_of_the_command_goes_through_the_gateway(tmp_path: Path) -> None:
    # Nothing listens there: the answer can only be the gateway's.
    ask = "import urllib.request as u; u.urlopen('http://127.0.0.1:9/x', timeout=10)"
    log = tmp_path / "log"
    done = tng_exec(
        {"add_ingress": [PROXY]}, "--log", str(log), "--", sys.executable, "-c", ask
    )
    assert done.returncode == 1
    assert "502" in done.stderr
    assert "peer-unreachable" in log.read_text()


def test_socks_is_for_all_and_logins_are_not_handed_out() -> None:
    socks: dict[str, Any] = {"socks5": {"proxy_listen": {"port": 0}}, "no_ra": True}
    config = parse({"add_ingress": [PROXY, socks]}, where="t")
    listen = {"ingress[0]": ["127.0.0.1:1"], "ingress[1]": ["[::]:2"]}
    found = proxy_variables(config, listen, "")
    assert found["https_proxy"] == "http://127.0.0.1:1"
    assert found["all_proxy"] == found["ALL_PROXY"] == "socks5h://[::1]:2"
    socks["socks5"]["auth"] = {"username": "u", "password": "p"}
    config = parse({"add_ingress": [socks]}, where="t")
    with pytest.raises(SettingError, match="no ingress is a proxy"):
        proxy_variables(config, {"ingress[0]": ["127.0.0.1:1"]}, "")


@pytest.mark.parametrize(
    ("run", "status"),
    [
        (["/nowhere/command"], 127),
        (["/etc/hostname"], 126),
        (["sh", "-c", "kill -9 $$"], 137),
        (["sh", "-c", "kill -15 $$"], 143),
        (["true"], 0),
    ],
)
def test_how_it_ended_is_told_as_a_shell_does(run: list[str], status: int) -> None:
    assert tng_exec({"add_ingress": [PROXY]}, "--", *run).returncode == status


@pytest.mark.parametrize(
    "config",
    [
        {"add_ingress": [{"mapping": {"in": {"host": "127.0.0.1", "port": 0},
                                      "out": {"host": "a", "port": 1}}, "no_ra": True}]},
        {"add_ingress": [{"hook": {"capture_dst": {"port": 80}}, "no_ra": True}]},
        {"add_egress": [{"mapping": {"in": {"host": "127.0.0.1", "port": 0},
                                     "out": {"host": "127.0.0.1", "port": 1}}, "no_ra": True}]},
        {"add_ingress": []},
    ],
)  # fmt: skip
def test_no_command_is_run_without_a_proxy_for_it(config: dict[str, Any], tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    done = tng_exec(config, "--", "touch", str(mark))
    assert done.returncode == 2
    assert not mark.exists()
    assert "Traceback" not in done.stderr


def test_no_command_is_run_when_the_port_is_taken(tmp_path: Path) -> None:
    import socket

    mark = tmp_path / "ran"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        proxy = {"http_proxy": {"proxy_listen": {"port": taken.getsockname()[1]}}, "no_ra": True}
        done = tng_exec({"add_ingress": [proxy]}, "--", "touch", str(mark))
    assert done.returncode not in (0, 1)
    assert not mark.exists()


def test_no_command_at_all_is_a_usage_error() -> None:
    assert tng_exec({"add_ingress": [PROXY]}).returncode == 2


WAIT = """
import os, signal, sys, time
def stop(number, _frame):
    print("got", number, flush=True)
    sys.exit(42)
signal.signal(int(sys.argv[1]), stop)
print(os.environ["http_proxy"], flush=True)
time.sleep(60)
"""


def port_is_open(url: str) -> bool:
    import socket

    host, _, port = url.removeprefix("http://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=2).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1]
)
def test_signals_go_to_the_command_and_no_gateway_is_left(number: signal.Signals) -> None:
    run = command({"add_ingress": [PROXY]}, "--", sys.executable, "-c", WAIT, str(int(number)))
    with subprocess.Popen(
        run, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert port_is_open(url)
        process.send_signal(number)
        assert process.stdout.readline().strip() == f"got {int(number)}"
        assert process.wait(timeout=30) == 42
    assert not port_is_open(url)


def test_a_killed_gateway_leaves_no_listener() -> None:
    run = command({"add_ingress": [PROXY]}, "--", sys.executable, "-c", WAIT, "15")
    with subprocess.Popen(
        run, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        children = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True,
            check=True,
        ).stdout.split()  # fmt: skip
        process.kill()
        process.wait()
        for _ in range(50):
            if not port_is_open(url):
                break
            time.sleep(0.1)
        assert not port_is_open(url)
        for child in children:
            os.kill(int(child), signal.SIGKILL)
