"""Where stock's vectors are, and small trees for the tests of gocryptfs."""

from __future__ import annotations

import base64
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cai.model import SealReport
from cai.model.gocryptfs.keys import CipherKeys
from cai.model.gocryptfs.names import NameCipher
from cai.model.paths import name_bytes
from cai.secret import Secret

ROOT = Path(__file__).resolve().parents[3]
VECTORS = Path(os.environ.get("CAI_VECTORS", ROOT / "../shared/vectors")) / "gocryptfs"
NO_VECTORS = f"no vectors of stock gocryptfs at {VECTORS} (set CAI_VECTORS)"
PASSWORD = Secret(b"a test's password")


def vector(name: str) -> Any:
    path = VECTORS / name
    if not path.is_file():
        pytest.skip(NO_VECTORS)
    return json.loads(path.read_text())


def vector_sets() -> list[Path]:
    """Sets of vectors: a folder ``cipher`` with its ``password.txt`` and perhaps a manifest."""
    extra = [Path(path) for path in os.environ.get("CAI_EXTRA_VECTORS", "").split(":") if path]
    found = []
    for folder in [VECTORS, *extra]:
        if (folder / "cipher").is_dir():
            found.append(folder)
        elif folder.is_dir():
            found += sorted(path.parent for path in folder.glob("*/cipher"))
    return found


def expected_entries(folder: Path) -> dict[str, Any]:
    """What stock's user put into a set, by path."""
    path = folder / "manifest.json"
    if not path.is_file():
        return {}
    entries = json.loads(path.read_text())["entries"]
    return {
        base64.b64decode(e["path_b64"]).decode("utf-8", "surrogateescape"): e for e in entries
    }


def stock_copy(folder: Path, target: Path) -> Path:
    """A copy of a set's cipher directory; links that were checked out as files are links again."""
    cipher = copied(folder / "cipher", target)
    master_key = json.loads((folder / "manifest.json").read_text())["masterkey_hex"]
    names = NameCipher(CipherKeys.of(bytes.fromhex(master_key)))
    for path, entry in expected_entries(folder).items():
        if entry["type"] != "symlink":
            continue
        parts = [names.encrypt(name_bytes(part), bytes(16)).name for part in path.split("/")]
        stored = cipher / entry.get("cipher_path", "/".join(parts))
        if not stored.is_symlink():
            text = stored.read_bytes()
            stored.unlink()
            stored.symlink_to(text.decode())
    return cipher


def copied(source: Path, target: Path) -> Path:
    """A copy that can be written, with its links."""
    shutil.copytree(source, target, symlinks=True)
    for path in [target, *target.rglob("*")]:
        if not path.is_symlink():
            path.chmod(path.stat().st_mode | 0o700)
    return target


def write_tree(root: Path) -> None:
    (root / "nested" / "deeper").mkdir(parents=True)
    (root / "void").mkdir()
    (root / ("d" * 200)).mkdir()
    (root / "config.json").write_text('{"hidden_size": 8}')
    (root / "empty").write_bytes(b"")
    (root / "weights.safetensors").write_bytes(os.urandom(3 * 4096 + 1))
    (root / "nested" / "aligned").write_bytes(os.urandom(2 * 4096))
    (root / "nested" / "two groups").write_bytes(os.urandom(256 * 4096 + 5000))
    (root / "nested" / "up").symlink_to("../config.json")
    (root / "dangling").symlink_to("nested/not there")
    (root / ("d" * 200) / ("ü" * 120)).write_bytes(b"long")
    (root / ("l" * 180)).symlink_to("config.json")
    (root / "bytes\udcff").symlink_to("\udcff\udcfe")
    (root / "run.sh").write_text("#!/bin/sh\n")
    (root / "run.sh").chmod(0o755)


@dataclass(frozen=True)
class Sealed:
    """A sealed model and the tree that it was made of."""

    out: Path
    tree: Path
    report: SealReport
