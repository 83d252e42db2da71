"""``kbs admin``, ``kbs proposal`` and kbs-client's verbs against a served broker."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cai.terminal import run_app
from kbs.cli import app

SECRET = b"planted-admin-secret-91c2"
SERVE = """
import sys
from pathlib import Path
from kbs.server.config import read_config
from kbs.server.service import serve
serve(read_config(Path(sys.argv[1])), lambda ready: print(ready.admin, flush=True))
"""
ROOT = Path(__file__).parents[3]


@dataclass
class Done:
    """What a command did."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Kbs = Callable[..., Done]


class Broker:
    """A served broker whose admin listener is a Unix socket."""

    def __init__(self, directory: Path, anchors: Path) -> None:
        self.directory = directory
        self.socket = directory / "admin.sock"
        self.config = directory / "kbs.toml"
        self.anchors = anchors
        self.process: subprocess.Popen[str] | None = None

    def start(self, more: str = "") -> None:
        self.stop()
        self.config.write_text(
            f'data = "{self.directory / "data"}"\nlisten = "127.0.0.1:0"\n'
            f'[evidence]\nunsafe_simulated_root = "{self.anchors}"\n'
            f'[admin]\nlisten = "unix:{self.socket}"\n{more}'
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(self.config)], stdout=subprocess.PIPE, text=True,
            cwd=self.directory, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.strip() == f"unix:{self.socket}"

    def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            assert self.process.wait(90) == 143
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.process = None


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory, platform_dir: Path) -> Iterator[Broker]:
    served = Broker(tmp_path_factory.mktemp("served"), platform_dir / "anchors")
    served.start()
    yield served
    served.stop()


@pytest.fixture
def kbs(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Kbs]:
    """Run a command in this process, as the first administrator unless told otherwise."""
    monkeypatch.chdir(broker.directory)
    monkeypatch.setenv("KBS_ADMIN_URL", f"unix:{broker.socket}")
    monkeypatch.setenv("KBS_ADMIN_KEY", str(broker.directory / "data" / "admin.key"))
    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments: str | Path) -> Done:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["kbs", *map(str, arguments)])
        status = run_app("kbs", app)
        out, err = capfd.readouterr()
        return Done(status, out, err)

    yield run
    signal.signal(signal.SIGTERM, before)


def person(kbs: Kbs, directory: Path, name: str, *roles: str, add: bool = True) -> Path:
    """Make a key and add its person; returns the key file."""
    key = directory / f"{name}.key"
    done = kbs("admin", "keygen", key)
    assert done.status == 0, done.err
    if add:
        options = [item for role in roles for item in ("--role", role)]
        done = kbs("admin", "add", name, "--public-key", f"{key}.pub", *options)
        assert done.status == 0, done.err
    return key


def test_the_socket_is_for_its_owner_only(broker: Broker) -> None:
    assert stat.S_IMODE(broker.socket.stat().st_mode) == 0o600


def test_people_come_and_go(kbs: Kbs, tmp_path: Path) -> None:
    key = person(kbs, tmp_path, "alice", "policy", "auditor")
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    listed = {item["name"]: item for item in kbs("admin", "list", "--json").json["admins"]}
    assert listed["alice"]["roles"] == ["auditor", "policy"]
    assert "alice" in kbs("admin", "list").out
    me = kbs("admin", "whoami", "--admin-key", key, "--json").json
    assert (me["name"], me["roles"]) == ("alice", ["auditor", "policy"])
    refused = kbs("admin", "list", "--admin-key", person(kbs, tmp_path, "no", add=False))
    assert (refused.status, refused.out) == (7, "")
    (tmp_path / "r").write_bytes(SECRET)
    refused = kbs("resource", "set", "kbs:///a/b/c", tmp_path / "r", "--admin-key", key)
    assert refused.status == 7
    assert "has not the role" in refused.err
    assert kbs("admin", "remove", "alice").status == 0
    assert kbs("admin", "whoami", "--admin-key", key).status == 7
    assert kbs("admin", "remove", "alice").status == 3


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (("admin", "add", "x", "--role", "admin"), 2),
        (("admin", "add", "x", "--public-key", "missing", "--role", "admin"), 3),
        (("admin", "add", "x", "--public-key", "kbs.toml", "--role", "admin"), 3),
        (("admin", "keygen", "kbs.toml"), 4),
        (("admin", "token", "--role", "owner"), 2),
        (("admin", "token", "--minutes", "0"), 2),
        (("admin", "whoami", "--admin-url", "http://192.0.2.1:1"), 2),
        (("admin", "whoami", "--admin-url", "unix:missing"), 8),
        (("admin", "remove", "admin"), 7),
        (("proposal", "list"), 3),
        (("proposal", "show", "../x"), 3),
        (("set-resource-policy", "--allow-all"), 2),
        (("set-resource-policy",), 2),
        (("set-resource-policy", "--deny-all", "--affirming"), 2),
        (("set-resource", "--path", "a/b", "--resource-file", "kbs.toml"), 3),
        (("set-attestation-policy", "--policy-file", "kbs.toml", "--type", "x"), 2),
        (("get-reference-value", "--id", "nothing"), 3),
        (("set-sample-reference-value", "x", "y", "--as-integer"), 3),
        (("set-sample-reference-value", "x", "y", "--as-bool"), 3),
        (("set-sample-reference-value", "x", "1", "--as-bool", "--as-integer"), 2),
    ],
)  # fmt: skip
def test_what_is_refused(kbs: Kbs, arguments: tuple[str, ...], status: int) -> None:
    done = kbs(*arguments)
    assert done.status == status, (done.out, done.err)
    assert done.out == ""
    assert "Traceback" not in done.err


def test_a_token_for_another_program(kbs: Kbs, tmp_path: Path) -> None:
    file = tmp_path / "token"
    done = kbs("admin", "token", "--role", "auditor", "--minutes", "5", "--out", file)
    assert done.status == 0, done.err
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.read_text().strip() not in done.out
    me = kbs("--admin-token", file, "admin", "whoami", "--json").json
    assert (me["name"], me["roles"]) == ("admin", ["auditor"])
    assert kbs("--admin-token", file, "admin", "remove", "x").status == 7
    assert kbs("admin", "token").out.count(".") == 2
    (tmp_path / "bent").write_text("é\n")
    assert kbs("--admin-token", tmp_path / "bent", "admin", "whoami").status == 3


def test_what_kbs_client_spells(kbs: Kbs, tmp_path: Path) -> None:
    (tmp_path / "r").write_bytes(SECRET)
    path = ("--path", "models/minilm/key")
    assert kbs("set-resource", *path, "--resource-file", tmp_path / "r").status == 0
    for option in ("--deny-all", "--default", "--affirming", "--unsafe-allow-all"):
        done = kbs("set-resource-policy", option)
        assert done.status == 0, done.err
        assert ("unsafe_allow_all" in done.err) is (option == "--unsafe-allow-all")
    (tmp_path / "deny.rego").write_text("package policy\n\ndefault allow := false\n")
    assert kbs("set-resource-policy", "--policy-file", tmp_path / "deny.rego").status == 0
    (tmp_path / "cpu.rego").write_text(
        "package policy\n\nimport rego.v1\n\ndefault executables := 3\n\n"
        'trust_claims := {"executables": executables}\n'
    )
    done = kbs("set-attestation-policy", "--policy-file", tmp_path / "cpu.rego")
    assert done.status == 0, done.err
    for name, text, options, value in (
        ("a", "x", (), ["x"]), ("b", "-7", ("--as-integer",), [-7]),
        ("c", "true", ("--as-bool", "--as-single-value"), True),
    ):
        done = kbs("set-sample-reference-value", *options, "--", name, text)
        assert done.status == 0, done.err
        shown = kbs("get-reference-value", "--id", name, "--json").json
        assert shown == {"id": name, "value": value}
        assert json.loads(kbs("get-reference-value", "--id", name).out) == value
    assert kbs("delete-resource", *path).status == 0
    assert kbs("delete-resource", *path).status == 3


def test_two_persons_from_proposal_to_change(broker: Broker, kbs: Kbs, tmp_path: Path) -> None:
    alice = person(kbs, tmp_path, "carol", "resource")
    bob = person(kbs, tmp_path, "dave", "resource")
    broker.start("[admin.two_person]\nrequired = 2\n")
    try:
        (tmp_path / "r").write_bytes(SECRET)
        (tmp_path / "other").write_bytes(b"another secret")
        asked = kbs(
            "resource", "set", "kbs:///two/a/b", tmp_path / "r", "--admin-key", alice, "--json"
        )
        assert asked.status == 20, asked.err
        assert asked.json["error"]["code"] == "proposed"
        waiting = kbs("proposal", "list", "--admin-key", bob, "--json").json["proposals"]
        assert [item["signed_by"] for item in waiting] == [["carol"]]
        number = waiting[0]["id"]
        assert number in kbs("proposal", "list").out
        shown = kbs("proposal", "show", number)
        assert "resource.set" in shown.out
        assert "carol" in shown.out
        contents = ("--contents", tmp_path / "r")
        wrong = kbs("proposal", "approve", number, "--contents", tmp_path / "other")
        assert wrong.status == 3
        assert kbs("proposal", "show", number, *contents).status == 0
        again = kbs("proposal", "approve", number, "--admin-key", alice)
        assert again.status == 0
        assert "waits for 1 more" in again.out
        done = kbs("proposal", "approve", number, *contents, "--admin-key", bob)
        assert done.status == 0, done.err
        assert "is done" in done.out
        told = shown.out + done.out + done.err + asked.out + asked.err
        assert SECRET.decode() not in told
        asked = kbs("resource", "set", "kbs:///two/a/b", tmp_path / "other", "--admin-key", alice)
        assert asked.status == 20
        number = kbs("proposal", "list", "--json").json["proposals"][0]["id"]
        assert kbs("proposal", "reject", number, "--admin-key", bob).status == 0
        assert kbs("proposal", "list", "--json").json == {"proposals": []}
        leaves = kbs("audit", "show", "--json").json["rows"]
        leaf = [row for row in leaves if row["action"] == "resource.set"][-1]
        assert leaf["actor"]["name"] == "carol"
        assert leaf["actor"]["approved_by"] == "carol dave"
    finally:
        broker.start()


def test_completion_knows_the_roles() -> None:
    from kbs.admin.changes import Role
    from kbs.cli.admin import ROLES

    assert set(ROLES) == set(Role)
