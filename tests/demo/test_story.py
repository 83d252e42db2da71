"""The pieces of the story by themselves; the whole of it is played by tests/e2e/test_demo.py."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx
import pytest
from rich.console import Console

from cai.demo import asking, ending, model, recipe, refusals
from cai.demo.asking import SENTENCES, cosine, similarities
from cai.demo.model import DemoModel, require_extra
from cai.demo.parties import Finished, Parties
from cai.demo.ports import HeldPort, Ports
from cai.demo.stage import MAX_WORK_PATH, Engine, Stage, working_directory
from cai.demo.telling import SIMULATED, StoryBroken, Teller
from cai.errors import InputError, InputMissing, StorageError, UsageError
from cai.host.settings import load_host_settings
from cai.terminal import Terminal


def teller() -> tuple[Teller, io.StringIO]:
    out = io.StringIO()
    terminal = Terminal("cai", out=Console(file=out, width=200, highlight=False))
    return Teller(terminal), out


def stage(work: Path) -> Stage:
    # Any free ports: the usual ones belong to the demo that another test plays meanwhile.
    ports = Ports(*(HeldPort(0) for _ in range(5)))
    model = DemoModel(work, "m", "a test")
    return Stage(work, model, Engine(), Parties(work), teller()[0], ports)


# --- telling ------------------------------------------------------------------------------------


def test_what_rests_on_the_simulator_says_so_on_its_line() -> None:
    tell, out = teller()
    tell.did("a quote verified", simulated=True)
    tell.refused("a debug guest", "tdx.debug", simulated=True)
    tell.did("sealed")
    tell.refused("a flipped bit", "objects/ab")
    lines = [line for line in out.getvalue().splitlines() if line.strip()]
    assert [SIMULATED in line for line in lines] == [True, True, True, False, False, False]


def test_commands_are_shown_as_a_person_types_them_and_in_one_line() -> None:
    tell, out = teller()
    tell.command(["cai", "host", "up", "--json", "--model", "x" * 300])
    assert out.getvalue() == f"    $ cai host up --model {'x' * 300}\n"


def test_an_act_is_ok_only_when_it_ended() -> None:
    tell, _ = teller()
    with tell.act(1, "Take", "A model.") as good:
        good.facts["x"] = 1
    assert good.to_json()["ok"] is True

    def broken() -> None:
        with tell.act(2, "Seal", "Sealed."):
            raise StoryBroken("no")

    with pytest.raises(StoryBroken):
        broken()
    assert [act.ok for act in tell.acts] == [True, False]


def test_under_json_nothing_decorative_is_printed() -> None:
    out = io.StringIO()
    tell = Teller(Terminal("cai", json_output=True, out=Console(file=out)))
    tell.title("a", "b")
    with tell.act(1, "Take", "A model."):
        tell.did("x")
        tell.refused("x", "y")
        tell.note("z")
        tell.command(["cai", "check", "a b"])
        with tell.waiting("w"):
            pass
    assert out.getvalue() == ""
    assert tell.commands == ["cai check 'a b'"]


def test_text_from_parties_is_not_read_as_markup() -> None:
    tell, out = teller()
    tell.refused("x", "the reason is [red]literal[/red] [/nonsense]")
    assert "[red]literal[/red] [/nonsense]" in out.getvalue()


# --- the working directory ----------------------------------------------------------------------


def test_a_temporary_directory_is_private_and_goes_away() -> None:
    with working_directory(None) as work:
        assert work.stat().st_mode & 0o777 == 0o700
        (work / "file").touch()
    assert not work.exists()


def test_an_error_in_the_story_keeps_its_type_and_removes_the_directory() -> None:
    seen: list[Path] = []

    def story() -> None:
        with working_directory(None) as work:
            seen.append(work)
            raise OSError(5, "inner")

    with pytest.raises(OSError, match="inner"):
        story()
    assert not seen[0].exists()


def test_a_kept_directory_stays_and_is_private() -> None:
    # A test's own directory may be too long a path for sockets.
    with tempfile.TemporaryDirectory(prefix="cai-") as short:
        kept = Path(short) / "kept"
        with working_directory(kept) as work:
            (work / "file").touch()
        assert (kept / "file").exists()
        assert kept.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("kind", ["file", "full"])
def test_a_directory_that_holds_something_is_refused(tmp_path: Path, kind: str) -> None:
    keep = tmp_path / "kept"
    if kind == "file":
        keep.write_text("mine")
    else:
        keep.mkdir()
        (keep / "mine").touch()
    with pytest.raises(InputError), working_directory(keep):
        pass


def test_a_path_too_long_for_sockets_is_refused(tmp_path: Path) -> None:
    keep = tmp_path / ("x" * MAX_WORK_PATH)
    with pytest.raises(UsageError, match="longer than"), working_directory(keep):
        pass


def test_a_directory_under_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError), working_directory(tmp_path / "file" / "kept"):
        pass


def test_what_the_engine_needs_is_named_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    require_extra()
    monkeypatch.setattr(model, "ENGINE_MODULES", ("json", "no_such_module"))
    with pytest.raises(InputMissing, match="no_such_module"):
        require_extra()


# --- recipes ------------------------------------------------------------------------------------


def test_the_written_settings_are_what_the_host_reads(tmp_path: Path) -> None:
    recipe.write_env(
        tmp_path / "cai.env", trustee_url="http://127.0.0.1:8080", service_port=41001,
        mount_point=tmp_path / "mnt",
    )
    settings = load_host_settings(tmp_path / "cai.env")
    assert settings.key_path == "default/aliyun/model-decryption-key"
    assert (settings.service_port, settings.mount_point) == (41001, tmp_path / "mnt")


def test_written_files_are_private_and_never_overwritten(tmp_path: Path) -> None:
    recipe.write_json(tmp_path / "a.json", {"a": 1})
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o600
    with pytest.raises(StorageError, match="exists already"):
        recipe.write_json(tmp_path / "a.json", {})
    with pytest.raises(StorageError if os.geteuid() else Exception):
        recipe.write_json(tmp_path / "none" / "a.json", {})


def test_a_taken_port_is_passed_by() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        other = HeldPort(port)
        assert other.give() != port
        assert asking.listens(port)
    assert not asking.listens(port)


def test_a_held_port_is_nobody_elses_until_it_is_given() -> None:
    held = HeldPort(0)
    with socket.socket() as thief:
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with pytest.raises(OSError, match="in use"):
            thief.bind(("127.0.0.1", held.number))
        thief.bind(("127.0.0.1", held.give()))


# --- asking -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [([1, 0], [2, 0], 1), ([1, 0], [0, 3], 0), ([1, 1], [-2, -2], -1), ([0, 0], [1, 1], 0)],
)
def test_cosine(a: list[float], b: list[float], expected: float) -> None:
    assert cosine(a, b) == pytest.approx(expected)


def test_pairs_that_do_not_come_out_as_related_break_the_story() -> None:
    same = [[1.0, 0.0]] * len(SENTENCES)
    with pytest.raises(StoryBroken, match="related sentences"):
        similarities(same)


def test_pairs_that_come_out_as_related_are_told() -> None:
    topics = [(0, "cat sofa kitten couch"), (1, "password login"), (2, "share stock market prices")]

    def vector(text: str) -> list[float]:
        words = set(text.lower().strip("?.").replace(".", "").split())
        return [0.1 + len(words & set(known.split())) for _, known in topics]

    assert len(similarities([vector(text) for text in SENTENCES])) == len(asking.PAIRS)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"error":{"message":"no evidence"}}', "no evidence"),
        (b'{"detail":"denied","type":"x"}', "denied"),
        (b'{"error":"plain"}', "plain"),
        (b"two\n  lines", "two lines"),
        (b"[1]", "[1]"),
        (b"", "Bad Gateway"),
    ],
)
def test_reasons_are_read_from_any_error_answer(content: bytes, expected: str) -> None:
    assert asking.reason_of(httpx.Response(502, content=content)) == expected


# --- refusals -----------------------------------------------------------------------------------


def ended(status: int, message: str) -> Finished:
    return Finished(status, json.dumps({"error": {"code": "x", "message": message}}) + "\n", "")


def test_a_refusal_gives_its_reason() -> None:
    assert refusals.must_be_refused(ended(7, "tdx.debug: on"), words=["debug"]) == "tdx.debug: on"


@pytest.mark.parametrize("status", [0, 1, 6, 8, -9])
def test_a_refusal_that_does_not_refuse_breaks_the_story(status: int) -> None:
    with pytest.raises(StoryBroken, match="status 7"):
        refusals.must_be_refused(ended(status, "denied"))


def test_a_refusal_for_another_reason_breaks_the_story() -> None:
    with pytest.raises(StoryBroken, match="another reason"):
        refusals.must_be_refused(ended(7, "no such resource"), words=["debug"])


def test_a_refusal_without_a_reason_breaks_the_story() -> None:
    with pytest.raises(StoryBroken, match="without a reason"):
        refusals.must_be_refused(Finished(7, '{"error": {}}', ""))


def test_tcp_listeners_of_a_process_are_found(tmp_path: Path) -> None:
    program = (
        "import socket,sys\ns=socket.socket(); s.bind(('127.0.0.1',0)); s.listen()\n"
        "u=socket.socket(socket.AF_UNIX); u.bind(sys.argv[1]); u.listen()\n"
        "print(s.getsockname()[1], flush=True)\nsys.stdin.read()\n"
        "s.close(); print('closed', flush=True)\nimport time; time.sleep(600)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "u.sock")]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, text=True, start_new_session=True
    ) as process:
        assert process.stdout
        assert process.stdin
        port = int(process.stdout.readline())
        assert refusals.tcp_listeners(process.pid) == [f"loopback:{port}"]
        process.stdin.close()
        assert process.stdout.readline() == "closed\n"
        assert refusals.tcp_listeners(process.pid) == []
        process.kill()


def sealed(work: Path) -> None:
    (work / "sealed" / "objects").mkdir(parents=True)
    (work / "sealed" / "objects" / "aa").write_bytes(bytes(100))
    (work / "sealed" / "objects" / "bb").write_bytes(bytes(1000))


def test_exactly_one_bit_of_a_copy_is_flipped(tmp_path: Path) -> None:
    sealed(tmp_path)
    flipped = refusals._flip_one_bit(stage(tmp_path))
    assert flipped == tmp_path / "flipped" / "objects" / "bb"
    assert sum(flipped.read_bytes()) == 1
    assert (tmp_path / "sealed" / "objects" / "bb").read_bytes() == bytes(1000)


def test_an_ordinary_server_would_answer() -> None:
    with refusals._ordinary_server() as (port, seen):
        assert httpx.post(f"http://127.0.0.1:{port}/v1/embeddings").status_code == 200
        assert seen == ["/v1/embeddings"]


def test_a_host_that_answers_a_plain_request_breaks_the_story(tmp_path: Path) -> None:
    class Answering(refusals.BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # noqa: N802
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_arguments: object) -> None:
            pass

    server = refusals.ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    thread = refusals.threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        open_stage = stage(tmp_path)
        open_stage.ports.service.number = server.server_address[1]
        with pytest.raises(StoryBroken, match="was answered with 200"):
            refusals.plain_request(open_stage)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


# --- the ending ---------------------------------------------------------------------------------


def row(action: str, decision: str, reason: str = "", *names: str) -> dict[str, object]:
    checks = [{"name": name, "outcome": "fail"} for name in names]
    return {"action": action, "decision": decision, "reason": reason, "checks": checks}


COMPLETE = [
    row("release", "deny", "no policy"),
    row("release", "allow"),
    row("attest", "deny", "tdx.mr_td: differs"),
    row("attest", "deny", "", "tdx.debug"),
    row("attest", "deny", "nonce"),
    row("attest", "deny", "tdx.report_data"),
]


def test_a_complete_log_is_enough() -> None:
    ending._require_decisions(COMPLETE)


@pytest.mark.parametrize("missing", range(len(COMPLETE)))
def test_a_decision_that_is_not_in_the_log_breaks_the_story(missing: int) -> None:
    rows = COMPLETE[:missing] + COMPLETE[missing + 1 :]
    with pytest.raises(StoryBroken, match="audit log"):
        ending._require_decisions(rows)
