"""Revisions of a gocryptfs model: sealed against the one before, and resealed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cai.errors import Tampered, UsageError, WrongKey
from cai.model import check, open_model, seal
from cai.model.gocryptfs.carrying import OlderCipher
from cai.model.gocryptfs.model import CipherModel
from cai.model.gocryptfs.sealing import reseal_gocryptfs, seal_gocryptfs
from cai.model.gocryptfs.unsealing import unseal_gocryptfs
from cai.model.options import SealOptions, SealReport
from cai.secret import Secret
from tests.model.gocryptfs.trees import PASSWORD, Sealed

NEW = Secret(b"another password")
LARGE = "nested/two groups"


@pytest.fixture
def tree(sealed: Sealed, tmp_path: Path) -> Path:
    """The tree of the first revision, to be changed."""
    shutil.copytree(sealed.tree, tmp_path / "tree", symlinks=True)
    return tmp_path / "tree"


@pytest.fixture
def out(sealed: Sealed, tmp_path: Path) -> Path:
    """The first revision, with links and modes as they were made."""
    copy = tmp_path / "out"
    subprocess.run(["cp", "-a", sealed.out, copy], check=True)
    return copy


def opened(out: Path, password: Secret = PASSWORD) -> CipherModel:
    model = open_model(out, password)
    assert isinstance(model, CipherModel)
    return model


def again(tree: Path, out: Path, old: Path, **options: Any) -> SealReport:
    with opened(old) as model:
        return seal_gocryptfs(
            tree, out, options.pop("password", PASSWORD), against=model, log2_n=10, **options
        )


def stored(out: Path, path: str, password: Secret = PASSWORD) -> Path:
    with opened(out, password) as model:
        return out / model.stored.path(path)


def same(tree: Path, out: Path, password: Secret, back: Path) -> None:
    with opened(out, password) as model:
        unseal_gocryptfs(model, back)
    for path in tree.rglob("*"):
        copy = back / path.relative_to(tree)
        if path.is_symlink():
            assert copy.readlink() == path.readlink()
        elif path.is_file():
            assert copy.read_bytes() == path.read_bytes()


def test_only_what_changed_is_encrypted_again(tree: Path, out: Path, tmp_path: Path) -> None:
    (tree / "weights.safetensors").write_bytes(os.urandom(3 * 4096 + 1))
    (tree / "nested" / "new").write_bytes(b"n" * 5000)
    (tree / "run.sh").unlink()
    with opened(out) as model:
        root, revision = model.root, model.revision
    report = again(tree, tmp_path / "out2", out)
    assert report.revision == revision + 1
    # Everything of some length but the file that changed.
    assert report.carried == sum(
        1 for path in tree.rglob("*")
        if path.is_file() and not path.is_symlink() and path.stat().st_size
    ) - 2
    assert stored(out, LARGE).samefile(stored(tmp_path / "out2", LARGE))
    assert report.written_bytes < report.stored_bytes - 256 * 4096
    with opened(tmp_path / "out2") as model:
        assert model.manifest.previous == root
        assert model.revision == revision + 1
    assert check(tmp_path / "out2", PASSWORD).root == report.root
    same(tree, tmp_path / "out2", PASSWORD, tmp_path / "back")
    check(out, PASSWORD)


def test_names_stay_and_new_content_has_a_new_id(tree: Path, out: Path, tmp_path: Path) -> None:
    (tree / "weights.safetensors").write_bytes(os.urandom(3 * 4096 + 1))
    again(tree, tmp_path / "out2", out)
    with opened(out) as old, opened(tmp_path / "out2") as new:
        assert old.keys.master == new.keys.master
        for path in old.entries:
            assert old.stored.path(path) == new.stored.path(path)
        assert old.tags("weights.safetensors").file_id != new.tags("weights.safetensors").file_id
        assert old.tags(LARGE) == new.tags(LARGE)
        assert old.header.commitment != new.header.commitment


def test_a_moved_file_is_carried_to_its_new_name(tree: Path, out: Path, tmp_path: Path) -> None:
    before = stored(out, LARGE).stat().st_ino
    (tree / LARGE).rename(tree / "elsewhere")
    again(tree, tmp_path / "out2", out)
    assert stored(tmp_path / "out2", "elsewhere").stat().st_ino == before
    check(tmp_path / "out2", PASSWORD)


def test_another_mode_is_a_copy(tree: Path, out: Path, tmp_path: Path) -> None:
    (tree / LARGE).chmod(0o640)
    old = stored(out, LARGE)
    mode = old.stat().st_mode
    report = again(tree, tmp_path / "out2", out)
    new = stored(tmp_path / "out2", LARGE)
    assert report.carried
    assert new.read_bytes() == old.read_bytes()
    assert not new.samefile(old)
    assert (new.stat().st_mode & 0o777, old.stat().st_mode) == (0o640, mode)


def test_a_file_system_without_links_gets_copies(
    tree: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: Any, **_named: Any) -> None:
        raise PermissionError(1, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    assert again(tree, tmp_path / "out2", out).carried
    assert stored(out, LARGE).read_bytes() == stored(tmp_path / "out2", LARGE).read_bytes()
    check(tmp_path / "out2", PASSWORD)


def test_two_files_of_one_content_need_two_ciphertexts(
    tree: Path, out: Path, tmp_path: Path
) -> None:
    shutil.copy2(tree / LARGE, tree / "twin")
    again(tree, tmp_path / "out2", out)
    with opened(tmp_path / "out2") as model:
        assert model.tags("twin").file_id != model.tags(LARGE).file_id


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_file_is_not_carried(
    damage: str, tree: Path, out: Path, tmp_path: Path
) -> None:
    path = stored(out, LARGE)
    path.chmod(0o600)
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[5000] ^= 1
        path.write_bytes(data)
    elif damage == "cut":
        path.write_bytes(data[:-4128])
    else:
        path.unlink()
    again(tree, tmp_path / "out2", out)
    check(tmp_path / "out2", PASSWORD)
    same(tree, tmp_path / "out2", PASSWORD, tmp_path / "back")
    with opened(tmp_path / "out2") as new, opened(out) as old:
        assert new.tags(LARGE).file_id != old.tags(LARGE).file_id


def test_a_source_that_changes_is_refused(
    tree: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = OlderCipher.may_have

    def change(self: OlderCipher, entry: Any) -> bool:
        if entry.path == LARGE:
            data = (tree / LARGE).read_bytes()
            (tree / LARGE).write_bytes(data[:-1] + b"!")
        return real(self, entry)

    monkeypatch.setattr(OlderCipher, "may_have", change)
    report = again(tree, tmp_path / "out2", out)
    check(tmp_path / "out2", PASSWORD)
    assert report.written_bytes > 256 * 4096


def test_another_password_over_the_same_master_key(
    tree: Path, out: Path, tmp_path: Path
) -> None:
    report = again(tree, tmp_path / "out2", out, password=NEW)
    assert report.carried
    assert check(tmp_path / "out2", NEW).root == report.root
    with pytest.raises(WrongKey):
        open_model(tmp_path / "out2", PASSWORD)


def test_parts_of_two_revisions_do_not_mix(tree: Path, out: Path, tmp_path: Path) -> None:
    old = stored(out, "weights.safetensors").read_bytes()
    (tree / "weights.safetensors").write_bytes(os.urandom(3 * 4096 + 1))
    again(tree, tmp_path / "out2", out)
    target = stored(tmp_path / "out2", "weights.safetensors")
    target.chmod(0o600)
    target.write_bytes(old)
    with pytest.raises(Tampered):
        check(tmp_path / "out2", PASSWORD)


def test_the_methods_do_not_carry_each_others_files(
    tree: Path, out: Path, tmp_path: Path
) -> None:
    (tree / "bytes\udcff").unlink()
    native = Secret(os.urandom(32))
    seal(tree, tmp_path / "native", native)
    with open_model(tmp_path / "native", native) as model, pytest.raises(UsageError):
        seal_gocryptfs(tree, tmp_path / "out2", PASSWORD, against=model, log2_n=10)
    with opened(out) as model, pytest.raises(UsageError):
        seal(tree, tmp_path / "out2", native, against=model)
    assert not (tmp_path / "out2").exists()


# --- resealing ---------------------------------------------------------------------------------


def test_a_resealing_shares_nothing_but_the_content(
    sealed: Sealed, out: Path, tmp_path: Path
) -> None:
    with opened(out) as model:
        report = reseal_gocryptfs(model, tmp_path / "out2", NEW, log2_n=10)
        old_names = {model.stored.path(path) for path in model.entries}
        master = model.keys.master
        assert report.model_id == model.model_id
        assert report.revision == model.revision + 1
    assert report.content_root == sealed.report.content_root
    assert report.root != sealed.report.root
    assert check(tmp_path / "out2", NEW).content_root == report.content_root
    with opened(tmp_path / "out2", NEW) as new:
        assert new.keys.master != master
        assert not old_names & {new.stored.path(path) for path in new.entries}
        assert new.manifest.previous == sealed.report.root
    same(sealed.tree, tmp_path / "out2", NEW, tmp_path / "back")


def test_a_resealing_keeps_what_the_manifest_says(tree: Path, tmp_path: Path) -> None:
    (tree / "w.pt").write_bytes(b"\x80\x02}q\x00.")
    options = SealOptions(name="m", allow=("pickle",), provenance={"source": "hf:me/m"})
    seal_gocryptfs(tree, tmp_path / "one", PASSWORD, options=options, log2_n=10)
    with opened(tmp_path / "one") as model:
        reseal_gocryptfs(model, tmp_path / "two", PASSWORD, log2_n=10)
    with opened(tmp_path / "two") as model:
        assert (model.manifest.name, model.allow) == ("m", ("pickle",))
        assert model.manifest.provenance["source"] == "hf:me/m"


@pytest.mark.parametrize("damage", ["flip", "cut", "zero block"])
def test_nothing_tampered_is_resealed(damage: str, out: Path, tmp_path: Path) -> None:
    path = stored(out, LARGE)
    path.chmod(0o600)
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[9000] ^= 1
    elif damage == "cut":
        del data[-4128:]
    else:
        data[18 : 18 + 4128] = bytes(4128)
    path.write_bytes(data)
    with opened(out) as model, pytest.raises(Tampered):
        reseal_gocryptfs(model, tmp_path / "out2", NEW, log2_n=10)
    assert not (tmp_path / "out2").exists()
    assert not [found for found in tmp_path.iterdir() if "partial" in found.name]


def test_places_that_are_refused(out: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with opened(out) as model:
        for place in (out, out / "inside", tmp_path / "full"):
            with pytest.raises(UsageError):
                reseal_gocryptfs(model, place, NEW, log2_n=10)
