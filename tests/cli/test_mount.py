"""``cai mount``: refusals with their exit status, foreground, background, signals."""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cai.model import new_key, seal, write_key_file
from cai.mount import device, place, system

OBSTACLE = device.why_unusable()
fuse = [
    pytest.mark.fuse,
    pytest.mark.skipif(OBSTACLE is not None, reason=f"FUSE cannot be used here: {OBSTACLE}"),
]
administrator = pytest.mark.skipif(
    not system.is_administrator(), reason="mounting a tmpfs needs CAP_SYS_ADMIN"
)
passes = pytest.mark.skipif(
    device.why_no_passthrough() is not None, reason=f"{device.why_no_passthrough()}"
)
KINDS = [pytest.param("fuse", marks=fuse), pytest.param("tmpfs", marks=administrator)]
KINDS.append(pytest.param("passthrough", marks=[*fuse, passes]))
BIG = os.urandom(500_000)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A sealed model ``sealed``, its key ``key``, an empty ``mnt``."""
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "small").write_text("small")
    (tmp_path / "plain" / "big").write_bytes(BIG)
    (tmp_path / "mnt").mkdir()
    key = new_key()
    write_key_file(tmp_path / "key", key)
    seal(tmp_path / "plain", tmp_path / "sealed", key)
    yield tmp_path
    while device.ours(system.mounted_at(tmp_path / "mnt")):
        system.unmount(tmp_path / "mnt", system.MNT_DETACH)


def command(folder: Path, *options: str, point: str = "mnt", key: str = "key") -> list[str]:
    program = [sys.executable, "-m", "cai", "mount", str(folder / "sealed"), str(folder / point)]
    return [*program, "--key-file", str(folder / key), *options]


def run(
    folder: Path, *options: str, point: str = "mnt", key: str = "key"
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(folder, *options, point=point, key=key),
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def is_mounted(folder: Path) -> bool:
    return system.mounted_at(place.resolve(folder / "mnt")) is not None


def eventually(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 10
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def absent(_folder: Path) -> None:
    """Leaves the folder as it is."""


def wrong_key(folder: Path) -> None:
    (folder / "key").write_text(new_key().reveal().hex())


def no_key_at_all(folder: Path) -> None:
    (folder / "key").write_text("password\n")


def no_model(folder: Path) -> None:
    (folder / "sealed").rename(folder / "elsewhere")


def model_is_a_file(folder: Path) -> None:
    no_model(folder)
    (folder / "sealed").touch()


def manifest_changed(folder: Path) -> None:
    path = folder / "sealed" / "manifest.cai"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize(
    ("spoil", "point", "status", "says"),
    [
        (absent, "missing", 3, "does not exist"),
        (absent, "key", 3, "not a directory"),
        (absent, "plain", 2, "not empty"),
        (wrong_key, "mnt", 5, "key"),
        (no_key_at_all, "mnt", 3, "hex"),
        (no_model, "mnt", 3, "does not exist"),
        (model_is_a_file, "mnt", 3, "sealed"),
        (manifest_changed, "mnt", 6, "manifest.cai"),
    ],
)
def test_refusals(
    folder: Path, spoil: Callable[[Path], None], point: str, status: int, says: str,
    *, background: bool,
) -> None:  # fmt: skip
    spoil(folder)
    done = run(folder, *([] if background else ["--foreground"]), point=point)
    assert done.returncode == status, done.stderr
    assert says in done.stderr
    assert "hint:" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not (folder / "missing").exists()
    assert not is_mounted(folder)


@pytest.mark.parametrize(
    ("options", "status"),
    [
        (["--kind", "nfs"], 2),
        (["--expect-root", "00"], 2),
        (["--expect-root", "é" * 64], 2),
        (["--expect-root", "0" * 64], 6),
        (["--uid", "-1"], 2),
        (["--log-file", "/nowhere/log", "--kind", "fuse"], 3),
    ],
)
def test_options_that_will_not_do(folder: Path, options: list[str], status: int) -> None:
    if "fuse" in options and OBSTACLE:
        pytest.skip(OBSTACLE)
    done = run(folder, *options, "--json")
    assert done.returncode == status, done.stderr
    assert json.loads(done.stdout)["error"]["message"]
    assert not is_mounted(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_background(folder: Path, kind: str) -> None:
    # The output is a pipe: it must end with the command, not with the mount.
    done = run(folder, "--kind", kind)
    assert done.returncode == 0, done.stderr
    assert f"by {kind}" in done.stdout
    assert (folder / "mnt" / "big").read_bytes() == BIG
    again = run(folder, "--kind", kind)
    assert again.returncode == 2
    assert "already" in again.stderr
    assert (folder / "mnt" / "small").read_text() == "small"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_foreground_ends_with_a_signal(
    folder: Path, kind: str, number: signal.Signals, status: int
) -> None:
    with subprocess.Popen(
        command(folder, "--kind", kind, "--foreground", "--json"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        facts = json.loads(process.stdout.readline())
        assert facts["kind"] == kind
        assert facts["pid"] == process.pid
        assert (folder / "mnt" / "big").read_bytes() == BIG
        process.send_signal(number)
        assert process.wait(20) == status
    assert not is_mounted(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_foreground_ends_when_another_unmounts(folder: Path, kind: str) -> None:
    with subprocess.Popen(
        command(folder, "--kind", kind, "--foreground", "--json"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        process.stdout.readline()
        system.unmount(folder / "mnt")
        assert process.wait(20) == 0


@pytest.mark.parametrize("background", [True, False])
def test_the_choice_is_told_with_its_reason(folder: Path, *, background: bool) -> None:
    if OBSTACLE and not system.is_administrator():
        pytest.skip(OBSTACLE)
    done = subprocess.Popen(
        command(folder, "--json", *([] if background else ["--foreground"])),
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with done:
        assert done.stdout is not None
        facts = json.loads(done.stdout.readline())
        assert facts["kind"] in ("fuse", "passthrough", "tmpfs")
        assert facts["reason"]
        assert (folder / "mnt" / "big").read_bytes() == BIG
        done.terminate()


@pytest.mark.parametrize("kind", [KINDS[0]])
def test_sigterm_unmounts_in_the_background_too(folder: Path, kind: str) -> None:
    pid = json.loads(run(folder, "--kind", kind, "--json").stdout)["pid"]
    handle = os.pidfd_open(pid)
    os.kill(pid, signal.SIGTERM)
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    assert poll.poll(20_000)
    os.close(handle)
    assert not is_mounted(folder)


@pytest.mark.parametrize("kind", [KINDS[0]])
def test_damage_is_logged_with_file_and_chunk(folder: Path, kind: str) -> None:
    log = folder / "log"
    assert run(folder, "--kind", kind, "--log-file", str(log)).returncode == 0
    stored = next((folder / "sealed" / "objects").iterdir())
    data = bytearray(stored.read_bytes())
    data[-1] ^= 1
    stored.write_bytes(data)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        (folder / "mnt" / "big").read_bytes()
    assert "ERROR: big: chunk 1 does not authenticate" in log.read_text()
    assert (folder / "key").read_text().strip() not in log.read_text()


@pytest.mark.parametrize("kind", [KINDS[0]])
def test_the_key_may_come_through_a_pipe(folder: Path, kind: str) -> None:
    reading, writing = os.pipe()
    os.write(writing, (folder / "key").read_bytes())
    os.close(writing)
    arguments = command(folder, "--kind", kind)
    arguments[arguments.index("--key-file") + 1] = f"/dev/fd/{reading}"
    done = subprocess.run(arguments, pass_fds=(reading,), capture_output=True, timeout=60)
    os.close(reading)
    assert done.returncode == 0
    assert (folder / "mnt" / "small").read_text() == "small"


@pytest.mark.parametrize("kind", [KINDS[0]])
def test_relative_paths(folder: Path, kind: str) -> None:
    arguments = [sys.executable, "-m", "cai", "mount", "sealed", "mnt", "--key-file", "key"]
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [*arguments, "--kind", kind], cwd=folder, env={**os.environ, "PYTHONPATH": root},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (folder / "mnt" / "big").read_bytes() == BIG
