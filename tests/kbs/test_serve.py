"""The program itself: starts, says where it listens, is administered, ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cai.errors import ListenerFailed, UsageError
from kbs.server.listeners import bind, is_loopback, parse_address
from tests.kbs.world import SECRET_TEXT, URI, Visitor


def kbs(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from kbs.cli import main; main()", *map(str, arguments)],
        cwd=cwd, capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]),
             "http_proxy": "http://127.0.0.1:9"},
    )  # fmt: skip


class Running:
    """A served broker."""

    def __init__(self, cwd: Path, *arguments: str | Path) -> None:
        command = [sys.executable, "-c", "from kbs.cli import main; main()", "serve", "--json"]
        command += ["--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"]
        self.errors = (cwd / "errors.txt").open("w+")
        self.process = subprocess.Popen(
            [*command, *map(str, arguments)], cwd=cwd, stdout=subprocess.PIPE, stderr=self.errors,
            text=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )  # fmt: skip
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.said()
        self.ready: dict[str, Any] = json.loads(line)

    def said(self) -> str:
        self.errors.seek(0)
        return self.errors.read()

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)


@pytest.fixture
def running(tmp_path: Path, platform_dir: Path) -> Iterator[Running]:
    program = Running(tmp_path, "--unsafe-simulated-root", platform_dir / "anchors")
    yield program
    if program.process.poll() is None:
        program.process.kill()
        program.process.wait(30)
    program.errors.close()


def test_the_whole_way_over_sockets(running: Running, visitor: Visitor, tmp_path: Path) -> None:
    admin = ("--admin-url", running.ready["admin"])
    (tmp_path / "key").write_bytes(SECRET_TEXT)
    done = kbs("resource", "set", f"kbs:///{URI}", "key", *admin, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    template = kbs("policy", "template", cwd=tmp_path)
    (tmp_path / "release.rego").write_text(template.stdout)
    assert kbs("policy", "set", "release.rego", *admin, cwd=tmp_path).returncode == 0
    with httpx.Client(base_url=running.ready["listening"], trust_env=False) as client:
        nonce = client.post(
            "/kbs/v0/auth", json={"version": "0.4.0", "tee": "tdx", "extra-params": {}}
        ).json()["nonce"]
        assert client.post("/kbs/v0/attest", content=visitor.body(nonce)).status_code == 200
        denied = client.get(f"/kbs/v0/resource/{URI}")
        assert denied.status_code == 403
        from cai.attest.policy import policy_for

        (tmp_path / "policy.toml").write_bytes(policy_for(visitor.facts()))
        done = kbs("policy", "set-verification", "policy.toml", *admin, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert visitor.open(client.get(f"/kbs/v0/resource/{URI}")) == SECRET_TEXT
        health = client.get("/healthz").json()
    assert health["unsafe"] == ["unsafe_simulated_root"]
    shown = json.loads(kbs("policy", "show", "--json", *admin, cwd=tmp_path).stdout)
    assert shown["verification-policy"]["text"] == (tmp_path / "policy.toml").read_text()
    audit = kbs("audit", "show", "--json", *admin, cwd=tmp_path)
    decisions = [
        (row["action"], row["decision"]) for row in json.loads(audit.stdout)["rows"]
    ]
    assert ("release", "deny") in decisions
    assert decisions[-1] == ("release", "allow")
    people = kbs("audit", "show", *admin, cwd=tmp_path)
    assert "SIMULATED" in people.stdout
    assert running.stop() == 143
    said = running.said() + audit.stdout + people.stdout
    assert SECRET_TEXT.decode() not in said
    assert "SIMULATED" in running.said()


def test_interrupt_ends_with_130(running: Running) -> None:
    assert running.stop(signal.SIGINT) == 130


def test_a_port_in_use_ends_with_8(running: Running, tmp_path: Path) -> None:
    taken = running.ready["listening"].removeprefix("http://")
    done = kbs("serve", "--data", "other", "--listen", taken, "--admin-listen", "127.0.0.1:0",
               cwd=tmp_path)  # fmt: skip
    assert done.returncode == 8
    assert "cannot listen" in done.stderr
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["serve", "--listen", "nowhere"], 2),
        (["serve", "--listen", "127.0.0.1:99999"], 2),
        (["serve", "--admin-listen", "0.0.0.0:0"], 2),
        (["serve", "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0",
          "--kek", "kbs-data/kek"], 2),
        (["serve", "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0",
          "--unsafe-simulated-root", "missing"], 3),
        (["resource", "set", "kbs:///a/b", "x"], 3),
        (["resource", "set", "kbs:///a/b/c", "missing"], 3),
        (["audit", "show", "--admin-key", "missing"], 3),
        (["policy", "set", "missing"], 3),
        (["nothing"], 2),
    ],
)  # fmt: skip
def test_bad_use_is_one_line_and_a_status(
    tmp_path: Path, arguments: list[str], status: int
) -> None:
    done = kbs(*arguments, cwd=tmp_path)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("kbs: ")


def test_administration_names_its_trouble(running: Running, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    stranger = Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )  # fmt: skip
    (tmp_path / "stranger.key").write_bytes(stranger)
    (tmp_path / "rubbish.key").write_bytes(b"rubbish")
    url = ("--admin-url", running.ready["admin"])
    wrong = kbs("audit", "show", *url, "--admin-key", "stranger.key", cwd=tmp_path)
    assert (wrong.returncode, "not of this broker" in wrong.stderr) == (7, True)
    assert kbs("audit", "show", *url, "--admin-key", "rubbish.key", cwd=tmp_path).returncode == 3
    running.stop()
    gone = kbs("audit", "show", *url, cwd=tmp_path)
    assert (gone.returncode, "kbs serve" in gone.stderr) == (8, True)
    remote = kbs("audit", "show", "--admin-url", "http://192.0.2.1:8081", cwd=tmp_path)
    assert remote.returncode == 2
    assert "Traceback" not in wrong.stderr + gone.stderr + remote.stderr


@pytest.mark.parametrize("text", ["", "x", ":1", "h:", "h:x", "h:-1", "h:65536", "h:1.5", "[::1]"])
def test_addresses_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_address(text, "--listen")


def test_addresses() -> None:
    assert parse_address("127.0.0.1:0", "--listen") == ("127.0.0.1", 0)
    assert parse_address("[::1]:8080", "--listen") == ("::1", 8080)
    for host in ("localhost", "127.0.0.1", "127.8.8.8", "::1"):
        assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.test", ""])
def test_the_admin_listener_stays_on_loopback(host: str) -> None:
    assert not is_loopback(host)


def test_binding_a_taken_port_fails() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ListenerFailed):
            bind("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(ListenerFailed):
        bind("192.0.2.1", 0)
