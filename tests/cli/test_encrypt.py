"""``cai encrypt``, ``check``, ``decrypt``, ``inspect`` as programs: status, output, files."""

from __future__ import annotations

import base64
import json
import os
import resource
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from cai.cli.owner_keys import private_pem
from cai.model import ReleaseRecord, check, open_model, read_key_file

ROOT = Path(__file__).resolve().parents[2]


class Finished:
    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        self.status, self.out, self.err = done.returncode, done.stdout, done.stderr
        assert "Traceback" not in self.err, self.err

    @property
    def value(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self.out)
        return value


Cai = Callable[..., Finished]


@pytest.fixture
def cai(tmp_path: Path) -> Cai:
    def run(*arguments: str | Path, before: Callable[[], None] | None = None) -> Finished:
        return Finished(
            subprocess.run(
                [sys.executable, "-m", "cai", *map(str, arguments)], cwd=tmp_path,
                env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
                timeout=60, check=False, preexec_fn=before,
            )
        )

    return run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    root = tmp_path / "model"
    (root / "sub").mkdir(parents=True)
    (root / "config.json").write_text("{}")
    (root / "sub" / "weights.safetensors").write_bytes(os.urandom(400_000))
    return root


class Broker(HTTPServer):
    """Stands for a KBS's admin listener: keeps what it is given, answers what it is told."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Desk)
        self.answer = 200
        self.received: list[tuple[str, str, bytes]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Desk(BaseHTTPRequestHandler):
    server: Broker

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received.append((self.path, self.headers["Authorization"], body))
        self.send_response(self.server.answer)
        self.end_headers()
        self.wfile.write(b'{"message": "said the broker \\u001b[31m"}')

    def log_message(self, *_args: object) -> None:
        return


@pytest.fixture
def broker() -> Iterator[Broker]:
    with Broker() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def admin(tmp_path: Path) -> Path:
    path = tmp_path / "admin.key"
    path.write_bytes(private_pem(Ed25519PrivateKey.generate()).reveal())
    return path


def test_with_nothing_but_a_directory(cai: Cai, model: Path, tmp_path: Path) -> None:
    done = cai("encrypt", "model/")
    assert done.status == 0
    assert "never publish it" in done.out
    key = tmp_path / "model.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert key.read_text().strip() not in done.out + done.err
    assert check(tmp_path / "model.sealed", read_key_file(key)).root in done.out


def test_round_trip_by_the_commands(cai: Cai, model: Path, tmp_path: Path) -> None:
    sealed = cai("encrypt", "model", "-o", "OUT", "--key-out", "KEY", "--json").value
    checked = cai("check", "OUT", "--key-file", "KEY", "--expect-root", sealed["root"], "--json")
    assert checked.status == 0
    assert checked.value["content_root"] == sealed["content_root"]
    assert checked.value["content_verified"] is True
    assert cai("decrypt", "OUT", "BACK", "--key-file", "KEY").status == 0
    assert subprocess.run(["diff", "-r", model, tmp_path / "BACK"], check=False).returncode == 0


def test_a_key_file_can_be_used_again(cai: Cai, model: Path, tmp_path: Path) -> None:
    assert cai("encrypt", "model", "--key-out", "KEY").status == 0
    assert cai("encrypt", "model", "-o", "again", "--key-file", "KEY").status == 0
    assert cai("check", "again", "--key-file", "KEY").status == 0
    assert not (tmp_path / "model.key").exists()


def test_a_flipped_byte_is_named(cai: Cai, model: Path, tmp_path: Path) -> None:
    cai("encrypt", "model", "-o", "OUT", "--key-out", "KEY")
    (stored,) = (tmp_path / "OUT" / "objects").iterdir()
    data = bytearray(stored.read_bytes())
    data[20_000] ^= 1
    stored.write_bytes(data)
    done = cai("check", "OUT", "--key-file", "KEY", "--json")
    assert done.status == 6
    assert stored.name in done.value["error"]["message"]
    assert cai("decrypt", "OUT", "BACK", "--key-file", "KEY").status == 6
    assert not (tmp_path / "BACK").exists()


BAD_INPUT: list[tuple[str, list[str], int, str]] = [
    ("missing model", ["encrypt", "nothing"], 3, "does not exist"),
    ("path is a file", ["encrypt", "file"], 3, "not a directory"),
    ("output inside", ["encrypt", "model", "-o", "model/out"], 2, "inside"),
    ("output is a file", ["encrypt", "model", "-o", "file"], 2, "exists already"),
    ("output folder missing", ["encrypt", "model", "-o", "no/out"], 4, "no/out"),
    ("output under a file", ["encrypt", "model", "-o", "file/out"], 4, "file/out"),
    ("unwritable output", ["encrypt", "model", "-o", "/proc/out"], 4, "/proc/out"),
    ("unknown method", ["encrypt", "model", "--method", "zip"], 2, "zip"),
    ("gocryptfs, against", ["encrypt", "model", "--method", "gocryptfs", "--pad"], 2, "pad"),
    ("password of cai", ["encrypt", "model", "--password-file", "pw"], 2, "gocryptfs"),
    ("key file missing", ["encrypt", "model", "--key-file", "nothing"], 3, "nothing"),
    ("key file of another form", ["encrypt", "model", "--key-file", "file"], 3, "64"),
    ("two keys", ["encrypt", "model", "--key-file", "file", "--key-out", "k"], 2, "beside"),
    ("key exists", ["encrypt", "model", "--key-out", "file"], 4, "exists already"),
    ("key inside the model", ["encrypt", "model", "--key-out", "model/k"], 2, "inside"),
    ("key inside the output", ["encrypt", "model", "-o", "o", "--key-out", "o/k"], 2, "inside"),
    ("key in a missing folder", ["encrypt", "model", "--key-out", "no/k"], 3, "no/k"),
    ("kbs alone", ["encrypt", "model", "--kbs", "http://127.0.0.1:1"], 2, "--key-id"),
    ("key id alone", ["encrypt", "model", "--key-id", "kbs:///a/b/c"], 2, "--kbs"),
    ("record without owner", ["encrypt", "model", "--record-out", "r"], 2, "--owner-key"),
    ("owner key is no key", ["encrypt", "model", "--owner-key", "file"], 3, "Ed25519"),
    ("licence missing", ["encrypt", "model", "--licence-file", "nothing"], 3, "nothing"),
    ("unknown option", ["encrypt", "model", "--kye-out", "k"], 2, "--kye-out"),
    ("check: nothing there", ["check", "nothing", "--key-file", "file"], 3, "nothing"),
    ("check: not sealed", ["check", "model", "--key-file", "KEY"], 3, "cai.json"),
    ("check: a file", ["check", "file", "--key-file", "KEY"], 3, "not a directory"),
    ("check: no key", ["check", "model"], 2, "--key-file"),
    ("check: wrong key", ["check", "OUT", "--key-file", "OTHER"], 5, "key"),
    ("check: another root", ["check", "OUT", "--key-file", "KEY", "--expect-root", "0" * 64], 6,
     "root"),
    ("check: no root", ["check", "OUT", "--key-file", "KEY", "--expect-root", "0"], 2, "64"),
    ("decrypt: wrong key", ["decrypt", "OUT", "x", "--key-file", "OTHER"], 5, "key"),
    ("decrypt: occupied", ["decrypt", "OUT", "model", "--key-file", "KEY"], 2, "exists already"),
    ("decrypt: inside", ["decrypt", "OUT", "OUT/x", "--key-file", "KEY"], 2, "inside"),
    ("inspect: not sealed", ["inspect", "model"], 3, "cai.json"),
    ("inspect: wrong key", ["inspect", "OUT", "--key-file", "OTHER"], 5, "key"),
]  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("bad")
    (work / "model").mkdir()
    (work / "model" / "f").write_text("x")
    (work / "file").write_text("not a key")
    (work / "OTHER").write_text("0" * 64)
    done = subprocess.run(
        [sys.executable, "-m", "cai", "encrypt", "model", "-o", "OUT", "--key-out", "KEY"],
        cwd=work, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False,
    )
    assert done.returncode == 0
    return work


@pytest.mark.parametrize(
    ("arguments", "status", "says"), [row[1:] for row in BAD_INPUT], ids=[r[0] for r in BAD_INPUT]
)
def test_bad_input(arguments: list[str], status: int, says: str, prepared: Path) -> None:
    before = sorted(prepared.rglob("*"))
    done = Finished(
        subprocess.run(
            [sys.executable, "-m", "cai", *arguments], cwd=prepared, capture_output=True,
            text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=60, check=False,
        )
    )
    assert (done.status, done.out) == (status, "")
    first, *hints = done.err.splitlines()
    assert first.startswith("cai: ")
    assert says in first
    assert len(hints) <= 1
    assert all(hint.startswith("cai: hint: ") for hint in hints)
    assert sorted(prepared.rglob("*")) == before


def test_a_disk_that_refuses_leaves_no_key_either(cai: Cai, model: Path, tmp_path: Path) -> None:
    """A limit on file sizes is the full disk that needs no privileges."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    done = cai("encrypt", "model", before=limit)
    assert done.status == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_pickle_needs_a_word(cai: Cai, model: Path) -> None:
    (model / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    done = cai("encrypt", "model")
    assert done.status == 7
    assert "--allow-pickle" in done.err
    assert cai("encrypt", "model", "--allow-pickle", "--json").value["allow"] == ["pickle"]


def test_the_key_goes_to_the_broker_only(
    cai: Cai, model: Path, tmp_path: Path, broker: Broker, admin: Path
) -> None:
    done = cai(
        "encrypt", "model", "-o", "OUT", "--kbs", broker.url, "--key-id", "kbs:///a/b/c-d.e",
        "--admin-key", admin, "--owner-key", "owner.pem", "--json",
    )
    assert done.status == 0
    ((path, authorization, body),) = broker.received
    assert path == "/kbs/v0/resource/a/b/c-d.e"
    record = ReleaseRecord.parse(body, owner_key=done.value["owner_key"])
    assert record.index_sha256 == done.value["index_sha256"]
    with open_model(
        tmp_path / "OUT", record.kek, expect_root=record.manifest_root,
        min_revision=record.min_revision,
    ) as opened:
        assert opened.model_id == record.model_id
    kek = record.kek.reveal().hex()
    assert kek not in done.out + done.err
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or kek.encode() not in file.read_bytes()
    assert stat.S_IMODE((tmp_path / "owner.pem").stat().st_mode) == 0o600
    scheme, _, token = authorization.partition(" ")
    assert scheme == "Bearer"
    _check_token(token, admin)
    again = cai(
        "encrypt", "model", "-o", "OUT2", "--kbs", broker.url, "--key-id", "kbs:///a/b/c",
        "--admin-key", admin, "--owner-key", "owner.pem", "--key-out", "KEY", "--json",
    )
    assert again.value["owner_key"] == done.value["owner_key"]
    second = ReleaseRecord.parse(broker.received[1][2], owner_key=done.value["owner_key"])
    assert second.kek == read_key_file(tmp_path / "KEY") != record.kek


def _check_token(token: str, admin: Path) -> None:
    def plain(part: str) -> bytes:
        return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))

    header, claims, signature = token.split(".")
    key = load_pem_private_key(admin.read_bytes(), None)
    assert isinstance(key, Ed25519PrivateKey)
    key.public_key().verify(plain(signature), f"{header}.{claims}".encode())
    head = json.loads(plain(header))
    assert len(head.pop("kid")) == 32
    assert head == {"alg": "EdDSA", "typ": "JWT"}
    value = json.loads(plain(claims))
    assert value["exp"] - value.pop("iat") == 300
    assert value.pop("exp")
    assert value == {"iss": "cai", "sub": "admin", "aud": ["KBS"], "role": "admin"}


@pytest.mark.parametrize(("answer", "status"), [(401, 7), (403, 7), (404, 8), (500, 8), (302, 8)])
def test_a_broker_that_refuses_undoes_the_sealing(
    answer: int, status: int, cai: Cai, model: Path, tmp_path: Path, broker: Broker, admin: Path
) -> None:
    broker.answer = answer
    before = sorted(tmp_path.iterdir())
    done = cai(
        "encrypt", "model", "--kbs", broker.url, "--key-id", "kbs:///a/b/c", "--admin-key", admin,
        "--owner-key", "owner.pem", "--key-out", "KEY", "--record-out", "RECORD",
    )
    assert done.status == status
    assert "said the broker" in done.err
    assert "\x1b" not in done.err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("kbs", "key_id", "status"),
    [
        ("http://127.0.0.1:9", "kbs:///a/b/c", 8), ("http://kbs.example", "kbs:///a/b/c", 2),
        ("http://10.0.0.1:8081", "kbs:///a/b/c", 2), ("ftp://127.0.0.1", "kbs:///a/b/c", 2),
        ("127.0.0.1:8081", "kbs:///a/b/c", 2), ("http://u:p@127.0.0.1", "kbs:///a/b/c", 2),
        ("http://[::1", "kbs:///a/b/c", 2), ("http://127.0.0.1:9", "a/b/c", 2),
        ("http://127.0.0.1:9", "kbs:///a/b", 2), ("http://127.0.0.1:9", "kbs:///a/../c", 2),
        ("http://127.0.0.1:9", "kbs:///a/b/c?x", 2), ("http://127.0.0.1:9", "kbs://h/a/b/c", 2),
    ],
)  # fmt: skip
def test_addresses_and_names_of_the_broker(
    kbs: str, key_id: str, status: int, cai: Cai, model: Path, tmp_path: Path, admin: Path
) -> None:
    before = sorted(tmp_path.iterdir())
    done = cai(
        "encrypt", "model", "--kbs", kbs, "--key-id", key_id, "--admin-key", admin,
        "--owner-key", "owner.pem",
    )
    assert done.status == status, done.err
    assert sorted(tmp_path.iterdir()) == before


def test_a_record_on_disk_for_uploading_by_hand(cai: Cai, model: Path, tmp_path: Path) -> None:
    done = cai("encrypt", "model", "--owner-key", "owner.pem", "--record-out", "RECORD", "--json")
    assert stat.S_IMODE((tmp_path / "RECORD").stat().st_mode) == 0o600
    record = ReleaseRecord.parse(
        (tmp_path / "RECORD").read_bytes(), owner_key=done.value["owner_key"]
    )
    assert record.kek == read_key_file(tmp_path / "model.key")
    assert record.manifest_root == done.value["root"]


def test_inspect_without_and_with_the_key(cai: Cai, model: Path, tmp_path: Path) -> None:
    (model / "bad\x1b[31mname").write_text("x")
    (model / "l").symlink_to("config.json")
    (tmp_path / "LICENCE").write_text("be kind")
    sealed = cai("encrypt", "model", "-o", "OUT", "--key-out", "KEY", "--name", "tiny",
                 "--licence", "MIT", "--licence-file", "LICENCE", "--json").value  # fmt: skip
    public = cai("inspect", "OUT", "--json").value
    assert public["authenticated"] is False
    assert public["model_id"] == sealed["model_id"]
    assert "entries" not in public
    assert "not authenticated" in cai("inspect", "OUT").out
    private = cai("inspect", "OUT", "--key-file", "KEY", "--json").value
    assert private["authenticated"] is True
    assert private["root"] == sealed["root"]
    assert (private["name"], private["licence"]) == ("tiny", "MIT")
    assert [e["path"] for e in private["entries"]] == [
        "bad\x1b[31mname", "config.json", "l", "sub", "sub/weights.safetensors",
    ]  # fmt: skip
    shown = cai("inspect", "OUT", "--key-file", "KEY")
    assert "sub/weights.safetensors" in shown.out
    assert "\x1b" not in shown.out
    with open_model(tmp_path / "OUT", read_key_file(tmp_path / "KEY")) as opened:
        keys = [stored.key.hex() for stored in opened.manifest.stored.values()]
    assert keys
    assert not any(key in shown.out + json.dumps(private) for key in keys)
