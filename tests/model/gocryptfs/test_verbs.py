"""Method gocryptfs by the commands: encrypt, check, inspect, decrypt, and what they warn of."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cai.cli.owner_keys import private_pem
from cai.model import ReleaseRecord, check
from cai.model.gocryptfs.keys import read_password_file
from tests.model.gocryptfs.trees import ROOT, write_tree

Cai = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def cai(tmp_path: Path) -> Cai:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "cai", *arguments], cwd=tmp_path, capture_output=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True, timeout=60,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done

    (tmp_path / "model").mkdir()
    write_tree(tmp_path / "model")
    (tmp_path / "pw").write_text("correct horse\n")
    (tmp_path / "other").write_text("wrong horse\n")
    return run


def value(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    parsed: dict[str, Any] = json.loads(done.stdout)
    return parsed


def seal(cai: Cai, *options: str) -> dict[str, Any]:
    return value(cai("encrypt", "model", "--method", "gocryptfs", "-o", "OUT", "--json", *options))


@pytest.mark.parametrize("how", ["new key", "key file", "password file"])
def test_there_and_back(how: str, cai: Cai, tmp_path: Path) -> None:
    if how == "password file":
        sealed, key = seal(cai, "--password-file", "pw"), "pw"
        assert not (tmp_path / "model.key").exists()
    else:
        sealed, key = seal(cai, "--key-out", "KEY"), "KEY"
        if how == "key file":
            (tmp_path / "OUT").rename(tmp_path / "first")
            sealed = seal(cai, "--key-file", "KEY")
    conf = json.loads((tmp_path / "OUT" / "data" / "gocryptfs.conf").read_text())
    assert conf["ScryptObject"]["N"] == (1 << 16 if key == "pw" else 1 << 10)
    root = sealed["root"]
    checked = value(cai("check", "OUT", "--key-file", key, "--expect-root", root, "--json"))
    assert checked["content_root"] == sealed["content_root"]
    assert cai("decrypt", "OUT", "BACK", "--key-file", key).returncode == 0
    diff = ["diff", "-r", "--no-dereference", "model", "BACK"]
    assert subprocess.run(diff, cwd=tmp_path).returncode == 0
    shown = value(cai("inspect", "OUT", "--key-file", key, "--json"))
    assert shown["method"] == "gocryptfs"
    assert any("path_b64" in entry for entry in shown["entries"])
    assert value(cai("inspect", "OUT", "--json"))["authenticated"] is False
    assert "config.json" in cai("inspect", "OUT", "--key-file", key).stdout
    assert cai("check", "OUT", "--key-file", "other").returncode == 5


def test_a_bare_directory_is_opened_with_a_warning(cai: Cai, tmp_path: Path) -> None:
    seal(cai, "--password-file", "pw")
    for verb in (["check", "OUT/data"], ["decrypt", "OUT/data", "BACK"], ["inspect", "OUT/data"]):
        done = cai(*verb, "--key-file", "pw")
        assert done.returncode == 0, done.stderr
        assert "without a manifest" in done.stderr
        assert "zeroed blocks" in done.stderr
    assert value(cai("inspect", "OUT/data", "--json"))["manifest"] == "none"
    assert cai("inspect", "OUT/data", "--licence").returncode == 2
    demand = ["--expect-root", "00" * 32]
    for verb in (["check", "OUT/data"], ["decrypt", "OUT/data", "B2"]):
        done = cai(*verb, "--key-file", "pw", "--json", *demand)
        assert done.returncode == 6
        assert json.loads(done.stdout)["error"]["code"] == "root-mismatch"
    assert not (tmp_path / "B2").exists()


def test_damage_is_named_and_nothing_is_written(cai: Cai, tmp_path: Path) -> None:
    seal(cai, "--password-file", "pw")
    victim = max(
        (p for p in (tmp_path / "OUT" / "data").rglob("*") if not p.is_symlink() and p.is_file()),
        key=lambda path: path.stat().st_size,
    )
    data = bytearray(victim.read_bytes())
    data[18 : 18 + 4128] = bytes(4128)
    victim.write_bytes(data)
    for verb in (["check", "OUT"], ["decrypt", "OUT", "BACK"]):
        done = cai(*verb, "--key-file", "pw")
        assert done.returncode == 6
        assert victim.name in done.stderr
    assert not (tmp_path / "BACK").exists()
    # The same damage to a bare directory is what the warning speaks of.
    assert cai("check", "OUT/data", "--key-file", "pw").returncode == 0


class Desk(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received[self.path] = body  # type: ignore[attr-defined]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_args: object) -> None:
        return


def test_the_password_and_the_record_are_two_resources(cai: Cai, tmp_path: Path) -> None:
    (tmp_path / "admin").write_bytes(private_pem(Ed25519PrivateKey.generate()).reveal())
    with HTTPServer(("127.0.0.1", 0), Desk) as broker:
        broker.received = {}  # type: ignore[attr-defined]
        thread = threading.Thread(target=broker.serve_forever)
        thread.start()
        try:
            sealed = seal(
                cai, "--kbs", f"http://127.0.0.1:{broker.server_port}", "--key-id",
                "kbs:///r/t/tag", "--admin-key", "admin", "--owner-key", "owner",
                "--record-out", "record", "--password-file", "pw",
            )
        finally:
            broker.shutdown()
            thread.join()
        received = broker.received  # type: ignore[attr-defined]
    assert received["/kbs/v0/resource/r/t/tag"] == b"correct horse"
    record = received["/kbs/v0/resource/r/t/tag.cai"]
    assert record == (tmp_path / "record").read_bytes()
    parsed = ReleaseRecord.parse(record, owner_key=sealed["owner_key"], with_kek=False)
    assert parsed.manifest_root == sealed["root"]
    assert b"correct horse" not in record
    report = check(
        tmp_path / "OUT", read_password_file(tmp_path / "pw"), owner_key=sealed["owner_key"],
        index_sha256=parsed.index_sha256, min_revision=parsed.min_revision,
    )
    assert report.signature == "verified"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--method", "gocryptfs", "--pad"], "--pad"),
        (["--method", "gocryptfs", "--against", "x"], "--against"),
        (["--method", "gocryptfs", "--password-file", "pw", "--key-out", "k"], "--password-file"),
        (["--method", "gocryptfs", "--password-file", "pw", "--key-file", "k"], "--password-file"),
        (["--password-file", "pw"], "--method gocryptfs"),
    ],
)
def test_options_that_do_not_go_together(options: list[str], match: str, cai: Cai) -> None:
    done = cai("encrypt", "model", "-o", "OUT", *options)
    assert done.returncode == 2
    assert match in done.stderr


def test_passwords_are_not_told(cai: Cai, tmp_path: Path) -> None:
    done = cai("encrypt", "model", "--method", "gocryptfs", "--password-file", "pw", "-o", "OUT")
    shown = cai("inspect", "OUT", "--key-file", "pw", "--json")
    for text in (done.stdout, done.stderr, shown.stdout):
        assert "correct horse" not in text
    for path in (tmp_path / "OUT").rglob("*"):
        if path.is_file() and not path.is_symlink():
            assert b"correct horse" not in path.read_bytes()


def test_rotating_gives_a_new_password(cai: Cai, tmp_path: Path) -> None:
    sealed = seal(cai, "--key-out", "KEY", "--owner-key", "owner.pem")
    rotated = value(cai("rotate", "OUT", "--key-file", "KEY", "--new-key-out", "NEW",
                        "--owner-key", "owner.pem", "--record-out", "record", "--json"))
    assert rotated["root"] == sealed["root"]
    assert rotated["index_sha256"] != sealed["index_sha256"]
    record = ReleaseRecord.parse(
        (tmp_path / "record").read_bytes(), owner_key=sealed["owner_key"], with_kek=False
    )
    assert record.index_sha256 == rotated["index_sha256"]
    assert cai("check", "OUT", "--key-file", "KEY").returncode == 5
    checked = cai("check", "OUT", "--key-file", "NEW", "--index-sha256", rotated["index_sha256"])
    assert checked.returncode == 0, checked.stderr
    assert not (tmp_path / "NEW.partial").exists()
    done = cai("rotate", "OUT", "--key-file", "NEW", "--new-password-file", "pw")
    assert done.returncode == 0, done.stderr
    assert "password" in done.stdout
    assert cai("check", "OUT", "--key-file", "pw").returncode == 0


def test_a_rotation_that_fails_leaves_no_key(cai: Cai, tmp_path: Path) -> None:
    seal(cai, "--password-file", "pw")
    done = cai("rotate", "OUT", "--key-file", "other", "--new-key-out", "NEW")
    assert done.returncode == 5
    assert not (tmp_path / "NEW").exists()
    assert not (tmp_path / "NEW.partial").exists()
    assert cai("check", "OUT", "--key-file", "pw").returncode == 0


def test_resealing_and_sealing_against_an_older_revision(cai: Cai, tmp_path: Path) -> None:
    seal(cai, "--key-out", "KEY")
    resealed = value(cai("reseal", "OUT", "--key-file", "KEY", "-o", "OUT2", "--json"))
    assert resealed["revision"] == 2
    assert cai("check", "OUT2", "--key-file", "KEY").returncode == 0
    (tmp_path / "model" / "config.json").write_text("{}")
    third = value(cai("encrypt", "model", "--method", "gocryptfs", "-o", "OUT3", "--against",
                      "OUT2", "--old-key-file", "KEY", "--json"))
    assert third["revision"] == 3
    assert third["carried"] > 2
    assert cai("check", "OUT3", "--key-file", "KEY").returncode == 0
    assert cai("reseal", "OUT3", "--key-file", "KEY", "-o", "OUT4", "--pad").returncode == 2
