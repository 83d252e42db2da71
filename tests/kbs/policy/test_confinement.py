"""A policy process cannot reach other files, the network or other processes."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kbs.policy.confinement import REFUSED_CALLS, filter_program
from kbs.policy.pool import RegoPool

TRY = """
import json, os, socket, sys, subprocess, ctypes
from pathlib import Path
from kbs.policy.confinement import confine
kept, scratch, other = map(Path, sys.argv[1:4])
def tried(what):
    try:
        what()
    except (OSError, subprocess.SubprocessError) as error:
        return getattr(error, "errno", 0) or -1
    return 0
taken = confine([kept], scratch)
print(json.dumps({
    "taken": taken,
    "read kept": tried(lambda: (kept / "file").read_bytes()),
    "write kept": tried(lambda: (kept / "new").write_bytes(b"x")),
    "read other": tried(lambda: (other / "file").read_bytes()),
    "list other": tried(lambda: os.listdir(other)),
    "climb": tried(lambda: (scratch / ".." / other.name / "file").read_bytes()),
    "write scratch": tried(lambda: (scratch / "new").write_bytes(b"x")),
    "remove scratch": tried(lambda: (scratch / "new").unlink()),
    "link": tried(lambda: os.link(kept / "file", scratch / "link")),
    "socket": tried(lambda: socket.socket()),
    "pair": tried(lambda: socket.socketpair()),
    "fork": tried(lambda: os.fork()),
    "program": tried(lambda: os.execv("/bin/true", ["true"])),
    "child": tried(lambda: subprocess.run(["/bin/true"], check=True)),
    "kill": tried(lambda: os.kill(os.getppid(), 0)),
}), flush=True)
"""


@pytest.fixture
def attempts(tmp_path: Path) -> dict[str, Any]:
    for name in ("kept", "scratch", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("planted-8d1e")
    done = subprocess.run(
        [sys.executable, "-c", TRY, *(str(tmp_path / name) for name in
                                      ("kept", "scratch", "other"))],
        capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )  # fmt: skip
    assert done.stdout, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_files(attempts: dict[str, Any]) -> None:
    if "landlock" not in attempts["taken"]:
        pytest.skip("this kernel has no Landlock")
    for name in ("read kept", "write scratch", "remove scratch"):
        assert attempts[name] == 0, name
    for name in ("write kept", "read other", "list other", "climb", "link"):
        assert attempts[name] != 0, name


def test_network_and_processes(attempts: dict[str, Any]) -> None:
    if "seccomp" not in attempts["taken"]:
        pytest.skip("this kernel takes no filter")
    for name in ("socket", "pair", "fork", "program", "child", "kill"):
        assert attempts[name] != 0, name


def run_filter(program: bytes, number: int, architecture: int) -> int:
    """What the kernel's interpreter would return."""
    statements = list(struct.iter_unpack("<HBBI", program))
    data, accumulator, at = {0: number, 4: architecture}, 0, 0
    while True:
        code, on_true, on_false, value = statements[at]
        at += 1
        if code == 0x20:
            accumulator = data[value]
        elif code == 0x15:
            at += on_true if accumulator == value else on_false
        elif code == 0x35:
            at += on_true if accumulator >= value else on_false
        else:
            assert code == 0x06
            return int(value)


@pytest.mark.parametrize(
    ("machine", "place", "architecture"),
    [("x86_64", 0, 0xC000003E), ("aarch64", 1, 0xC00000B7)],
)
def test_the_filter_refuses_exactly_its_calls(
    machine: str, place: int, architecture: int
) -> None:
    program = filter_program(machine)
    refused = {pair[place] for pair in REFUSED_CALLS.values()} - {0}
    for number in range(600):
        answer = run_filter(program, number, architecture)
        assert answer == (0x00050001 if number in refused else 0x7FFF0000), number
    assert run_filter(program, 1, 0x40000003) == 0x80000000
    assert run_filter(program, 0x40000001, architecture) == 0x80000000


def test_an_unknown_machine_has_no_filter() -> None:
    assert filter_program("m68k") == b""


def test_the_pool_leaves_no_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    pool = RegoPool()
    assert pool.inspect("package policy\n\ndefault allow := false\n").problem == ""
    scratch = list(tmp_path.iterdir())
    assert len(scratch) == 1
    assert list(scratch[0].iterdir()) == []
    pool.close()
    assert list(tmp_path.iterdir()) == []


def test_processes_of_the_pool_are_confined(attempts: dict[str, Any]) -> None:
    if "seccomp" not in attempts["taken"]:
        pytest.skip("this kernel takes no filter")
    pool = RegoPool()
    try:
        pool.inspect("package policy\n")
        status = Path(f"/proc/{pool._idle[0]._process.pid}/status").read_text()
    finally:
        pool.close()
    told = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert (told["Seccomp"], told["NoNewPrivs"]) == ("2", "1")
