"""Known answers of stock gocryptfs, and a small sealed model of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cai.model.gocryptfs.sealing import seal_gocryptfs
from tests.model.gocryptfs.trees import PASSWORD, Sealed, copied, vector, write_tree


@pytest.fixture(scope="session")
def kat() -> Any:
    return vector("kat.json")


@pytest.fixture(scope="session")
def negative() -> Any:
    return vector("negative.json")


@pytest.fixture(scope="session")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Sealed:
    work = tmp_path_factory.mktemp("gocryptfs")
    (work / "tree").mkdir()
    write_tree(work / "tree")
    report = seal_gocryptfs(work / "tree", work / "out", PASSWORD, log2_n=10)
    return Sealed(work / "out", work / "tree", report)


@pytest.fixture
def out(sealed: Sealed, tmp_path: Path) -> Path:
    """A copy of the sealed model that a test may damage."""
    return copied(sealed.out, tmp_path / "out")
