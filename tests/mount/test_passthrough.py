"""FUSE pass-through over an in-memory tree: whole files verified on open, read by the kernel."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cai.errors import StorageError, Tampered
from cai.mount import Kind, choose, device, fuse, memory, mount, place, system, vault
from cai.mount.fuse import FuseMount
from cai.mount.index import Owner, TreeIndex
from cai.mount.vault import Vault
from tests.mount.fake_tree import CHUNK, FakeTree
from tests.mount.test_fuse import CONTENT, eventually, fails, write_out

pytestmark = pytest.mark.fuse

BIG = os.urandom(5 * 1024 * 1024 + 77)
TREE = {**CONTENT, "big.safetensors": BIG, "second": BIG[::-1]}


@pytest.fixture
def point(fuse_point: Path) -> Path:
    """A mount point on a machine with pass-through."""
    obstacle = device.why_no_passthrough()
    if obstacle is None:
        with mount(FakeTree({}), fuse_point, kind="fuse"):
            pass  # FUSE itself works, so a refusal below is of pass-through
        try:
            with mount(FakeTree({}), fuse_point, kind="passthrough"):
                pass
        except StorageError as error:
            obstacle = error.message
    if obstacle:
        pytest.skip(obstacle)
    return fuse_point


def test_the_tree_is_the_same(point: Path, tmp_path: Path) -> None:
    tree = FakeTree(TREE)
    plain = tmp_path / "plain"
    plain.mkdir()
    write_out(tree, plain)
    with mount(tree, point, kind="passthrough") as mounted:
        assert mounted.kind is Kind.PASSTHROUGH
        for _again in range(2):
            compared = subprocess.run(
                ["diff", "-r", "--no-dereference", plain, point], capture_output=True
            )
            assert (compared.returncode, compared.stdout) == (0, b"")
        assert subprocess.check_output([point / "run.sh"]) == b"ran\n"
    assert not list(point.iterdir())


def test_mmap_and_random_reads(point: Path) -> None:
    with (
        mount(FakeTree(TREE), point, kind="passthrough"),
        (point / "big.safetensors").open("rb", buffering=0) as file,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view,
    ):
        assert view[:] == BIG
        for offset in (0, 1, CHUNK - 1, 5 * CHUNK + 77, len(BIG) - 5, len(BIG)):
            assert os.pread(file.fileno(), 9000, offset) == BIG[offset : offset + 9000]


def test_the_kernel_reads_by_itself(point: Path) -> None:
    """With the server stopped, what is open can still be read."""
    mounted = mount(FakeTree(TREE), point, kind="passthrough")
    assert isinstance(mounted, FuseMount)
    with mounted, (point / "big.safetensors").open("rb", buffering=0) as file:
        os.kill(mounted.pids[0], signal.SIGSTOP)
        try:
            assert os.pread(file.fileno(), len(BIG), 0) == BIG
        finally:
            os.kill(mounted.pids[0], signal.SIGCONT)


def test_one_bad_chunk_and_the_file_cannot_be_opened(point: Path) -> None:
    tree = FakeTree(TREE)
    tree.bad.add(("big.safetensors", len(BIG) // CHUNK))
    with mount(tree, point, kind="passthrough"):
        for _again in range(2):
            with fails(errno.EIO):
                (point / "big.safetensors").open("rb")
        assert (point / "second").read_bytes() == BIG[::-1]
        assert (point / "one").read_bytes() == b"x"


def test_an_object_that_is_gone_is_an_io_error(point: Path) -> None:
    tree = FakeTree(TREE)
    tree.gone |= {"big.safetensors", "one"}
    with mount(tree, point, kind="passthrough"):
        for name in ("big.safetensors", "one"):
            with fails(errno.EIO):
                (point / name).read_bytes()


def test_many_readers_at_once_decrypt_a_file_once(point: Path) -> None:
    tree = FakeTree(TREE)
    with mount(tree, point, kind="passthrough"), ThreadPoolExecutor(24) as pool:
        names = ["big.safetensors", "second"] * 12
        found = list(pool.map(lambda name: (point / name).read_bytes(), names))
    assert found == [BIG, BIG[::-1]] * 12


def test_nothing_can_be_changed(point: Path) -> None:
    with mount(FakeTree(TREE), point, kind="passthrough"):
        for change in (
            lambda: (point / "big.safetensors").write_bytes(b"y"),
            lambda: (point / "new").touch(),
            lambda: (point / "one").unlink(),
        ):
            with fails(errno.EROFS):
                change()


def test_without_memory_reads_come_to_the_server(
    point: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available", lambda: memory.RESERVE + len(BIG) - 1)
    tree = FakeTree(TREE)
    tree.bad.add(("second", 3))
    with mount(tree, point, kind="passthrough"):
        assert (point / "big.safetensors").read_bytes() == BIG
        with (point / "second").open("rb", buffering=0) as file:
            assert os.pread(file.fileno(), 4096, 0) == BIG[::-1][:4096]
            with fails(errno.EIO):
                os.pread(file.fileno(), 4096, 3 * CHUNK)


def test_a_lost_server_ends_the_mount(point: Path) -> None:
    mounted = mount(FakeTree(TREE), point, kind="passthrough")
    assert isinstance(mounted, FuseMount)
    os.kill(mounted.pids[0], signal.SIGKILL)
    with pytest.raises(StorageError, match="killed or failed"):
        mounted.wait(10)
    assert system.mounted_at(place.resolve(point)) is None


def test_the_memory_goes_with_the_mount(point: Path) -> None:
    large = bytes(64 * 1024 * 1024)
    before = shared_memory()
    with mount(FakeTree({"zeros": large}), point, kind="passthrough"):
        assert (point / "zeros").read_bytes() == large
        assert shared_memory() - before > len(large) // 2
    assert eventually(lambda: shared_memory() - before < len(large) // 2)


def shared_memory() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Shmem:"))


# --- the vault, without a kernel ---------------------------------------------------------------


@pytest.fixture
def backings(monkeypatch: pytest.MonkeyPatch) -> dict[int, bytes]:
    """What the kernel would read from, by its number."""
    held: dict[int, bytes] = {}

    def back(_device: int, plain: int) -> int:
        number = len(held) + 100
        held[number] = os.pread(plain, 1 << 30, 0)
        return number

    monkeypatch.setattr(vault, "back", back)
    monkeypatch.setattr(vault, "unback", lambda _device, number: held.pop(number))
    return held


class Folder:
    """A directory on disk in place of the memory."""

    refused = ("huge",)

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)

    def close(self) -> None:
        os.close(self.descriptor)


def opened(tree: FakeTree, tmp_path: Path) -> tuple[Vault, TreeIndex]:
    folder: object = Folder(tmp_path)
    return Vault(tree, -1, folder), TreeIndex(tree, Owner.current())  # type: ignore[arg-type]


def node(index: TreeIndex, path: str):  # type: ignore[no-untyped-def]
    return next(node for node in index.nodes if node.path == path)


def test_a_file_is_decrypted_once_and_kept(tmp_path: Path, backings: dict[int, bytes]) -> None:
    tree = FakeTree({"a": BIG})
    held, index = opened(tree, tmp_path)
    first, number = held.open(node(index, "a"))
    held.release(first)
    second, again = held.open(node(index, "a"))
    assert number == again == 100
    assert first != second
    assert backings == {100: BIG}
    assert len(tree.readers) == 1
    held.release(99999)
    held.close()


def test_idle_files_make_room_and_open_ones_do_not(
    tmp_path: Path, backings: dict[int, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = FakeTree({"a": BIG, "b": BIG, "c": BIG})
    held, index = opened(tree, tmp_path)
    monkeypatch.setattr(memory, "fits", lambda _size: len(backings) < 2)
    first, _number = held.open(node(index, "a"))
    _second, _number = held.open(node(index, "b"))
    assert held.open(node(index, "c"))[1] is None  # both are open
    held.release(first)
    assert held.open(node(index, "c"))[1] is None  # one handle reads here, so must the others
    assert held.open(node(index, "b"))[1] is not None
    handle, none = held.open(node(index, "a"))
    assert none is not None
    held.release(handle)
    tree.bad.add(("c", 0))
    assert held.open(node(index, "c"))[1] is None
    held.close()


def test_the_way_of_an_inode_changes_only_when_nobody_has_it_open(
    tmp_path: Path, backings: dict[int, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    held, index = opened(FakeTree({"a": BIG}), tmp_path)
    monkeypatch.setattr(memory, "fits", lambda _size: False)
    first, none = held.open(node(index, "a"))
    assert none is None
    monkeypatch.setattr(memory, "fits", lambda _size: True)
    second, none = held.open(node(index, "a"))
    assert none is None
    held.release(first)
    held.release(second)
    assert held.open(node(index, "a"))[1] is not None
    assert list(backings.values()) == [BIG]
    held.close()


def test_what_fails_is_not_kept(tmp_path: Path, backings: dict[int, bytes]) -> None:
    tree = FakeTree({"a": BIG})
    held, index = opened(tree, tmp_path)
    tree.bad.add(("a", 1))
    with pytest.raises(Tampered):
        held.open(node(index, "a"))
    assert not backings
    tree.bad.clear()
    assert held.open(node(index, "a"))[1] is not None
    held.close()


# --- which kind --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("obstacle", "room", "root", "expected", "says"),
    [
        (None, 1 << 40, True, Kind.PASSTHROUGH, "passes reads through"),
        ("needs Linux 6.9", 1 << 40, True, Kind.TMPFS, "needs Linux 6.9"),
        (None, 1, True, Kind.FUSE, "does not hold"),
        (None, 1 << 40, False, Kind.FUSE, "root"),
    ],
)
def test_the_choice_by_memory_and_kernel(
    monkeypatch: pytest.MonkeyPatch, obstacle: str | None, room: int, root: bool,
    expected: Kind, says: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(device, "why_unusable", lambda: None)
    monkeypatch.setattr(device, "why_no_passthrough", lambda: obstacle)
    monkeypatch.setattr(memory, "available", lambda: room)
    monkeypatch.setattr(system, "is_administrator", lambda: root)
    kind, reason = choose("auto", FakeTree(TREE))
    assert kind is expected
    assert says in reason


def test_a_kernel_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "is_administrator", lambda: True)
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "h", "6.8.12", "", "")))
    assert "6.8.12" in (device.why_no_passthrough() or "")
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "h", "6.12.0-x", "", "")))
    assert device.why_no_passthrough() is None


def test_a_kernel_that_does_not_offer_it(fuse_point: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "why_no_passthrough", lambda: None)
    monkeypatch.setattr(fuse.protocol, "offers_passthrough", lambda _request: False)
    with pytest.raises(StorageError, match="no FUSE pass-through"):
        mount(FakeTree(TREE), fuse_point, kind="passthrough")
    assert system.mounted_at(place.resolve(fuse_point)) is None
    if system.is_administrator():
        with mount(FakeTree(TREE), fuse_point, kind="auto") as mounted:
            assert mounted.kind is Kind.FUSE
            assert "no FUSE pass-through" in mounted.reason
            assert (fuse_point / "big.safetensors").read_bytes() == BIG
