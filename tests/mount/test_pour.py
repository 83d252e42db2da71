"""Whole files into memory, by threads and by processes."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import signal
from pathlib import Path

import pytest

from cai.errors import InputMissing, NoSpace, StorageError, Tampered
from cai.mount import memory, pour, system, target
from cai.mount.pour import Pourer
from cai.mount.target import PIECE
from tests.mount.fake_tree import FakeReader, FakeTree

BIG = os.urandom(5 * PIECE + 4097)


@pytest.fixture
def others() -> set[int]:
    """Processes that were there before; another test may have left some that end by themselves."""
    return children()


@pytest.fixture(params=["threads", "processes"])
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "processes":
        monkeypatch.setattr(pour, "LARGE_CHUNK", 1 << 30)
        monkeypatch.setattr(pour, "WORTH_PROCESSES", 0)
    return str(request.param)


@pytest.fixture(params=["written", "mapped"])
def large_pages(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param == "mapped":
        monkeypatch.setattr(target.Written, "put", None)
    return bool(request.param == "mapped")


def poured(
    tree: FakeTree, tmp_path: Path, path: str = "big", *, large_pages: bool = False
) -> tuple[bytes, int]:
    done: list[int] = []
    with (
        Pourer(tree, done.append, large_pages=large_pages) as pourer,
        (tmp_path / "out").open("w+b") as out,
    ):
        pourer.pour(tree.entries[path], out.fileno())
        return out.read(), sum(done)


@pytest.mark.parametrize("size", [0, 1, PIECE, PIECE + 1, len(BIG)])
def test_the_whole_file(how: str, others: set[int], tmp_path: Path, size: int) -> None:
    tree = FakeTree({"big": BIG[:size]})
    assert poured(tree, tmp_path) == (BIG[:size], size)
    assert tree.readers[0].closed
    assert children() <= others


@pytest.mark.parametrize("size", [PIECE, PIECE + 1, len(BIG)])
def test_the_whole_file_on_large_pages(
    how: str, tmp_path: Path, size: int, large_pages: bool
) -> None:
    tree = FakeTree({"big": BIG[:size]})
    assert poured(tree, tmp_path, large_pages=large_pages) == (BIG[:size], size)
    assert tree.readers[0].closed


def test_an_old_kernel_cannot_take_pages_in_advance(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_address: int, _length: int) -> None:
        raise OSError(errno.EINVAL, "invalid argument")

    monkeypatch.setattr(system, "populate", refuse)
    assert poured(FakeTree({"big": BIG}), tmp_path, large_pages=True) == (BIG, len(BIG))


@pytest.mark.parametrize("chunk", [0, 40, len(BIG) // 65536])
def test_a_bad_chunk(
    how: str, others: set[int], tmp_path: Path, chunk: int, large_pages: bool
) -> None:
    tree = FakeTree({"big": BIG})
    tree.bad.add(("big", chunk))
    with pytest.raises(Tampered, match="changed"):
        poured(tree, tmp_path, large_pages=large_pages)
    assert tree.readers[0].closed
    assert children() <= others


def test_a_short_file_and_a_missing_one(how: str, tmp_path: Path) -> None:
    tree = FakeTree({"big": BIG})
    tree.content = {"big": BIG[:-1]}
    with pytest.raises(Tampered, match="shorter"):
        poured(tree, tmp_path)
    tree.gone.add("big")
    with pytest.raises(InputMissing):
        poured(tree, tmp_path)


def test_full_memory_keeps_its_kind(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large_pages: bool
) -> None:
    def full(*_anything: object) -> int:
        raise OSError(errno.ENOSPC, "no space")

    def full_later(_address: int, length: int) -> None:
        if length > mmap.PAGESIZE:
            raise OSError(errno.EFAULT, "bad address")

    monkeypatch.setattr(os, "pwrite", full)
    monkeypatch.setattr(system, "populate", full_later)
    with pytest.raises(NoSpace) as caught:
        poured(FakeTree({"big": BIG}), tmp_path, large_pages=large_pages)
    assert caught.value.hint == "use --kind fuse"


def test_a_killed_process_is_an_error(
    others: set[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = os.getpid()

    def work(offset: int) -> int:
        assert os.getpid() != own
        if offset == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return 1

    with pytest.raises(StorageError, match="killed"):
        pour.in_processes(range(8), work, lambda _amount: None)
    assert children() <= others


def test_an_interruption_leaves_no_process(others: set[int], tmp_path: Path) -> None:
    def interrupt(_amount: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pour.in_processes(range(100_000), lambda _offset: 1, interrupt)
    assert children() <= others


def children() -> set[int]:
    """Processes that this one has started and not taken back."""
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            found.update(map(int, (task / "children").read_text().split()))
    return found


def test_ciphertext_is_let_go_where_memory_is_tight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_go: list[int] = []
    monkeypatch.setattr(
        FakeReader, "forget", lambda _self, offset, _length: let_go.append(offset), raising=False
    )
    for tight in (False, True):
        monkeypatch.setattr(memory, "is_tight", lambda _size, tight=tight: tight)
        poured(FakeTree({"big": BIG}), tmp_path)
        assert sorted(let_go) == (list(range(0, len(BIG), PIECE)) if tight else [])
