from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from cai.demo import parties as module
from cai.demo.parties import Parties, PartyEnded, mounts_under, unmount
from cai.errors import InputMissing, PeerUnreachable

SLEEP = ["python", "-c", "import time; time.sleep(600)"]
DEAF = [
    "python", "-c",
    "import signal,time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "print('{\"deaf\": true}', flush=True)\ntime.sleep(600)",
]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_no_process_is_left_behind_and_the_last_ends_first(tmp_path: Path) -> None:
    trap = (
        "import signal,sys,time\n"
        "def end(*_):\n    open('order','a').write(sys.argv[1]); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\nprint('{\"ready\": 1}', flush=True)\ntime.sleep(600)"
    )
    with Parties(tmp_path) as parties:
        started = [parties.start(name, ["python", "-c", trap, name]) for name in ("a", "b", "c")]
        for party in started:
            party.wait_document(lambda value: "ready" in value)
    assert (tmp_path / "order").read_text() == "cba"
    assert not any(alive(party.process.pid) for party in started)


def test_an_error_in_the_story_ends_the_parties_too(tmp_path: Path) -> None:
    started = []

    def story() -> None:
        with Parties(tmp_path) as parties:
            started.append(parties.start("a", SLEEP))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        story()
    assert not alive(started[0].process.pid)


def test_signals_wait_until_everything_is_cleared_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STOP_S", 0.2)

    def story() -> None:
        with Parties(tmp_path) as parties:
            started.extend(parties.start(name, DEAF) for name in ("a", "b"))
            for party in started:
                party.wait_document(lambda value: "deaf" in value)
            timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
            timer.start()

    started: list[module.Party] = []
    with pytest.raises(KeyboardInterrupt):
        story()
    assert not any(alive(party.process.pid) for party in started)


def test_a_party_deaf_to_sigterm_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STOP_S", 0.2)
    with Parties(tmp_path) as parties:
        party = parties.start("deaf", DEAF)
        party.wait_document(lambda value: value.get("deaf") is True)
        assert party.stop() == -signal.SIGKILL


def test_a_party_that_ends_early_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    with Parties(tmp_path) as parties:
        party = parties.start("a", ["python", "-c", "import sys; sys.exit('kbs: no space')"])
        with pytest.raises(PartyEnded, match="a ended with status 1") as raised:
            party.wait_document(lambda _value: True)
    assert raised.value.hint == "kbs: no space"


def test_a_party_that_is_never_ready_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "START_S", 0.2)
    with Parties(tmp_path) as parties:
        party = parties.start("a", SLEEP)
        with pytest.raises(PeerUnreachable, match="was not ready"):
            party.wait_document(lambda _value: True)


def test_a_command_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RUN_S", 0.2)
    with Parties(tmp_path) as parties, pytest.raises(PartyEnded, match="did not end"):
        parties.run("a", SLEEP)


def test_a_command_that_fails_is_told_apart(tmp_path: Path) -> None:
    failing = ["python", "-c", "import sys; print('{\"x\": 1}'); sys.exit(7)"]
    with Parties(tmp_path) as parties:
        finished = parties.run("a", failing)
        assert (finished.status, finished.document()) == (7, {"x": 1})
        with pytest.raises(PartyEnded, match="status 7"):
            parties.require("a", failing)


@pytest.mark.parametrize("printed", ["", "{", "[1]", "words", "{1}"])
def test_output_without_a_document_is_an_error(tmp_path: Path, printed: str) -> None:
    with Parties(tmp_path) as parties:
        finished = parties.run("a", ["python", "-c", f"print({printed!r})"])
        with pytest.raises(PartyEnded, match="no JSON"):
            finished.document()


def test_a_program_that_is_not_installed_is_named(tmp_path: Path) -> None:
    with Parties(tmp_path) as parties, pytest.raises(InputMissing, match="no-such-program"):
        parties.start("a", ["no-such-program"])


def test_parties_do_not_inherit_proxies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "x")
    program = "import json,os; print(json.dumps({'names': list(os.environ)}))"
    with Parties(tmp_path) as parties:
        names = parties.require("a", ["python", "-c", program]).document()["names"]
    assert not [name for name in names if name.lower().endswith("_proxy")]


def test_logs_are_not_for_others(tmp_path: Path) -> None:
    with Parties(tmp_path) as parties:
        assert parties.logs.stat().st_mode & 0o777 == 0o700


def test_a_mount_that_is_left_is_taken_away(tmp_path: Path) -> None:
    place = tmp_path / "a b"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "none", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this user cannot mount")
    try:
        assert mounts_under(tmp_path) == [place]
        assert mounts_under(place) == []
        with Parties(tmp_path):
            pass
        assert mounts_under(tmp_path) == []
    finally:
        unmount(place)


def test_ctrl_c_reaches_the_demo_and_not_the_parties(tmp_path: Path) -> None:
    with Parties(tmp_path) as parties:
        party = parties.start("a", SLEEP)
        time.sleep(0.1)
        assert os.getsid(party.process.pid) == party.process.pid != os.getsid(0)
