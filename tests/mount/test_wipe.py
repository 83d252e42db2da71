"""The memory of a materialised model is overwritten before it is freed."""

from __future__ import annotations

import logging
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cai.errors import StorageError, Tampered
from cai.mount import mount, place, system, unmount, wipe
from tests.mount.fake_tree import FakeTree
from tests.mount.test_tmpfs import BIG, TREE


@pytest.fixture
def mounted(tmpfs_point: Path) -> Iterator[tuple[Path, int]]:
    """A materialised tree, and a way into its file system that outlives its mount."""
    mount(FakeTree(TREE), tmpfs_point, kind="tmpfs")
    view = system.writable_clone(tmpfs_point)
    yield tmpfs_point, view
    os.close(view)
    if system.mounted_at(place.resolve(tmpfs_point)):
        unmount(tmpfs_point, force=True)


def held(view: int, name: str) -> bytes:
    file = os.open(name, os.O_RDONLY, dir_fd=view)
    with os.fdopen(file, "rb") as opened:
        return opened.read()


def test_every_byte_is_overwritten(
    mounted: tuple[Path, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    point, view = mounted
    assert held(view, "bigger") == BIG
    monkeypatch.setattr(wipe.os, "ftruncate", lambda _file, _size: None)
    unmount(point)
    files = [path for path, content in TREE.items() if isinstance(content, bytes)]
    assert any("/" in path for path in files)
    for path in files:
        content = held(view, path)
        assert content == bytes(len(TREE[path])), path


def test_nothing_is_left_to_be_read(mounted: tuple[Path, int]) -> None:
    point, view = mounted
    unmount(point)
    assert held(view, "bigger") == b""
    assert not list(point.iterdir())


@pytest.mark.parametrize("how", ["open", "mapped"])
def test_who_still_reads_never_gets_zeros(
    mounted: tuple[Path, int], how: str, caplog: pytest.LogCaptureFixture
) -> None:
    point, view = mounted
    with (point / "bigger").open("rb") as reader:
        mapped = mmap.mmap(reader.fileno(), 0, prot=mmap.PROT_READ)
        if how == "mapped":
            reader.close()
        with pytest.raises(StorageError, match="in use"):
            unmount(point)
        assert held(view, "bigger") == BIG
        with caplog.at_level(logging.WARNING, "cai.mount"):
            unmount(point, force=True)
        assert mapped[:] == BIG
        mapped.close()
    assert "1 files are still open" in caplog.text
    assert held(view, "one") == b""


def test_what_was_decrypted_of_a_tampered_model_is_overwritten(
    tmpfs_point: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    real = wipe._overwrite

    def watched(file: int, zeros: bytes) -> bool:
        sizes.append(os.fstat(file).st_size)
        return real(file, zeros)

    monkeypatch.setattr(wipe, "_overwrite", watched)
    tree = FakeTree(TREE)
    tree.bad.add(("bigger", len(BIG) // 65536))
    with pytest.raises(Tampered):
        mount(tree, tmpfs_point, kind="tmpfs")
    assert len(BIG) in sizes


def test_a_kernel_that_gives_no_clone_is_told_of(
    mounted: tuple[Path, int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_path: Path) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(system, "writable_clone", refuse)
    point, view = mounted
    with caplog.at_level(logging.WARNING, "cai.mount"):
        unmount(point)
    assert "cannot be overwritten" in caplog.text
    assert not list(point.iterdir())
    assert held(view, "bigger") == BIG
