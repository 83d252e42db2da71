"""``kbs resource`` and ``kbs key`` against a broker that runs as a program."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kbs.keys.pkcs11_provider import TokenKey
from kbs.keys.secret_input import SecretInput
from tests.kbs.keys.conftest import Token
from tests.kbs.program import Program, run_kbs

SECRET = "planted-command-secret-77aa"
URI = "kbs:///models/minilm/key"


class Kbs:
    """The program, a directory, and commands in it."""

    def __init__(self, cwd: Path, anchors: Path) -> None:
        self.cwd = cwd
        self.anchors = anchors
        self.program: Program | None = None
        (cwd / "secret").write_text(SECRET)

    def serve(self, keys: str = "") -> None:
        self.stop()
        (self.cwd / "kbs.toml").write_text(keys)
        self.program = Program(
            self.cwd, "--config", "kbs.toml", "--unsafe-simulated-root", self.anchors
        )

    def stop(self) -> None:
        if self.program is not None:
            self.program.stop()
            self.program.close()
            self.program = None

    def run(self, *arguments: str, status: int = 0) -> str:
        assert self.program is not None
        done = run_kbs(
            *arguments, "--admin-url", self.program.ready["admin"], cwd=self.cwd
        )
        assert done.returncode == status, done.stdout + done.stderr
        assert SECRET not in done.stdout + done.stderr
        return done.stdout + done.stderr

    def json(self, *arguments: str) -> Any:
        return json.loads(self.run(*arguments, "--json"))


@pytest.fixture
def kbs(tmp_path: Path, platform_dir: Path) -> Iterator[Kbs]:
    made = Kbs(tmp_path, platform_dir / "anchors")
    yield made
    made.stop()


def test_a_resource_from_first_to_last(kbs: Kbs) -> None:
    kbs.serve()
    assert "now version 1" in kbs.run("resource", "set", URI, "secret")
    assert kbs.json("resource", "set", URI, "secret")["version"] == 2
    assert kbs.json("resource", "new", "kbs:///models/new/key", "--hex")["version"] == 1
    assert "exists" in kbs.run("resource", "new", "models/new/key", status=7)
    listed = kbs.run("resource", "list")
    assert URI in listed
    assert "kbs:///models/new/key" in listed
    assert kbs.json("resource", "list", "models/new")["resources"][0]["size"] == 64
    assert "version 2" in kbs.run("resource", "get-info", URI)
    assert "living" in kbs.run("resource", "versions", URI)
    assert "now version 3" in kbs.run("resource", "lease", URI, "required")
    assert "can be restored" in kbs.run("resource", "delete", URI)
    assert URI not in kbs.run("resource", "list")
    assert "deleted" in kbs.run("resource", "list", "--deleted")
    assert kbs.json("resource", "restore", URI)["version"] == 5
    assert kbs.json("resource", "restore", URI, "--version", "1")["version"] == 6
    assert kbs.json("resource", "purge", URI, "--upto", "2")["upto"] == 2
    assert kbs.json("resource", "purge")["purged"] == 0
    kbs.run("resource", "get-info", "kbs:///none/at/all", status=3)
    kbs.run("resource", "set", URI, "no-such-file", status=3)
    kbs.run("resource", "purge", "--upto", "3", status=2)
    kbs.run("resource", "lease", URI, "never", status=3)


def test_rotation_to_a_new_file_and_to_a_token(kbs: Kbs, token: Token) -> None:
    kbs.serve()
    kbs.run("resource", "set", URI, "secret")
    made = run_kbs("key", "make-file", "new/kek", cwd=kbs.cwd)
    assert made.returncode == 0, made.stderr
    assert (kbs.cwd / "new" / "kek").stat().st_mode & 0o777 == 0o400
    assert run_kbs("key", "make-file", "new/kek", cwd=kbs.cwd).returncode == 4
    two = '[keys]\nprovider = "new"\n[keys.providers.new]\nkind = "file"\npath = "new/kek"\n'
    kbs.serve(two)
    status = kbs.json("key", "status")
    assert {item["name"]: item["in_force"] for item in status["providers"]} == {
        "file": True, "new": False,
    }
    assert "no longer by file:" in kbs.run("key", "rotate")
    (kbs.cwd / "kbs-data-kek" / "kek").unlink()
    made = run_kbs(
        "key", "make-pkcs11", "--module", token.module, "--token", token.label, "--key", "kek",
        "--pin-file", token.pin, cwd=kbs.cwd,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    where = TokenKey(token.module, token.label, "kek", SecretInput("PIN", token.pin))
    kbs.serve(
        two.replace('"new"\n[', '"hsm"\n[')
        + f'[keys.providers.hsm]\nkind = "pkcs11"\nmodule = "{where.module}"\n'
        f'token = "{where.token}"\nkey = "kek"\npin_file = "{token.pin}"\n'
    )
    answer = kbs.json("key", "rotate", "--to", "hsm")
    assert answer["to"] == f"pkcs11:{token.label}/kek"
    assert "in force" in kbs.run("key", "status")
    assert kbs.json("resource", "get-info", URI)["versions"][0]["provider"] == answer["to"]
    kbs.run("key", "rotate", "--to", "nothing", status=3)
    kbs.run("key", "rotate", "--to", "hsm", "--signing", "token", status=2)
    assert kbs.json("key", "rotate", "--signing", "ticket")["version"] == 2
    kbs.run("key", "rotate", "--signing", "nothing", status=3)


def test_without_its_provider_the_broker_does_not_start(kbs: Kbs) -> None:
    kbs.serve()
    kbs.stop()
    kek = kbs.cwd / "kbs-data-kek" / "kek"
    kek.chmod(0o600)
    kek.write_text("ab" * 32)
    done = run_kbs(
        "serve", "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0",
        "--unsafe-simulated-root", kbs.anchors, cwd=kbs.cwd,
    )  # fmt: skip
    assert done.returncode == 5
    assert "under key provider file:" in done.stderr
