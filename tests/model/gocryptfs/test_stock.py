"""Directories that stock wrote, and damaged copies of them: as strict as stock at the least."""

from __future__ import annotations

import json
import os
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from cai.errors import CaiError, InputError, StorageError, Tampered, WrongKey
from cai.model.gocryptfs.checking import check_stock
from cai.model.gocryptfs.keys import read_password_file
from cai.model.gocryptfs.stock import StockModel, open_stock, open_stock_with_master_key
from cai.model.gocryptfs.unsealing import unseal_gocryptfs
from cai.model.opening import Method, method_of, open_any
from cai.model.progress import silent
from cai.model.tree import EntryType
from cai.secret import Secret
from tests.model.gocryptfs.trees import (
    NO_VECTORS,
    VECTORS,
    expected_entries,
    stock_copy,
    vector,
    vector_sets,
)

SETS = vector_sets() or [pytest.param(None, marks=pytest.mark.skip(reason=NO_VECTORS))]


def content(model: StockModel, path: str) -> bytes:
    data = bytearray(model.entries[path].size)
    reader = model.open(path)
    try:
        assert reader.readinto(0, memoryview(data)) == len(data)
    finally:
        reader.close()
    return bytes(data)


def check_against(model: StockModel, expected: dict[str, Any]) -> None:
    assert set(model.entries) == set(expected)
    for path, known in expected.items():
        entry = model.entries[path]
        assert entry.type.value == known["type"].replace("directory", "dir"), path
        if entry.type is EntryType.FILE:
            assert entry.size == known["size"]
            assert sha256(content(model, path)).hexdigest() == known["sha256"], path
        elif entry.type is EntryType.SYMLINK:
            assert entry.target == known["target"]


@pytest.mark.parametrize("folder", SETS, ids=lambda path: path.name if path else "none")
def test_what_stock_wrote(folder: Path, tmp_path: Path) -> None:
    password = read_password_file(folder / "password.txt")
    expected = expected_entries(folder)
    cipher = stock_copy(folder, tmp_path / "cipher") if expected else folder / "cipher"
    assert method_of(cipher) is Method.STOCK
    with open_stock(cipher, password) as model:
        assert not model.foreign
        if expected:
            check_against(model, expected)
        checked = check_stock(model, progress=silent)
        assert checked["files"] == sum(
            entry.type is EntryType.FILE for entry in model.entries.values()
        )
        unseal_gocryptfs(model, tmp_path / "plain")
        for path, entry in model.entries.items():
            if entry.type is EntryType.FILE:
                assert (tmp_path / "plain" / path).read_bytes() == content(model, path)
    with pytest.raises(WrongKey):
        open_stock(cipher, Secret(b"another"))


@pytest.mark.parametrize("folder", SETS, ids=lambda path: path.name if path else "none")
def test_with_the_master_key(folder: Path, tmp_path: Path) -> None:
    if not (folder / "manifest.json").is_file():
        pytest.skip("this set has no master key")
    key = json.loads((folder / "manifest.json").read_text())["masterkey_hex"]
    cipher = stock_copy(folder, tmp_path / "cipher")
    with open_stock_with_master_key(cipher, Secret(bytes.fromhex(key))) as model:
        check_against(model, expected_entries(folder))


@pytest.fixture
def stock(tmp_path: Path) -> tuple[Path, Secret]:
    if not VECTORS.is_dir():
        pytest.skip(NO_VECTORS)
    folder = VECTORS / "default-scryptn10"
    password = read_password_file(folder / "password.txt")
    return stock_copy(folder, tmp_path / "cipher"), password


def damage(case: str, cipher: Path, path: Path) -> bool:
    """Do to the file what the case of ``negative.json`` says; False for another kind of case."""
    head, step = 18, 4128
    data = bytearray(path.read_bytes())
    flips = {
        "bitflip-ciphertext-block0": head + 21, "bitflip-nonce-block1": head + step + 3,
        "bitflip-tag-block2": head + 3 * step - 1, "bitflip-header-version": 1,
        "bitflip-header-fileid": 7,
    }
    cuts = {
        "truncate-at-block-boundary": head + 2 * step,
        "truncate-inside-block": head + 2 * step + 100, "truncate-to-header": head,
        "truncate-to-10-bytes": 10, "truncate-to-empty": 0,
    }
    if case in flips:
        data[flips[case]] ^= 1
    elif case in cuts:
        del data[cuts[case] :]
    elif case == "swap-block0-block1":
        first, second = data[head : head + step], data[head + step : head + 2 * step]
        data[head : head + 2 * step] = second + first
    elif case == "zero-full-block1":
        data[head + step : head + 2 * step] = bytes(step)
    elif case == "zero-nonce-block0":
        data[head : head + 16] = bytes(16)
    elif case == "append-zero-block-to-aligned-file":
        data += bytes(step)
    elif case == "replace-with-other-file-ciphertext":
        entries = vector("default-scryptn10/manifest.json")["entries"]
        other = next(e for e in entries if e.get("path") == "sizes/f008193.bin")
        data[:] = (cipher / other["cipher_path"]).read_bytes()
    else:
        return False
    path.write_bytes(data)
    return True


CASES = [
    "bitflip-ciphertext-block0", "bitflip-nonce-block1", "bitflip-tag-block2",
    "bitflip-header-version", "bitflip-header-fileid", "swap-block0-block1", "zero-full-block1",
    "zero-nonce-block0", "truncate-at-block-boundary", "truncate-inside-block",
    "truncate-to-header", "truncate-to-10-bytes", "truncate-to-empty",
    "append-zero-block-to-aligned-file", "replace-with-other-file-ciphertext",
]


@pytest.mark.parametrize("case", CASES)
def test_damaged_files_read_as_in_stock(
    case: str, negative: Any, stock: tuple[Path, Secret]
) -> None:
    cipher, password = stock
    (known,) = [item for item in negative if item["case"] == case]
    assert damage(case, cipher, cipher / known["cipher_path"])
    with open_stock(cipher, password) as model:
        path = known["plain_path"]
        assert model.entries[path].size == known["stat_size"]
        if known["read"] == "ok":
            data = content(model, path)
            assert (len(data), sha256(data).hexdigest()) == (known["size"], known["sha256"])
            check_stock(model, progress=silent)
        else:
            with pytest.raises(Tampered):
                content(model, path)
            with pytest.raises(Tampered) as caught:
                check_stock(model, progress=silent)
            assert caught.value.path == known["cipher_path"]


def test_every_case_that_has_bytes_is_tried(negative: Any) -> None:
    assert {item["case"] for item in negative if "read" in item} == set(CASES)


def test_holes_can_be_refused(negative: Any, stock: tuple[Path, Secret]) -> None:
    cipher, password = stock
    (known,) = [item for item in negative if item["case"] == "zero-full-block1"]
    damage("zero-full-block1", cipher, cipher / known["cipher_path"])
    with open_stock(cipher, password, holes=False) as model, pytest.raises(Tampered):
        content(model, known["plain_path"])


def test_foreign_files_are_left_out_and_fail_the_check(stock: tuple[Path, Secret]) -> None:
    cipher, password = stock
    (cipher / "README").write_text("x")
    names = [path for path in cipher.rglob("gocryptfs.longname.*") if path.suffix != ".name"]
    names[0].with_name(f"{names[0].name}.name").write_text("A" * 300)
    with open_stock(cipher, password) as model:
        assert set(model.foreign) == {"README", str(names[0].relative_to(cipher))}
        with pytest.raises(Tampered):
            check_stock(model, progress=silent)


def test_a_swapped_diriv_makes_every_name_foreign(stock: tuple[Path, Secret]) -> None:
    cipher, password = stock
    (cipher / "gocryptfs.diriv").write_bytes(os.urandom(16))
    with open_stock(cipher, password) as model:
        assert len(model.foreign) > 10
    (cipher / "gocryptfs.diriv").write_bytes(bytes(16))
    with pytest.raises(Tampered, match=r"gocryptfs\.diriv"):
        open_stock(cipher, password)
    (cipher / "gocryptfs.diriv").unlink()
    with pytest.raises(Tampered, match=r"gocryptfs\.diriv"):
        open_stock(cipher, password)


def test_a_link_that_would_leave_the_tree_is_told_of(stock: tuple[Path, Secret]) -> None:
    """A link moved up by the storage is authentic, but would lead elsewhere."""
    from cai.model.gocryptfs.config import Config
    from cai.model.gocryptfs.keys import CipherKeys
    from cai.model.gocryptfs.names import NameCipher

    cipher, password = stock
    config = Config.parse((cipher / "gocryptfs.conf").read_bytes())
    names = NameCipher(CipherKeys.of(config.unlock(password)))
    iv = (cipher / "gocryptfs.diriv").read_bytes()
    (cipher / names.encrypt(b"out", iv).name).symlink_to(names.encrypt_target(b"../../etc"))
    with open_stock(cipher, password) as model:
        assert "leads out" in model.outside["out"]
        assert "link-rel" not in model.outside


def test_another_configuration_or_none(stock: tuple[Path, Secret], tmp_path: Path) -> None:
    cipher, password = stock
    conf = cipher / "gocryptfs.conf"
    body = json.loads(conf.read_text())
    conf.write_text(json.dumps(body | {"FeatureFlags": [*body["FeatureFlags"], "AESSIV"]}))
    with pytest.raises(InputError, match="AES-SIV"):
        open_any(cipher, password)
    conf.write_bytes(b"\xff" * 100)
    with pytest.raises(CaiError, match=r"gocryptfs\.conf"):
        open_any(cipher, password)
    conf.unlink()
    with pytest.raises(InputError, match=r"cai\.json"):
        open_any(cipher, password)
    with pytest.raises((InputError, StorageError)):
        open_stock(tmp_path / "nothing", password)


def test_the_plain_side_of_reverse_is_no_cipher_directory(
    stock: tuple[Path, Secret],
) -> None:
    cipher, password = stock
    (cipher / ".gocryptfs.reverse.conf").write_text("{}")
    with pytest.raises(InputError, match="reverse"):
        open_stock(cipher, password)


@pytest.mark.parametrize(
    "demand", [{"expect_root": "00" * 32}, {"min_revision": 1}, {"owner_key": "00" * 32}]
)
def test_a_directory_without_manifest_is_never_the_demanded_model(
    demand: dict[str, Any], stock: tuple[Path, Secret]
) -> None:
    with pytest.raises(Tampered) as caught:
        open_any(*stock, **demand)
    assert caught.value.machine_code == "root-mismatch"


def test_special_files_are_refused(stock: tuple[Path, Secret]) -> None:
    cipher, password = stock
    files = (p for p in cipher.iterdir() if not p.is_symlink() and p.is_file())
    victim = next(path for path in files if len(path.name) == 22)
    victim.unlink()
    os.mkfifo(victim)
    with pytest.raises(InputError, match="pipe"):
        open_stock(cipher, password)
