"""The written bytes are the ones of the vectors; each named failure is the error it names."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cai import jcs
from cai.errors import CaiError, FormatError, Tampered
from cai.model import Manifest, ReleaseRecord, check
from cai.secret import Secret

VECTORS = Path(__file__).resolve().parent.parent / "vectors"


def load(name: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((VECTORS / "format" / name).read_text())
    return value


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_format", VECTORS / "make_format.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def original(maker: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out, _ = maker.seal_tree(tmp_path_factory.mktemp("vector"))
    return Path(out)


def test_the_vectors_are_made_again_byte_for_byte(maker: ModuleType, tmp_path: Path) -> None:
    made = maker.build(tmp_path)
    assert sorted(made) == sorted(path.name for path in (VECTORS / "format").iterdir())
    for name, value in made.items():
        assert maker.encoded(value) == (VECTORS / "format" / name).read_text(), name


def edited(out: Path, edit: dict[str, Any], names: dict[str, str]) -> str:
    """Apply one edit; returns the stored path that the error must name."""
    stored = names.get(edit["file"], edit["file"])
    path = out / stored
    match edit["edit"]:
        case "flip":
            data = bytearray(path.read_bytes())
            data[edit["offset"]] ^= 1 << edit["bit"]
            path.write_bytes(data)
        case "set":
            value = json.loads(path.read_text())
            inner = value
            for member in edit["member"][:-1]:
                inner = inner[member]
            assert inner.get(edit["member"][-1]) != edit["value"]
            inner[edit["member"][-1]] = edit["value"]
            path.write_bytes(jcs.canonical(value))
        case "append":
            path.write_bytes(path.read_bytes() + bytes.fromhex(edit["data"]))
        case "truncate":
            os.truncate(path, edit["size"])
        case "remove":
            path.unlink()
        case "create":
            path.write_bytes(b"x")
        case "copy":
            shutil.copyfile(out / names[edit["source"]], path)
        case "link":
            path.rename(out.parent / "elsewhere")
            path.symlink_to(out.parent / "elsewhere")
        case "swap":
            data = bytearray(path.read_bytes())
            for move in (edit, edit.get("then")):
                if move:
                    a, b, size = move["a"], move["b"], move["size"]
                    first, second = bytes(data[a : a + size]), bytes(data[b : b + size])
                    data[a : a + size], data[b : b + size] = second, first
            path.write_bytes(data)
        case _:
            raise AssertionError(edit)
    return stored


@pytest.mark.parametrize("edit", load("failures.json")["failures"], ids=lambda edit: edit["name"])
def test_named_failure(edit: dict[str, Any], original: Path, tmp_path: Path) -> None:
    out = tmp_path / "sealed"
    shutil.copytree(original, out)
    manifest = json.loads(load("sealed.json")["manifest"])
    objects = {e["path"]: f"objects/{e['object']}" for e in manifest["entries"] if "object" in e}
    stored = edited(
        out, edit, {"WEIGHTS": objects["näher/weights"], "STORED": objects["stored"]}
    )
    with pytest.raises(CaiError) as caught:
        check(out, Secret(bytes.fromhex(load("sealed.json")["kek"])))
    assert caught.value.machine_code == edit["error"]
    assert stored in caught.value.message
    if isinstance(caught.value, Tampered):
        assert caught.value.path == stored


def test_the_unedited_vector_passes(original: Path) -> None:
    vector = load("sealed.json")
    report = check(
        original, Secret(bytes.fromhex(vector["kek"])), expect_root=vector["model_root"]
    )
    assert report.content_root == vector["content_root"]


INVALID = load("manifests.json")["invalid"]


@pytest.mark.parametrize("name", INVALID)
def test_a_manifest_that_breaks_a_rule_is_refused(name: str) -> None:
    with pytest.raises(FormatError):
        Manifest.parse(jcs.canonical(INVALID[name]))


def test_a_valid_manifest_gives_its_bytes_back() -> None:
    data = jcs.canonical(load("manifests.json")["valid"])
    assert Manifest.parse(data).encode() == data
    with pytest.raises(FormatError):
        Manifest.parse(data + b" ")


def test_the_record_vector_verifies() -> None:
    record = load("record.json")["record"].encode()
    owner = json.loads(record)["owner_key"]
    assert ReleaseRecord.parse(record, owner_key=owner).min_revision == 3
