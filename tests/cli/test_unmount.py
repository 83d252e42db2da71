"""``cai unmount``: what it takes away, and what it leaves alone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cai.mount import Kind, device, mount, system
from tests.mount.fake_tree import FakeTree


@pytest.fixture
def point(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "mnt"
    folder.mkdir()
    yield folder
    while device.ours(system.mounted_at(folder)):
        system.unmount(folder, system.MNT_DETACH)


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cai", "unmount", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def kinds() -> list[Kind]:
    usable = [Kind.FUSE] if device.why_unusable() is None else []
    return [*usable, Kind.TMPFS] if system.is_administrator() else usable


@pytest.mark.parametrize("where", ["mnt", "missing", "file"])
def test_nothing_is_mounted(tmp_path: Path, point: Path, where: str) -> None:
    (tmp_path / "file").touch()
    done = run(tmp_path / where)
    assert done.returncode == 3
    assert "no model is mounted" in done.stderr
    assert "hint:" in done.stderr


def test_foreign_mounts_are_left_alone() -> None:
    done = run("/proc", "--force", "--json")
    assert done.returncode == 3
    assert json.loads(done.stdout)["error"]["code"] == "input-missing"
    assert Path("/proc/self").exists()


@pytest.mark.skipif(not kinds(), reason="neither FUSE nor tmpfs can be mounted here")
@pytest.mark.parametrize("kind", kinds())
def test_in_use_needs_force(point: Path, kind: Kind) -> None:
    mounted = mount(FakeTree({"one": b"x"}), point, kind=kind)
    with (point / "one").open("rb") as file:
        done = run(point)
        assert done.returncode == 4
        assert "--force" in done.stderr
        assert (point / "one").read_bytes() == file.read() == b"x"
        done = run(point, "--force", "--json")
        assert json.loads(done.stdout) == {"mount_point": str(point), "kind": kind.value}
    assert done.returncode == 0
    assert not list(point.iterdir())
    assert mounted.wait(10)
