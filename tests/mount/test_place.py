"""Mount points that will not do, choosing a kind, and what cannot be unmounted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cai.errors import CaiError, InputError, InputMissing, StorageError, UsageError
from cai.mount import Kind, choose, device, mount, place, system, unmount
from tests.mount.fake_tree import FakeTree

TREE = FakeTree({"one": b"x"})


def refusal(point: Path) -> CaiError:
    with pytest.raises(CaiError) as caught:
        place.prepare(point)
    assert caught.value.hint
    return caught.value


def test_a_missing_mount_point(tmp_path: Path) -> None:
    error = refusal(tmp_path / "absent")
    assert isinstance(error, InputMissing)
    assert error.exit_status == 3
    assert not (tmp_path / "absent").exists()


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert type(refusal(tmp_path / "file")) is InputError
    assert type(refusal(tmp_path / "file" / "below")) is InputError


def test_a_directory_that_is_not_empty(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    error = refusal(tmp_path)
    assert type(error) is UsageError
    assert "not empty" in error.message


def test_a_loop_of_symlinks(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert type(refusal(tmp_path / "loop")) is InputError


def test_no_path_at_all() -> None:
    with pytest.raises(InputError):
        place.prepare(Path("a\0b"))


def test_a_symlink_to_a_directory_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert place.prepare(tmp_path / "link") == place.resolve(tmp_path / "real")


def test_only_our_mounts_are_unmounted(tmp_path: Path) -> None:
    for foreign in (tmp_path, Path("/proc"), Path("/")):
        with pytest.raises(InputMissing, match="no model"):
            unmount(foreign)


def test_names_in_the_list_of_mounts_are_unescaped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    raw = rb"36 35 0:42 / /a\040b\134c rw,nosuid shared:1 - fuse.cai cai\011x rw,user_id=0"
    monkeypatch.setattr(Path, "read_bytes", lambda _path: raw)
    assert system.mounts() == [
        system.MountInfo("0:42", Path("/a b\\c"), "fuse.cai", "cai\tx")
    ]


def test_unknown_kind() -> None:
    with pytest.raises(UsageError, match="nfs"):
        choose("nfs")


def test_auto_takes_fuse_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "why_unusable", lambda: None)
    assert choose()[0] is Kind.FUSE


def test_auto_says_why_it_takes_tmpfs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "why_unusable", lambda: "no /dev/fuse")
    monkeypatch.setattr(system, "is_administrator", lambda: True)
    kind, reason = choose("auto")
    assert kind is Kind.TMPFS
    assert "no /dev/fuse" in reason


@pytest.mark.parametrize("kind", ["auto", "tmpfs"])
def test_neither_is_possible(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(device, "why_unusable", lambda: "no /dev/fuse")
    monkeypatch.setattr(system, "is_administrator", lambda: False)
    with pytest.raises(StorageError, match="root only"):
        choose(kind)


def test_fuse_that_was_asked_for_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "why_unusable", lambda: "no /dev/fuse")
    with pytest.raises(StorageError, match="no /dev/fuse"):
        choose("fuse")


def test_without_the_right_to_mount_fusermount_is_needed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(device, "DEVICE", tmp_path / "fuse")
    assert "fuse" in (device.why_unusable() or "")
    (tmp_path / "fuse").touch()
    monkeypatch.setattr(system, "is_administrator", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "fusermount3" in (device.why_unusable() or "")
    (tmp_path / "fusermount3").write_text("#!/bin/sh\n")
    (tmp_path / "fusermount3").chmod(0o755)
    assert device.why_unusable() is None


@pytest.mark.parametrize("workers", [0, -1, 65])
def test_workers_out_of_range(tmp_path: Path, workers: int) -> None:
    with pytest.raises(UsageError, match="workers"):
        mount(TREE, tmp_path, workers=workers)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs the right to mount a tmpfs")
def test_auto_falls_back_when_the_kernel_refuses_fuse(
    monkeypatch: pytest.MonkeyPatch, tmpfs_point: Path
) -> None:
    def refuse(*_arguments: object) -> int:
        raise device._refused("mount: not permitted")

    monkeypatch.setattr(device, "why_unusable", lambda: None)
    monkeypatch.setattr(device, "attach", refuse)
    with mount(TREE, tmpfs_point) as mounted:
        assert mounted.kind is Kind.TMPFS
        assert "not permitted" in mounted.reason
    with pytest.raises(StorageError, match="not permitted"):
        mount(TREE, tmpfs_point, kind="fuse")


FUSERMOUNT = """#!/usr/bin/env python3
# A stand-in that keeps the protocol of fusermount3: the device goes back over _FUSE_COMMFD.
import array, os, socket, sys
open(sys.argv[0] + ".args", "w").write(repr(sys.argv[1:]))
if "-u" in sys.argv:
    sys.exit("fusermount3: %s")
sock = socket.socket(fileno=int(os.environ["_FUSE_COMMFD"]))
fd = os.open("/dev/null", os.O_RDWR)
if %d:
    sock.sendmsg([b"\\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])
sock.detach()
"""


def fake_fusermount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, send: int) -> Path:
    program = tmp_path / "fusermount3"
    program.write_text(FUSERMOUNT % (says, send))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(system, "is_administrator", lambda: False)
    return program


def test_fusermount_gives_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = fake_fusermount(tmp_path, monkeypatch, "", 1)
    descriptor = device.attach(Path("/mnt/x"), device.Access(1, 1, everybody=True))
    assert Path(f"/proc/self/fd/{descriptor}").readlink() == Path("/dev/null")
    assert not os.get_inheritable(descriptor)
    os.close(descriptor)
    said = Path(f"{program}.args").read_text()
    for word in ("ro,nosuid,nodev,default_permissions", "subtype=cai", "allow_other", "/mnt/x"):
        assert word in said


def test_fusermount_that_gives_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_fusermount(tmp_path, monkeypatch, "", 0)
    with pytest.raises(StorageError, match="gave no device"):
        device.attach(Path("/mnt/x"), device.Access(1, 1, everybody=False))


@pytest.mark.parametrize(
    ("says", "message"), [("device or resource busy", "in use"), ("not found", "not found")]
)
def test_fusermount_that_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, message: str
) -> None:
    fake_fusermount(tmp_path, monkeypatch, says, 0)
    with pytest.raises(StorageError, match=message):
        device.detach(Path("/mnt/x"))
