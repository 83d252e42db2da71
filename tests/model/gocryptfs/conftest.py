"""Directories and known answers that stock gocryptfs made."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
VECTORS = Path(os.environ.get("CAI_VECTORS", ROOT / "../shared/vectors")) / "gocryptfs"


def vector(name: str) -> Any:
    path = VECTORS / name
    if not path.is_file():
        pytest.skip(f"no vectors of stock gocryptfs at {VECTORS} (set CAI_VECTORS)")
    return json.loads(path.read_text())


@pytest.fixture(scope="session")
def kat() -> Any:
    return vector("kat.json")


@pytest.fixture(scope="session")
def negative() -> Any:
    return vector("negative.json")
