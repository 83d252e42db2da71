"""``cai.open``: a sealed model as an fsspec file system."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec import AbstractFileSystem
from safetensors.numpy import save

import cai
from cai.errors import InputError, InputMissing, Tampered, UsageError, WrongKey
from cai.loaders.filesystem import SealedFileSystem
from cai.model import new_key, seal, write_key_file
from cai.secret import Secret

BIG = os.urandom(1_500_000)
WEIGHTS = {"a": np.arange(50_000, dtype=np.float32), "b": np.ones((3, 4), dtype=np.int64)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("fs")
    plain = work / "plain"
    (plain / "sub" / "deep").mkdir(parents=True)
    (plain / "config.json").write_text('{"a": 1}')
    (plain / "empty").touch()
    (plain / "sub" / "big").write_bytes(BIG)
    (plain / "sub" / "deep" / "ünï").write_text("x")
    (plain / "link").symlink_to("sub/big")
    (plain / "folder").symlink_to("sub")
    (plain / "model.safetensors").write_bytes(save(WEIGHTS))
    key = new_key()
    write_key_file(work / "key", key)
    seal(plain, work / "sealed", key)
    return work


@pytest.fixture
def files(folder: Path) -> Iterator[SealedFileSystem]:
    with cai.open(folder / "sealed", folder / "key") as opened:
        yield opened


def test_it_is_what_fsspec_knows(files: SealedFileSystem) -> None:
    assert isinstance(files, AbstractFileSystem)
    assert files.cat("config.json") == b'{"a": 1}'
    assert files.cat("cai://sub/big") == BIG
    assert files.cat("link") == files.cat("folder/big") == BIG
    assert files.cat("empty") == b""
    assert files.cat_file("sub/big", 10, -10) == BIG[10:-10]
    assert files.cat_file("sub/big", -5) == BIG[-5:]
    assert files.head("sub/big", 100) == BIG[:100]
    names = ["config.json", "empty", "folder", "link", "model.safetensors", "sub"]
    assert sorted(files.ls("", detail=False)) == names
    assert sorted(files.find("sub")) == ["sub/big", "sub/deep/ünï"]
    assert files.glob("sub/**/ü*") == ["sub/deep/ünï"]
    assert files.isdir("sub")
    assert files.isdir("folder")
    assert files.isfile("sub/big")
    assert not files.exists("gone")
    assert files.info("sub/big")["size"] == files.du("sub/big") == len(BIG)
    assert len(files.info("sub/big")["sha256"]) == 64
    assert len(files.root) == 64


def test_reading_at_any_place(files: SealedFileSystem) -> None:
    with files.open("sub/big") as file:
        for offset in (0, 262_143, 262_144, 1_000_001, len(BIG) - 3, len(BIG)):
            file.seek(offset)
            assert file.read(9000) == BIG[offset : offset + 9000]
        assert file.seek(-4, os.SEEK_END) == len(BIG) - 4
        assert file.read() == BIG[-4:]
        with pytest.raises(ValueError, match="place"):
            file.seek(-1)
    with files.open("config.json", "r") as text:
        assert text.read() == '{"a": 1}'


def test_tensors(files: SealedFileSystem) -> None:
    for path in (None, "model.safetensors", "cai://model.safetensors"):
        found = files.load_safetensors(path)
        assert set(found) == set(WEIGHTS)
        for name, tensor in WEIGHTS.items():
            np.testing.assert_array_equal(found[name], tensor)


def test_copying_out(files: SealedFileSystem, tmp_path: Path) -> None:
    files.get("sub/big", str(tmp_path / "out"))
    assert (tmp_path / "out").read_bytes() == BIG


def test_it_is_read_only(files: SealedFileSystem) -> None:
    for mode in ("wb", "ab", "r+b", "xb"):
        with pytest.raises((OSError, ValueError)):
            files.open("new", mode)
    for change in (lambda: files.rm("empty"), lambda: files.mkdir("d"), lambda: files.touch("t"),
                   lambda: files.makedirs("d"), lambda: files.rmdir("sub"),
                   lambda: files.pipe_file("p", b"x")):  # fmt: skip
        with pytest.raises((OSError, NotImplementedError)):
            change()


def test_what_is_not_there(files: SealedFileSystem) -> None:
    with pytest.raises(FileNotFoundError):
        files.cat("gone")
    with pytest.raises(FileNotFoundError):
        files.ls("gone")
    with pytest.raises(IsADirectoryError):
        files.open("sub")
    with pytest.raises(InputError):
        files.info("../key")
    with pytest.raises(InputMissing):
        files.load_safetensors("gone")


def test_registered_with_fsspec(folder: Path) -> None:
    fsspec.register_implementation("cai", SealedFileSystem, clobber=True)
    arguments = {"uri": str(folder / "sealed"), "key_file": str(folder / "key")}
    first = fsspec.filesystem("cai", **arguments)
    assert first.cat("config.json") == b'{"a": 1}'
    assert first is not fsspec.filesystem("cai", **arguments)
    with fsspec.open("cai://config.json", "rb", **arguments) as file:
        assert file.read() == b'{"a": 1}'


def test_the_key_as_file_bytes_or_secret(folder: Path) -> None:
    text = (folder / "key").read_text().strip()
    for key in (str(folder / "key"), bytes.fromhex(text), Secret(bytes.fromhex(text))):
        with cai.open(f"file:{folder / 'sealed'}", key) as files:
            assert files.cat("config.json") == b'{"a": 1}'
            assert text not in repr(files) + str(files.storage_options) + str(vars(files))
            with pytest.raises((TypeError, pickle.PicklingError)):
                pickle.dumps(files)


def test_refusals(folder: Path) -> None:
    with pytest.raises(WrongKey):
        cai.open(folder / "sealed", bytes(32))
    with pytest.raises(UsageError):
        cai.open(folder / "sealed", folder / "key", expect_root="00")
    with pytest.raises(Tampered):
        cai.open(folder / "sealed", folder / "key", expect_root="0" * 64)
    with pytest.raises(Tampered):
        cai.open(folder / "sealed", folder / "key", min_revision=9)
    with pytest.raises(InputMissing):
        cai.open(folder / "gone", folder / "key")


def test_a_flipped_bit_is_an_error_and_no_byte(folder: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(folder / "sealed", tmp_path / "sealed")
    largest = max((tmp_path / "sealed" / "objects").iterdir(), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[-1] ^= 1
    largest.write_bytes(data)
    with cai.open(tmp_path / "sealed", folder / "key") as files:
        with pytest.raises(Tampered):
            files.cat("sub/big")
        with files.open("sub/big") as file:
            assert file.read(262_144) == BIG[:262_144]
            file.seek(len(BIG) - 1)
            with pytest.raises(Tampered):
                file.read(1)
        assert files.cat("config.json") == b'{"a": 1}'


def test_without_fsspec_it_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "cai.loaders.filesystem", None)
    with pytest.raises(UsageError, match="fsspec"):
        cai.open(folder / "sealed", folder / "key")


def test_the_public_names() -> None:
    assert cai.__all__ == ["__version__", "open"]
    assert cai.open is not io.open
