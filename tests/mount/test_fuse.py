"""Real FUSE mounts over an in-memory tree."""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cai.errors import StorageError, UsageError
from cai.mount import Kind, device, fuse, mount, place, system, unmount
from cai.mount.fuse import FuseMount
from tests.mount.fake_tree import CHUNK, FakeTree

pytestmark = pytest.mark.fuse

BIG = os.urandom(3 * 1024 * 1024 + 11)
CONTENT = {
    "a": None, "a/b": None, "a/b/big": BIG, "a/link": "-> b/big", "empty": b"", "one": b"x",
    "ünï çødé 模型": b"names", "run.sh": b"#!/bin/sh\necho ran\n", "void": None,
    **{f"many/{n:04}": str(n).encode() for n in range(1500)},
}  # fmt: skip
CONTENT = {"many": None, **CONTENT}


def running(pid: int) -> bool:
    """Whether a process lives; one that ended but was not reaped does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@contextlib.contextmanager
def fails(number: int) -> Iterator[None]:
    """The block ends with this error of the system."""
    with pytest.raises(OSError, match=re.escape(os.strerror(number))) as caught:
        yield
    assert caught.value.errno == number


def eventually(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 10
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def write_out(tree: FakeTree, target: Path) -> None:
    for path, value in tree.content.items():
        if value is None:
            (target / path).mkdir()
        elif isinstance(value, str):
            (target / path).symlink_to(value.removeprefix("-> "))
        else:
            (target / path).write_bytes(value)


def test_the_tree_is_the_same(fuse_point: Path, tmp_path: Path) -> None:
    tree = FakeTree(CONTENT)
    plain = tmp_path / "plain"
    plain.mkdir()
    write_out(tree, plain)
    with mount(tree, fuse_point, kind="fuse") as mounted:
        assert mounted.kind is Kind.FUSE
        compared = subprocess.run(
            ["diff", "-r", "--no-dereference", plain, fuse_point], capture_output=True
        )
        assert (compared.returncode, compared.stdout) == (0, b"")
        for arguments in (["-type", "f"], ["-type", "d"], ["-type", "l"]):
            found = subprocess.check_output(["find", ".", *arguments], cwd=fuse_point)
            expected = subprocess.check_output(["find", ".", *arguments], cwd=plain)
            assert sorted(found.splitlines()) == sorted(expected.splitlines()) != []
        assert subprocess.check_output([fuse_point / "run.sh"]) == b"ran\n"
    assert not list(fuse_point.iterdir())


def test_numbers_for_du_and_df(fuse_point: Path) -> None:
    with mount(FakeTree(CONTENT), fuse_point, kind="fuse"):
        used = subprocess.check_output(["du", "-sb", "--apparent-size", fuse_point])
        assert int(used.split()[0]) == sum(
            len(value) if isinstance(value, bytes) else len((value or "-> ").encode()) - 3
            for value in CONTENT.values()
        )
        space = os.statvfs(fuse_point)
        assert space.f_blocks * space.f_frsize >= len(BIG)
        assert (space.f_bfree, space.f_bavail, space.f_ffree) == (0, 0, 0)
        assert space.f_files == len(CONTENT) + 1
        assert space.f_flag & (os.ST_RDONLY | os.ST_NOSUID | os.ST_NODEV) == (
            os.ST_RDONLY | os.ST_NOSUID | os.ST_NODEV
        )


def test_mmap_also_in_the_mounting_process(fuse_point: Path) -> None:
    with (
        mount(FakeTree(CONTENT), fuse_point, kind="fuse"),
        (fuse_point / "a/b/big").open("rb") as file,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view,
    ):
        assert view[:] == BIG


def test_random_reads(fuse_point: Path) -> None:
    with (
        mount(FakeTree(CONTENT), fuse_point, kind="fuse"),
        (fuse_point / "a/link").open("rb", buffering=0) as file,
    ):
        for offset in (0, 1, CHUNK - 1, CHUNK, 5 * CHUNK + 77, len(BIG) - 5, len(BIG)):
            assert os.pread(file.fileno(), 9000, offset) == BIG[offset : offset + 9000]
        os.fsync(file.fileno())


def test_two_mounts_in_one_process(fuse_point: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    first = mount(FakeTree({"one": b"1"}), fuse_point, kind="fuse")
    with mount(FakeTree({"two": b"2"}), other, kind="fuse"):
        first.unmount()
        assert (other / "two").read_bytes() == b"2"
    first.unmount()


@pytest.mark.parametrize(
    "change",
    [
        lambda point: (point / "new").touch(),
        lambda point: (point / "one").write_bytes(b"y"),
        lambda point: (point / "one").unlink(),
        lambda point: (point / "one").chmod(0o777),
        lambda point: (point / "one").rename(point / "two"),
        lambda point: (point / "void").rmdir(),
        lambda point: (point / "dir").mkdir(),
        lambda point: os.utime(point / "one"),
        lambda point: (point / "s").symlink_to("one"),
    ],
)
def test_nothing_can_be_changed(fuse_point: Path, change: Callable[[Path], None]) -> None:
    with mount(FakeTree(CONTENT), fuse_point, kind="fuse"):
        with fails(errno.EROFS):
            change(fuse_point)
        assert (fuse_point / "one").read_bytes() == b"x"


def test_a_bad_chunk_is_an_io_error_and_its_neighbours_are_not(
    fuse_point: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    tree = FakeTree(CONTENT)
    tree.bad.add(("a/b/big", 2))
    logging.getLogger("cai.mount").addHandler(printed := logging.StreamHandler(sys.__stderr__))
    try:
        with (
            mount(tree, fuse_point, kind="fuse", workers=1),
            (fuse_point / "a/b/big").open("rb", buffering=0) as file,
        ):
            for offset in range(0, len(BIG), 4096):
                chunk = offset // CHUNK
                if chunk == 2:
                    with fails(errno.EIO):
                        os.pread(file.fileno(), 4096, offset)
                else:
                    expected = BIG[offset : offset + 4096]
                    assert os.pread(file.fileno(), 4096, offset) == expected
            with fails(errno.EIO):
                (fuse_point / "a/b/big").read_bytes()
            assert (fuse_point / "one").read_bytes() == b"x"
    finally:
        logging.getLogger("cai.mount").removeHandler(printed)
    lines = [line for line in capfd.readouterr().err.splitlines() if "authenticate" in line]
    assert lines
    assert all(line.startswith("a/b/big: chunk 2 ") for line in lines)


def test_unmount_from_outside_ends_it(fuse_point: Path) -> None:
    mounted = mount(FakeTree(CONTENT), fuse_point, kind="fuse")
    assert isinstance(mounted, FuseMount)
    assert not mounted.wait(0.05)
    assert unmount(fuse_point) is Kind.FUSE
    assert mounted.wait(10)
    assert not any(running(pid) for pid in mounted.pids)


def test_unmount_while_in_use_needs_force(fuse_point: Path) -> None:
    with mount(FakeTree(CONTENT), fuse_point, kind="fuse"):
        with (fuse_point / "one").open("rb"):
            with pytest.raises(StorageError, match="in use"):
                unmount(fuse_point)
            assert (fuse_point / "one").read_bytes() == b"x"
            unmount(fuse_point, force=True)
        assert system.mounted_at(place.resolve(fuse_point)) is None


def test_the_handle_takes_it_away_from_those_who_have_it_open(fuse_point: Path) -> None:
    mounted = mount(FakeTree(CONTENT), fuse_point, kind="fuse")
    (fuse_point / "one").read_bytes()  # its close tells the kernel that no flush is needed
    with (fuse_point / "a/b/big").open("rb", buffering=0) as file:
        mounted.unmount()
        with fails(errno.ENOTCONN):
            os.pread(file.fileno(), 4096, 1024 * 1024)
    assert system.mounted_at(place.resolve(fuse_point)) is None
    mounted.unmount()


def test_mounting_twice_is_refused(fuse_point: Path) -> None:
    with mount(FakeTree(CONTENT), fuse_point, kind="fuse"):
        with pytest.raises(UsageError, match="already"):
            mount(FakeTree(CONTENT), fuse_point, kind="fuse")
        assert (fuse_point / "one").read_bytes() == b"x"


def replaced(mounted: FuseMount, number: int, pid: int) -> bool:
    """Whether a worker was lost and another one is in its place."""
    return eventually(lambda: mounted.pids[number] != pid and running(mounted.pids[number]))


@pytest.mark.parametrize("number", [0, 1])
def test_a_killed_worker_is_replaced(fuse_point: Path, number: int) -> None:
    with mount(FakeTree(CONTENT), fuse_point, kind="fuse") as mounted:
        assert isinstance(mounted, FuseMount)
        lost = mounted.pids[number]
        os.kill(lost, signal.SIGKILL)
        assert replaced(mounted, number, lost)
        assert (fuse_point / "a/b/big").read_bytes() == BIG
        assert not mounted.wait(0)
        other = mounted.pids[1 - number]
        os.kill(other, signal.SIGKILL)
        assert replaced(mounted, 1 - number, other)
        assert (fuse_point / "many/0007").read_bytes() == b"7"
        pids = list(mounted.pids)
    assert not any(running(pid) for pid in pids)


def test_workers_that_keep_failing_end_the_mount_and_hang_nobody(
    fuse_point: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuse, "RESPAWNS", 1)
    mounted = mount(FakeTree(CONTENT), fuse_point, kind="fuse")
    assert isinstance(mounted, FuseMount)
    lost = mounted.pids[1]
    os.kill(lost, signal.SIGKILL)
    assert replaced(mounted, 1, lost)
    os.kill(mounted.pids[1], signal.SIGKILL)
    with pytest.raises(StorageError, match="killed or failed"):
        mounted.wait(10)
    assert system.mounted_at(place.resolve(fuse_point)) is None
    mounted.unmount()


def test_a_replacement_also_ends_with_a_killed_parent(fuse_point: Path) -> None:
    server, workers = started_server(fuse_point)
    os.kill(workers[0], signal.SIGKILL)
    with server:
        assert eventually(lambda: len(children(server.pid) - set(workers)) == 1)
        workers = list(children(server.pid))
        server.kill()
    assert eventually(lambda: not any(running(pid) for pid in workers))
    assert eventually(lambda: system.mounted_at(place.resolve(fuse_point)) is None)


def children(pid: int) -> set[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children")
    listed = "".join(path.read_text() for path in found.parent.parent.glob("*/children"))
    return {int(child) for child in listed.split()}


def is_dead(point: Path) -> bool:
    try:
        point.stat()
    except OSError as error:
        return error.errno == errno.ENOTCONN
    return False


SERVE = """
import os, sys
from pathlib import Path
from cai.mount import mount
from tests.mount.fake_tree import FakeTree
mounted = mount(FakeTree({"one": b"x"}), Path(sys.argv[1]), kind="fuse")
print(*mounted.pids, flush=True)
mounted.wait()
"""


def started_server(point: Path) -> tuple[subprocess.Popen[bytes], list[int]]:
    server = subprocess.Popen([sys.executable, "-c", SERVE, str(point)], stdout=subprocess.PIPE)
    assert server.stdout is not None
    return server, [int(pid) for pid in server.stdout.readline().split()]


def test_workers_end_and_clean_up_with_a_killed_parent(fuse_point: Path) -> None:
    server, workers = started_server(fuse_point)
    assert (fuse_point / "one").read_bytes() == b"x"
    with server:
        server.kill()
    assert eventually(lambda: not any(running(pid) for pid in workers))
    assert system.mounted_at(place.resolve(fuse_point)) is None


def test_a_dead_mount_is_cleared_by_the_next(fuse_point: Path) -> None:
    server, workers = started_server(fuse_point)
    with server:
        # All at once, as the kernel does when memory runs out.
        os.kill(server.pid, signal.SIGSTOP)
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        server.kill()
    assert eventually(lambda: is_dead(fuse_point))
    with fails(errno.ENOTCONN):
        list(fuse_point.iterdir())
    with mount(FakeTree(CONTENT), fuse_point, kind="fuse"):
        assert (fuse_point / "one").read_bytes() == b"x"
    assert not list(fuse_point.iterdir())


def test_unmount_clears_a_dead_mount(fuse_point: Path) -> None:
    server, workers = started_server(fuse_point)
    with server:
        os.kill(server.pid, signal.SIGSTOP)
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        server.kill()
    assert eventually(lambda: is_dead(fuse_point))
    unmount(fuse_point)
    assert not list(fuse_point.iterdir())


def test_workers_hold_no_socket_of_the_parent(fuse_point: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        mounted = mount(FakeTree(CONTENT), fuse_point, kind="fuse")
        assert isinstance(mounted, FuseMount)
        address = listener.getsockname()
    with mounted:
        (fuse_point / "one").read_bytes()  # every worker is past its start when it answers
        assert eventually(
            lambda: not any("socket:" in target for target in descriptors(mounted.pids))
        )
        with pytest.raises(ConnectionRefusedError), socket.create_connection(address):
            pass


def descriptors(pids: list[int]) -> list[str]:
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            found += [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()]
    return found


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize(
    ("options", "reader", "admitted"),
    [
        ({}, 65534, False),
        ({"uid": 65534}, 65534, True),
        ({"uid": 65534}, 65533, False),
        ({"allow_other": True}, 65533, True),
    ],
)
def test_who_may_read(
    fuse_point: Path, options: dict[str, int], reader: int, *, admitted: bool
) -> None:
    for above in fuse_point.parents[:-1]:
        if not above.stat().st_mode & 0o001 and above.stat().st_uid == 0:
            above.chmod(above.stat().st_mode | 0o011)
    with mount(FakeTree({"one": b"x"}), fuse_point, kind="fuse", **options):  # type: ignore[arg-type]
        done = subprocess.run(
            ["cat", fuse_point / "one"], user=reader, group=reader, capture_output=True
        )
        assert (done.stdout == b"x") == admitted
        assert (done.returncode == 0) == admitted


def test_read_ahead_is_raised_where_allowed(fuse_point: Path) -> None:
    with mount(FakeTree(CONTENT), fuse_point, kind="fuse"):
        mounted = system.mounted_at(place.resolve(fuse_point))
        assert mounted is not None
        setting = Path(f"/sys/class/bdi/{mounted.device}/read_ahead_kb")
        if not os.access(setting, os.W_OK):
            pytest.skip("sysfs cannot be written here")
        assert int(setting.read_text()) == device.READ_AHEAD_KIB


@pytest.mark.skipif(shutil.which("fusermount3") is None, reason="fusermount3 is not installed")
@pytest.mark.parametrize("busy", [False, True])
def test_without_the_right_to_mount(
    fuse_point: Path, monkeypatch: pytest.MonkeyPatch, *, busy: bool
) -> None:
    monkeypatch.setattr(system, "is_administrator", lambda: False)
    mounted = mount(FakeTree(CONTENT), fuse_point, kind="fuse")
    assert (fuse_point / "a/b/big").read_bytes() == BIG
    found = system.mounted_at(place.resolve(fuse_point))
    assert found is not None
    assert found.kind == device.FUSE_KIND
    if busy:
        with (fuse_point / "one").open("rb"):
            mounted.unmount()
    else:
        mounted.unmount()
    assert system.mounted_at(place.resolve(fuse_point)) is None
    assert mounted.wait(0)
