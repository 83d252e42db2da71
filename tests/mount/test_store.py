"""A mount, and ``cai.open``, straight from a store."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import cai
from cai.errors import InputError, PeerUnreachable, WrongKey
from cai.loaders.opening import in_a_store
from cai.model import open_model_files, write_key_file
from cai.mount import device, mount
from cai.store import StoreOptions, open_ranged, open_store, push
from tests.mount.test_fuse import fails
from tests.oss_server.server import OssServer
from tests.store.conftest import MIB, Sealed, environment, sealed, server

__all__ = ["sealed", "server"]

URI = "oss://models/minilm"
ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.fuse


@pytest.fixture
def published(sealed: Sealed, server: OssServer) -> OssServer:
    push(sealed.path, open_store(URI, options(server)))
    return server


def options(server: OssServer) -> StoreOptions:
    return StoreOptions(environment=environment(server), attempts=2)


def same_tree(sealed: Sealed, point: Path) -> None:
    plain = sealed.path.parent / "plain"
    compared = subprocess.run(["diff", "-r", plain, point], capture_output=True)
    assert (compared.returncode, compared.stdout) == (0, b"")


@pytest.mark.parametrize("kind", ["fuse", "passthrough", "tmpfs"])
def test_each_kind_of_mount_from_a_store(
    published: OssServer, sealed: Sealed, fuse_point: Path, tmp_path: Path, kind: str
) -> None:
    obstacle = device.why_no_passthrough()
    if obstacle and kind != "fuse":
        pytest.skip(obstacle)
    write_key_file(tmp_path / "key", sealed.kek)
    done = subprocess.run(
        [sys.executable, "-m", "cai", "mount", URI, str(fuse_point), "--key-file",
         str(tmp_path / "key"), "--kind", kind, "--json", "--expect-root", sealed.report.root],
        env={**os.environ, **environment(published)}, cwd=ROOT, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kind"] == kind
    same_tree(sealed, fuse_point)


def test_several_workers_share_one_cache(
    published: OssServer, sealed: Sealed, fuse_point: Path
) -> None:
    files = open_ranged(URI, options(published), cache_bytes=16 * MIB)
    model = open_model_files(files, sealed.kek)
    with model, mount(model, fuse_point, kind="fuse", workers=3):
        same_tree(sealed, fuse_point)
        with (fuse_point / "a.safetensors").open("rb", buffering=0) as file:
            right = (sealed.path.parent / "plain" / "a.safetensors").read_bytes()
            for offset in (20 * MIB, 3, 11 * MIB + 17, 21 * MIB):
                assert os.pread(file.fileno(), 9000, offset) == right[offset : offset + 9000]


def test_a_store_that_goes_away_is_an_io_error(
    published: OssServer, sealed: Sealed, fuse_point: Path
) -> None:
    files = open_ranged(URI, options(published))
    model = open_model_files(files, sealed.kek)
    with model, mount(model, fuse_point, kind="fuse", workers=1):
        published.__exit__(None, None, None)
        with fails(errno.EIO):
            (fuse_point / "b.safetensors").read_bytes()
        assert (fuse_point / "config.json").stat().st_size == 300


def test_cai_open_from_a_store(
    published: OssServer, sealed: Sealed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in environment(published).items():
        monkeypatch.setenv(name, value)
    write_key_file(tmp_path / "key", sealed.kek)
    right = (sealed.path.parent / "plain" / "a.safetensors").read_bytes()
    with cai.open(URI, tmp_path / "key", expect_root=sealed.report.root) as files:
        assert files.cat_file("a.safetensors", 10 * MIB, 10 * MIB + 99) == right[10 * MIB :][:99]
        assert files.cat("a.safetensors") == right
    with pytest.raises(WrongKey):
        cai.open(URI, bytes(32))
    with pytest.raises((InputError, PeerUnreachable)):
        cai.open("oss://models/nothing", tmp_path / "key")


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("oss://bucket/x", True), ("s3://b/x", True), ("https://h/x", True),
        ("bucket:/path", True), ("file:/x", False), ("/x", False), ("x.sealed", False),
        ("./oss:x", False), (Path("oss://x"), False),
    ],
)  # fmt: skip
def test_what_names_a_store(uri: str | Path, *, expected: bool) -> None:
    assert in_a_store(uri) is expected


def test_a_directory_with_the_name_of_a_store_is_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bucket:" / "x").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not in_a_store("bucket:/x")
