"""Models of gocryptfs through the mounts: authentic bytes or an I/O error."""

from __future__ import annotations

import errno
import logging
import os
import random
from pathlib import Path

import pytest

from cai.errors import Tampered
from cai.model import open_model
from cai.model.gocryptfs.layout import HEADER_SIZE, STORED_BLOCK
from cai.model.gocryptfs.model import CipherModel
from cai.model.gocryptfs.stock import open_stock
from cai.mount import device, mount, system
from tests.model.gocryptfs.trees import PASSWORD, Sealed

needs_fuse = pytest.mark.skipif(
    device.why_unusable() is not None, reason=f"FUSE cannot be used: {device.why_unusable()}"
)
needs_root = pytest.mark.skipif(
    not system.is_administrator(), reason="a tmpfs can be mounted by root only"
)
KINDS = [
    pytest.param("fuse", marks=[needs_fuse, pytest.mark.fuse]),
    pytest.param("tmpfs", marks=needs_root),
]


@pytest.fixture
def point(tmp_path: Path) -> Path:
    (tmp_path / "point").mkdir()
    return tmp_path / "point"


def assert_shows(point: Path, tree: Path) -> None:
    shown = {path.relative_to(point) for path in point.rglob("*")}
    assert shown == {path.relative_to(tree) for path in tree.rglob("*")}
    for path in shown:
        one, two = point / path, tree / path
        if two.is_symlink():
            assert one.readlink() == two.readlink()
        elif two.is_file():
            assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_tree(kind: str, sealed: Sealed, point: Path) -> None:
    with open_model(sealed.out, PASSWORD) as model, mount(model, point, kind=kind):
        assert_shows(point, sealed.tree)
        expected = (sealed.tree / "nested" / "two groups").read_bytes()
        with (point / "nested" / "two groups").open("rb") as file:
            for offset in random.Random(1).sample(range(len(expected)), 50):
                assert os.pread(file.fileno(), 5000, offset) == expected[offset : offset + 5000]


@pytest.mark.parametrize("kind", KINDS)
def test_a_bare_directory(kind: str, sealed: Sealed, point: Path) -> None:
    with open_stock(sealed.out / "data", PASSWORD) as model, mount(model, point, kind=kind):
        assert_shows(point, sealed.tree)


def zero_a_block(out: Path) -> None:
    with open_model(out, PASSWORD) as model:
        assert isinstance(model, CipherModel)
        stored = out / model.stored.path("nested/two groups")
    data = bytearray(stored.read_bytes())
    at = HEADER_SIZE + 100 * STORED_BLOCK
    data[at : at + STORED_BLOCK] = bytes(STORED_BLOCK)
    stored.write_bytes(data)


@needs_fuse
@pytest.mark.fuse
def test_a_zeroed_block_is_an_error_in_fuse(out: Path, sealed: Sealed, point: Path) -> None:
    zero_a_block(out)
    with open_model(out, PASSWORD) as model, mount(model, point, kind="fuse"):
        damaged = point / "nested" / "two groups"
        with pytest.raises(OSError, match="error") as caught:
            damaged.read_bytes()
        assert caught.value.errno == errno.EIO
        # The digest is over the whole group, so that nothing of it is shown.
        with damaged.open("rb") as file, pytest.raises(OSError, match="error"):
            os.pread(file.fileno(), 4096, 0)
        assert (point / "config.json").read_text() == (sealed.tree / "config.json").read_text()


@needs_root
def test_a_zeroed_block_stops_tmpfs(
    out: Path, point: Path, caplog: pytest.LogCaptureFixture
) -> None:
    zero_a_block(out)
    with (
        caplog.at_level(logging.ERROR),
        open_model(out, PASSWORD) as model,
        pytest.raises(Tampered, match="two groups"),
    ):
        mount(model, point, kind="tmpfs")
    assert not list(point.iterdir())
