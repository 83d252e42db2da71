"""Materialisation into a real tmpfs."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
from pathlib import Path

import pytest

from cai.errors import NoSpace, StorageError, Tampered, UsageError
from cai.mount import Kind, memory, mount, place, pour, system, unmount
from tests.mount.fake_tree import FakeTree
from tests.mount.test_fuse import CONTENT, fails, write_out

BIG = os.urandom(2 * pour.PIECE + 4097)
TREE = {**CONTENT, "bigger": BIG}


def test_the_tree_is_the_same_and_stays(tmpfs_point: Path, tmp_path: Path) -> None:
    tree = FakeTree(TREE)
    plain = tmp_path / "plain"
    plain.mkdir()
    write_out(tree, plain)
    done: list[int] = []
    mounted = mount(tree, tmpfs_point, kind="tmpfs", progress=done.append)
    assert mounted.kind is Kind.TMPFS
    assert sum(done) == sum(len(value) for value in TREE.values() if isinstance(value, bytes))
    assert all(reader.closed for reader in tree.readers)
    compared = subprocess.run(
        ["diff", "-r", "--no-dereference", plain, tmpfs_point], capture_output=True
    )
    assert (compared.returncode, compared.stdout) == (0, b"")
    assert not mounted.wait(0.01)
    mounted.unmount()
    assert mounted.wait(0)
    assert not list(tmpfs_point.iterdir())
    mounted.unmount()


def test_nothing_can_be_changed(tmpfs_point: Path) -> None:
    with mount(FakeTree(TREE), tmpfs_point, kind="tmpfs"):
        with fails(errno.EROFS):
            (tmpfs_point / "one").write_bytes(b"y")
        with fails(errno.EROFS):
            (tmpfs_point / "new").touch()
        assert (tmpfs_point / "run.sh").stat().st_mode & 0o777 == 0o555
        assert tmpfs_point.stat().st_mode & 0o777 == 0o500


def test_tampering_shows_nothing(tmpfs_point: Path) -> None:
    tree = FakeTree(TREE)
    tree.bad.add(("bigger", len(BIG) // 65536))
    with pytest.raises(Tampered):
        mount(tree, tmpfs_point, kind="tmpfs")
    assert system.mounted_at(place.resolve(tmpfs_point)) is None
    assert all(reader.closed for reader in tree.readers)


def test_a_short_file_shows_nothing(tmpfs_point: Path) -> None:
    tree = FakeTree({"one": b"x"})
    tree.content = {"one": b""}
    with pytest.raises(Tampered, match="shorter"):
        mount(tree, tmpfs_point, kind="tmpfs")
    assert system.mounted_at(place.resolve(tmpfs_point)) is None


def test_nothing_is_visible_while_it_is_filled(tmpfs_point: Path) -> None:
    seen: list[bool] = []

    def look(_amount: int) -> None:
        seen.append(system.mounted_at(place.resolve(tmpfs_point)) is not None)

    with mount(FakeTree(TREE), tmpfs_point, kind="tmpfs", progress=look):
        assert seen
        assert not any(seen)


def test_an_interruption_leaves_nothing(tmpfs_point: Path) -> None:
    def interrupt(_amount: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mount(FakeTree(TREE), tmpfs_point, kind="tmpfs", progress=interrupt)
    assert system.mounted_at(place.resolve(tmpfs_point)) is None


def test_too_little_memory_is_said_first(
    tmpfs_point: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = FakeTree(TREE)
    monkeypatch.setattr(memory, "available", lambda: memory.RESERVE + len(BIG))
    with pytest.raises(NoSpace, match="MiB of memory") as caught:
        mount(tree, tmpfs_point, kind="tmpfs")
    assert "--kind fuse" in (caught.value.hint or "")
    assert not tree.readers


def test_a_full_tmpfs_is_no_space(tmpfs_point: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "INODE_COST", -4000)
    with pytest.raises(NoSpace):
        mount(FakeTree(TREE), tmpfs_point, kind="tmpfs")
    assert system.mounted_at(place.resolve(tmpfs_point)) is None


def test_swap_that_cannot_be_kept_out_is_refused(
    tmpfs_point: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure = system._configure

    def without_noswap(context: int, name: str, value: str | None) -> None:
        if name == "noswap":
            raise OSError(errno.EINVAL, "unknown parameter")
        configure(context, name, value)

    monkeypatch.setattr(system, "_configure", without_noswap)
    monkeypatch.setattr(memory, "swap_is_on", lambda: True)
    with pytest.raises(StorageError, match="swap"):
        mount(FakeTree(TREE), tmpfs_point, kind="tmpfs")
    monkeypatch.setattr(memory, "swap_is_on", lambda: False)
    with mount(FakeTree(TREE), tmpfs_point, kind="tmpfs"):
        assert (tmpfs_point / "one").read_bytes() == b"x"


def test_noswap_where_the_kernel_has_it(tmpfs_point: Path) -> None:
    with mount(FakeTree(TREE), tmpfs_point, kind="tmpfs"):
        line = next(
            line for line in Path("/proc/self/mountinfo").read_text().splitlines()
            if "cai-model" in line
        )  # fmt: skip
        for option in ("ro", "nosuid", "nodev"):
            assert option in line.split(" ")[5].split(",")
        release = tuple(int(part) for part in os.uname().release.split(".")[:2])
        if release >= (6, 4):
            assert "noswap" in line


def test_wait_ends_when_another_unmounts(tmpfs_point: Path) -> None:
    mounted = mount(FakeTree(TREE), tmpfs_point, kind="tmpfs")
    ended: list[bool] = []
    waiting = threading.Thread(target=lambda: ended.append(mounted.wait(20)))
    waiting.start()
    assert unmount(tmpfs_point) is Kind.TMPFS
    waiting.join(20)
    assert ended == [True]


def test_mounting_twice_is_refused(tmpfs_point: Path) -> None:
    with (
        mount(FakeTree(TREE), tmpfs_point, kind="tmpfs"),
        pytest.raises(UsageError, match="already"),
    ):
        mount(FakeTree(TREE), tmpfs_point, kind="tmpfs")


def test_an_open_file_does_not_keep_it_mounted(tmpfs_point: Path) -> None:
    mounted = mount(FakeTree(TREE), tmpfs_point, kind="tmpfs")
    with (tmpfs_point / "one").open("rb"):
        mounted.unmount()
        assert not list(tmpfs_point.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_another_owner(tmpfs_point: Path) -> None:
    with mount(FakeTree(TREE), tmpfs_point, kind="tmpfs", uid=65534):
        for path in (tmpfs_point, tmpfs_point / "a", tmpfs_point / "a/b/big"):
            assert path.stat().st_uid == 65534
        assert (tmpfs_point / "a/link").lstat().st_uid == 65534
        assert tmpfs_point.stat().st_mode & 0o777 == 0o500


def test_available_memory_is_plausible() -> None:
    available = memory.available()
    assert available is not None
    assert 1 << 20 < available < 1 << 50
