"""A small model that has one of everything, and its sealed form."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cai.model import SealOptions, SealReport, new_key, seal
from cai.secret import Secret

Sealer = Callable[..., tuple[Path, Secret, SealReport]]


def write_sample(root: Path) -> None:
    (root / "nested" / "deeper").mkdir(parents=True)
    (root / "void").mkdir()
    (root / "config.json").write_text('{"hidden_size": 8}')
    (root / "empty").write_bytes(b"")
    (root / "one").write_bytes(b"1")
    (root / "ünïcödé 模型").write_bytes(os.urandom(65_536))
    (root / "nested" / "weights.safetensors").write_bytes(os.urandom(600_001))
    (root / "nested" / "deeper" / "just over").write_bytes(os.urandom(65_537))
    (root / "nested" / "up").symlink_to("../config.json")
    (root / "dangling").symlink_to("nested/not there")
    (root / "run.sh").write_text("#!/bin/sh\n")
    (root / "run.sh").chmod(0o755)


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    root = tmp_path / "sample"
    root.mkdir()
    write_sample(root)
    return root


@pytest.fixture
def sealed(sample: Path, tmp_path: Path) -> tuple[Path, Secret, SealReport]:
    kek = new_key()
    out = tmp_path / "sealed"
    return out, kek, seal(sample, out, kek, options=SealOptions(workers=2))
