"""``kbs audit``: what a person and an auditor do, with and without the broker."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cai import jcs
from cai.errors import InputMissing
from cai.terminal import run_app
from kbs.admin import audit as routes
from kbs.admin.changes import Role
from kbs.admin.people import AdminRecord
from kbs.admin.tokens import make_admin_token
from kbs.cli import app
from kbs.cli import audit as verbs
from tests.kbs.audit.conftest import copy_database
from tests.kbs.world import Site

Run = Callable[..., tuple[int, Any]]


class SiteClient:
    """The admin client, without sockets."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.bend: Callable[[str, Any], Any] = lambda _route, answer: answer

    def __enter__(self) -> SiteClient:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def get(self, route: str) -> Any:
        return self.call("GET", route)

    def post(self, route: str, body: bytes = b"") -> Any:
        return self.call("POST", route, body)

    def call(self, method: str, route: str, body: bytes | None = None) -> Any:
        answer = self.site.admin(method, route, body)
        if answer.status_code == 404:
            raise InputMissing(answer.json()["detail"])
        assert answer.status_code == 200, answer.text
        return self.bend(route, jcs.parse(answer.content, what="answer", limit=1 << 26))


@pytest.fixture
def client(full: Site, monkeypatch: pytest.MonkeyPatch) -> SiteClient:
    made = SiteClient(full)
    monkeypatch.setattr(verbs, "open_client", lambda *_: made)
    return made


@pytest.fixture
def run(
    client: SiteClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:  # fmt: skip
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, Any]:
        monkeypatch.setattr(sys, "argv", ["kbs", "audit", *arguments, "--json"])
        status = run_app("kbs", app)
        out = capsys.readouterr().out
        return status, json.loads(out) if out else None

    return call


def failed(value: dict[str, Any]) -> set[str]:
    return {item["name"] for item in value["checks"] if item["outcome"] == "fail"}


def test_an_auditor_verifies_without_the_broker(run: Run, full: Site) -> None:
    assert run("key", "-o", "log.key")[0] == 0
    assert run("checkpoint", "-o", "kept.txt")[0] == 0
    assert full.admin("POST", "resource/models/minilm/key", b"third").status_code == 200
    assert run("export", "-o", "all.jsonl")[1]["from"] == 0
    assert run("prove", "3", "-o", "leaf.jsonl")[1]["kind"] == "inclusion"
    assert run("prove", "--since", "kept.txt", "-o", "grown.jsonl")[1]["kind"] == "consistency"
    for name in ("all.jsonl", "leaf.jsonl", "grown.jsonl"):
        status, value = run("verify", "--bundle", name, "--key", "log.key")
        assert (status, value["verdict"]) == (0, "pass"), value
    for name in ("all.jsonl", "grown.jsonl"):
        kept = ("--checkpoint", "kept.txt")
        assert run("verify", "--bundle", name, "--key", "log.key", *kept)[0] == 0
    # The same with the bare key.
    (current, *_), = (run("key")[1]["keys"],)
    assert run("verify", "--bundle", "leaf.jsonl", "--key", current)[0] == 0


def test_exports_in_parts(run: Run, full: Site) -> None:
    run("key", "-o", "log.key")
    size = run("export", "-o", "first.jsonl")[1]["size"]
    assert full.admin("POST", "resource/models/minilm/key", b"third").status_code == 200
    assert run("export", "-o", "second.jsonl", "--from", str(size))[1]["from"] == size
    assert run("verify", "--bundle", "second.jsonl", "--key", "log.key")[0] == 0
    assert len(Path("second.jsonl").read_bytes().splitlines()) == 2
    assert run("export", "-o", "none.jsonl", "--from", "100000")[0] == 3
    assert not Path("none.jsonl").exists()


def test_a_bundle_that_was_edited(run: Run) -> None:
    run("key", "-o", "log.key")
    run("export", "-o", "all.jsonl")
    lines = Path("all.jsonl").read_bytes().split(b"\n")
    Path("cut.jsonl").write_bytes(b"\n".join([*lines[:4], *lines[5:]]))
    status, value = run("verify", "--bundle", "cut.jsonl", "--key", "log.key")
    assert status == 6
    assert "leaf.place" in failed(value)
    status, value = run("verify", "--bundle", "all.jsonl", "--key", "ab" * 32)
    assert status == 6
    assert "checkpoint.signature" in failed(value)


def test_the_broker_walks_its_own_log(run: Run, full: Site) -> None:
    run("key", "-o", "log.key")
    run("checkpoint", "-o", "kept.txt")
    assert run("verify")[0] == 0
    status, value = run("verify", "--key", "log.key", "--checkpoint", "kept.txt")
    assert status == 0, value
    names = {item["name"] for item in value["checks"]}
    assert {"database.row", "checkpoint.held", "key.proof.consistency"} <= names
    import sqlite3

    connection = sqlite3.connect(full.settings.data / "kbs.sqlite")
    connection.execute("UPDATE resource SET owner = 'x' WHERE version = 2")
    connection.commit()
    connection.close()
    status, value = run("verify")
    assert status == 6
    assert failed(value) == {"database.row"}
    assert run("verify", "--no-open-rows")[0] == 6


def test_a_rollback_is_found_even_if_the_broker_lies(
    run: Run, full: Site, client: SiteClient, tmp_path: Path
) -> None:
    """Its walk may say what it likes: without a proof the key shows that the log is another."""
    database = full.settings.data / "kbs.sqlite"
    copy_database(database, tmp_path / "old.sqlite")
    assert full.admin("POST", "resource/models/minilm/key", b"third").status_code == 200
    run("key", "-o", "log.key")
    run("checkpoint", "-o", "kept.txt")
    copy_database(tmp_path / "old.sqlite", database)
    arguments = ("verify", "--key", "log.key", "--checkpoint", "kept.txt")
    status, value = run(*arguments)
    assert status == 6
    assert failed(value) == {"checkpoint.held", "key.proof.consistency"}
    client.bend = lambda route, answer: (
        {**answer, "checks": [{"name": "all", "outcome": "pass"}]}
        if route.startswith("audit/verify") else answer
    )  # fmt: skip
    status, value = run(*arguments)
    assert (status, failed(value)) == (6, {"key.proof.consistency"})
    # And the kept checkpoint is not replaced by one of a log that does not extend it.
    before = Path("kept.txt").read_bytes()
    assert run("checkpoint", "-o", "kept.txt", "--key", "log.key")[0] == 6
    assert Path("kept.txt").read_bytes() == before


def test_a_checkpoint_replaces_its_predecessor(run: Run, full: Site) -> None:
    run("key", "-o", "log.key")
    first = run("checkpoint", "-o", "kept.txt", "--key", "log.key")[1]["size"]
    assert full.admin("POST", "resource/models/minilm/key", b"third").status_code == 200
    assert run("checkpoint", "-o", "kept.txt")[0] == 2  # only a key can show it
    second = run("checkpoint", "-o", "kept.txt", "--key", "log.key")[1]["size"]
    assert second > first
    assert Path("kept.txt").read_text().split("\n")[1] == str(second)


@pytest.mark.parametrize(("arguments", "status"), [
    (["prove", "-o", "x"], 2), (["prove", "1", "--since", "y", "-o", "x"], 2),
    (["prove", "100000", "-o", "x"], 3), (["prove", "--since", "absent", "-o", "x"], 3),
    (["verify", "--bundle", "x"], 2), (["verify", "--bundle", "absent", "--key", "ab" * 32], 3),
    (["verify", "--checkpoint", "log.key"], 2), (["verify", "--key", "no-key"], 3),
    (["export", "-o", "log.key"], 4), (["export", "-o", "no/such/place"], 3),
])  # fmt: skip
def test_wrong_use_is_said(run: Run, arguments: list[str], status: int) -> None:
    run("key", "-o", "log.key")
    assert run(*arguments)[0] == status
    assert not Path("x").exists()


@pytest.mark.parametrize("route", [
    "audit", "audit/checkpoint", "audit/checkpoints", "audit/proof?seq=1",
    "audit/consistency?old=1&new=2", "audit/frontier?size=1", "audit/verify",
])  # fmt: skip
def test_the_log_is_for_auditors_of_the_whole_broker(full: Site, route: str) -> None:
    method = "POST" if route.endswith("verify") else "GET"
    assert full.call(method, f"/kbs/v0/{route}", b"", app="admin").status_code == 401
    assert full.call(method, f"/kbs/v0/{route}", b"").status_code in (401, 404)
    for name, roles, tenant, status in (
        ("auditor", {Role.AUDITOR}, "", 200),
        ("uploader", {Role.RESOURCE}, "", 403),
        ("tenant", {Role.AUDITOR, Role.RESOURCE}, "models", 403),
    ):
        key = Ed25519PrivateKey.generate()
        record = AdminRecord(key.public_key(), frozenset(roles), tenant, 0, "admin")
        assert full.admin("POST", f"admin/{name}", record.encode()).status_code == 200
        token = make_admin_token(key, now=full.clock(), subject=name)
        answer = full.call(
            method, f"/kbs/v0/{route}", b"", app="admin",
            headers={"Authorization": f"Bearer {token}"},
        )  # fmt: skip
        assert answer.status_code == status, (name, answer.text)


@pytest.mark.parametrize(("route", "status"), [
    ("audit/proof", 404), ("audit/proof?seq=x", 400), ("audit/proof?seq=-1", 400),
    ("audit/proof?seq=99999", 404), ("audit/proof?seq=1&size=2", 404),
    ("audit/consistency?old=2&new=1", 404), ("audit/consistency?old=1&new=99999", 404),
    ("audit/frontier?size=99999", 404), ("audit/checkpoints?from=9999999999999999999", 400),
])  # fmt: skip
def test_bad_questions_get_an_error(full: Site, route: str, status: int) -> None:
    assert full.admin("GET", route).status_code == status


def test_a_kept_checkpoint_that_is_none(full: Site) -> None:
    answer = full.admin("POST", "audit/verify", b"rubbish")
    assert answer.status_code == 200
    assert failed(answer.json()) == {"checkpoint.form"}
    assert full.admin("POST", "audit/verify", b"x" * 20_000).status_code == 413


def test_a_long_walk_is_asked_for_again(
    run: Run, client: SiteClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call waits a while only; the walk goes on, and another one does not begin beside it."""
    from kbs import logged

    proceed, real, asked = threading.Event(), logged.verify_log, []

    def slow(*arguments: Any, **options: Any) -> Any:
        assert proceed.wait(30)
        return real(*arguments, **options)

    def watch(route: str, answer: Any) -> Any:
        asked.append((route.partition("?")[0], answer.get("running", False)))
        if len(asked) == 3:
            other = client.site.admin("POST", "audit/verify?open=false", b"")
            assert other.status_code == 503
            proceed.set()
        return answer

    monkeypatch.setattr(logged, "verify_log", slow)
    monkeypatch.setattr(routes, "WALK_SECONDS", 0.05)
    client.bend = watch
    status, value = run("verify")
    assert (status, value["verdict"]) == (0, "pass")
    assert len(asked) >= 4
    assert {route for route, running in asked if running} == {"audit/verify"}


def test_a_walk_that_cannot_be_done_says_so(full: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    from kbs import logged

    def fail(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("a secret text")

    monkeypatch.setattr(logged, "verify_log", fail)
    answer = full.admin("POST", "audit/verify", b"")
    assert answer.status_code == 500
    assert "ZeroDivisionError" in answer.text
    assert "secret text" not in answer.text


def test_rows_from_either_end(run: Run) -> None:
    status, value = run("show", "--from", "2", "--limit", "3")
    assert (status, [row["seq"] for row in value["rows"]]) == (0, [2, 3, 4])
    size = value["size"]
    assert [row["seq"] for row in run("show", "--last", "2")[1]["rows"]] == [size - 2, size - 1]
    assert len(run("show", "--last", "1000")[1]["rows"]) == size
    assert run("show", "--limit", "0")[0] == 2


def test_a_person_reads_a_table(
    client: SiteClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["kbs", "audit", "show", "--last", "5"])
    assert run_app("kbs", app) == 0
    assert "unauthenticated" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["kbs", "audit", "verify"])
    assert run_app("kbs", app) == 0
    told = capsys.readouterr()
    assert "database.row" in told.out
    assert "SIMULATED" in told.out
    assert "own word" in told.err
