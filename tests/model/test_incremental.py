"""Sealing against an older revision, and padding."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cai.errors import CaiError, Tampered
from cai.model import (
    SealOptions,
    SealReport,
    check,
    content_root_of_tree,
    new_key,
    open_model,
)
from cai.model import carrying as carrying_module
from cai.model import seal as seal_tree
from cai.model.layout import MAX_OBJECT_SIZE
from cai.model.padding import padded_size
from cai.secret import Secret


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    root.mkdir()
    for number in range(4):
        (root / f"w{number}").write_bytes(os.urandom(150_000))
    (root / "config.json").write_text("{}")
    return root


@pytest.fixture
def old(tree: Path, tmp_path: Path) -> tuple[Path, Secret]:
    kek = new_key()
    seal_tree(tree, tmp_path / "old", kek, options=SealOptions(chunk=65_536))
    return tmp_path / "old", kek


def again(
    old: tuple[Path, Secret], tree: Path, out: Path, **options: object
) -> SealReport:
    with open_model(*old) as model:
        chosen = SealOptions(**{"chunk": 65_536, **options})  # type: ignore[arg-type]
        return seal_tree(tree, out, old[1], options=chosen, against=model)


def test_only_what_changed_is_written(
    old: tuple[Path, Secret], tree: Path, tmp_path: Path
) -> None:
    (tree / "w1").write_bytes(os.urandom(150_000))
    (tree / "w2").rename(tree / "moved")
    report = again(old, tree, tmp_path / "new")
    assert (report.carried, report.objects) == (3, 4)
    assert report.written_bytes < report.stored_bytes - 3 * 150_000
    with open_model(*old) as before, open_model(tmp_path / "new", old[1]) as after:
        assert (after.model_id, after.revision) == (before.model_id, 2)
        assert after.manifest.previous == before.root
        assert after.manifest.stored["moved"] == before.manifest.stored["w2"]
        assert after.manifest.stored["w1"].name != before.manifest.stored["w1"].name
        same = "objects/" + after.manifest.stored["w0"].name
        assert (old[0] / same).stat().st_ino == (tmp_path / "new" / same).stat().st_ino
    assert check(tmp_path / "new", old[1]).content_root == content_root_of_tree(tree)
    check(*old)


def test_a_file_system_without_links_gets_copies(
    old: tuple[Path, Secret], tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: object, **_named: object) -> None:
        raise OSError(18, "cross-device")

    monkeypatch.setattr(carrying_module.os, "link", refuse)
    report = again(old, tree, tmp_path / "new")
    assert report.carried == 4
    for path in (tmp_path / "new" / "objects").iterdir():
        assert path.stat().st_nlink == 1
    check(tmp_path / "new", old[1])


def test_two_files_of_one_content_need_two_objects(
    old: tuple[Path, Secret], tree: Path, tmp_path: Path
) -> None:
    (tree / "copy").write_bytes((tree / "w0").read_bytes())
    report = again(old, tree, tmp_path / "new")
    assert (report.carried, report.objects) == (4, 5)
    check(tmp_path / "new", old[1])


@pytest.mark.parametrize("damage", ["flip", "head", "cut", "missing", "link"])
def test_a_damaged_object_is_not_carried(
    damage: str, old: tuple[Path, Secret], tree: Path, tmp_path: Path
) -> None:
    victim = min((old[0] / "objects").iterdir())
    data = bytearray(victim.read_bytes())
    if damage == "link":
        victim.rename(tmp_path / "aside")
        victim.symlink_to(tmp_path / "aside")
    elif damage == "missing":
        victim.unlink()
    else:
        data[-1 if damage == "flip" else 30] ^= 1
        victim.write_bytes(data[:-1] if damage == "cut" else data)
    report = again(old, tree, tmp_path / "new")
    assert report.carried == 3
    assert check(tmp_path / "new", old[1]).content_root == content_root_of_tree(tree)


def test_an_index_that_was_altered_is_told(
    old: tuple[Path, Secret], tree: Path, tmp_path: Path
) -> None:
    index = old[0] / "index.cai"
    index.write_bytes(index.read_bytes().replace(b"a", b"b", 1))
    with pytest.raises(Tampered, match=r"index\.cai"):
        again(old, tree, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_another_shape_is_written_again(
    old: tuple[Path, Secret], tree: Path, tmp_path: Path
) -> None:
    assert again(old, tree, tmp_path / "chunk", chunk=131_072).carried == 0
    assert again(old, tree, tmp_path / "pad", pad=True).carried == 0


def test_parts_of_both_revisions_do_not_mix(
    old: tuple[Path, Secret], tree: Path, tmp_path: Path
) -> None:
    root = again(old, tree, tmp_path / "new").root
    for name in ("cai.json", "manifest.cai", "index.cai"):
        data = (tmp_path / "new" / name).read_bytes()
        (tmp_path / "new" / name).write_bytes((old[0] / name).read_bytes())
        with pytest.raises(CaiError):
            check(tmp_path / "new", old[1], expect_root=root)
        (tmp_path / "new" / name).write_bytes(data)


def test_padding_hides_sizes_and_gives_them_back(tmp_path: Path) -> None:
    root, kek = tmp_path / "tree", new_key()
    root.mkdir()
    sizes = [65_537, 100_001, 262_145, 1_000_003]
    for size in sizes:
        (root / f"w{size}").write_bytes(os.urandom(size))
    seal_tree(root, tmp_path / "out", kek, options=SealOptions(pad=True))
    with open_model(tmp_path / "out", kek) as model:
        assert [model.entries[f"w{size}"].size for size in sizes] == sizes
        for size in sizes:
            assert model.manifest.stored[f"w{size}"].shape.size == padded_size(size)
            reader = model.open(f"w{size}")
            room = bytearray(size + 100)
            assert reader.readinto(0, memoryview(room)) == size
            assert room[:size] == (root / f"w{size}").read_bytes()
    assert check(tmp_path / "out", kek).content_root == content_root_of_tree(root)


@given(st.integers(1, MAX_OBJECT_SIZE))
def test_padme(size: int) -> None:
    padded = padded_size(size)
    assert size <= padded <= min(MAX_OBJECT_SIZE, size * 1.12 + 1)
    assert padded_size(padded) == padded


def test_padme_by_hand() -> None:
    """9 = 1001b: exponent 3 has 2 digits, so 1 bit is rounded away; PURBs §4."""
    assert [padded_size(size) for size in (1, 2, 8, 9, 10, 100, 1000, 65_537)] == [
        1, 2, 8, 10, 10, 104, 1024, 67_584,
    ]  # fmt: skip


