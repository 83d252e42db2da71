"""Stock gocryptfs and ours over the same directories, both ways (2.3, and 2.5 where it is).

The programs: ``gocryptfs`` on the path, and ``CAI_GOCRYPTFS_25``, or what the tool named by
``CAI_TRIXIE_PACKAGE`` unpacks.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cai.model import check, open_model, unseal
from cai.model.gocryptfs.checking import check_stock
from cai.model.gocryptfs.model import CipherModel
from cai.model.gocryptfs.rotating import rotate_password
from cai.model.gocryptfs.sealing import reseal_gocryptfs, seal_gocryptfs
from cai.model.gocryptfs.stock import open_stock
from cai.model.gocryptfs.unsealing import unseal_gocryptfs
from cai.model.progress import silent
from cai.secret import Secret
from tests.model.gocryptfs.trees import write_tree

PASSWORD = Secret(b"interop")

needs_fuse = pytest.mark.skipif(
    not os.access("/dev/fuse", os.R_OK | os.W_OK) or not shutil.which("fusermount3"),
    reason="needs a usable /dev/fuse and fusermount3",
)


@pytest.fixture(scope="session", params=["2.3", "2.5"])
def gocryptfs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    version = str(request.param)
    if version == "2.3":
        found = shutil.which("gocryptfs")
    else:
        found = os.environ.get("CAI_GOCRYPTFS_25") or unpacked(tmp_path_factory)
    if not found:
        pytest.skip(f"no stock gocryptfs {version} here")
    shown = subprocess.run([found, "-version"], capture_output=True, text=True).stdout
    if not shown.startswith((f"gocryptfs {version}", f"gocryptfs v{version}")):
        pytest.skip(f"this is not gocryptfs {version}: {shown.strip()}")
    return found


def unpacked(factory: pytest.TempPathFactory) -> str | None:
    tool = os.environ.get("CAI_TRIXIE_PACKAGE")
    if not tool:
        return None
    folder = factory.mktemp("trixie")
    done = subprocess.run([tool, "gocryptfs", str(folder)], capture_output=True, timeout=200)
    program = folder / "usr" / "bin" / "gocryptfs"
    return str(program) if done.returncode == 0 and program.exists() else None


@pytest.fixture(scope="session")
def passfile(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("pass") / "pass"
    path.write_bytes(PASSWORD.reveal() + b"\n")
    return str(path)


@contextlib.contextmanager
def mounted(gocryptfs: str, passfile: str, cipher: Path, *options: str) -> Iterator[Path]:
    point = Path(tempfile.mkdtemp(prefix="gocryptfs-"))
    command = [gocryptfs, "-q", "-passfile", passfile, *options]
    # It goes on in the background with our pipes, so there must be none.
    nothing = subprocess.DEVNULL
    done = subprocess.run(
        [*command, str(cipher), str(point)], stdout=nothing, stderr=nothing, timeout=60
    )
    assert done.returncode == 0
    try:
        yield point
    finally:
        unmount = ["fusermount3", "-u", str(point)]
        for _ in range(50):
            if subprocess.run(unmount, capture_output=True).returncode == 0:
                break
            time.sleep(0.1)
        point.rmdir()


def fsck(gocryptfs: str, passfile: str, cipher: Path) -> None:
    done = subprocess.run(
        [gocryptfs, "-fsck", "-passfile", passfile, str(cipher)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def assert_same(one: Path, two: Path) -> None:
    """Names, kinds, modes, contents and targets, byte for byte."""
    first, second = (
        {path.relative_to(root) for path in root.rglob("*")} for root in (one, two)
    )
    assert first == second
    for path in first:
        a, b = one / path, two / path
        assert a.is_symlink() == b.is_symlink(), path
        if a.is_symlink():
            assert a.readlink() == b.readlink()
            continue
        assert a.stat().st_mode == b.stat().st_mode, path
        if a.is_file():
            assert a.read_bytes() == b.read_bytes(), path


@needs_fuse
def test_stock_mounts_and_checks_what_we_wrote(
    gocryptfs: str, passfile: str, tmp_path: Path
) -> None:
    (tmp_path / "tree").mkdir()
    write_tree(tmp_path / "tree")
    (tmp_path / "tree" / "larger").write_bytes(os.urandom(9_000_001))  # by workers
    for log2_n in (10, 16):
        out = tmp_path / f"out{log2_n}"
        seal_gocryptfs(tmp_path / "tree", out, PASSWORD, log2_n=log2_n)
        fsck(gocryptfs, passfile, out / "data")
        with mounted(gocryptfs, passfile, out / "data", "-ro") as point:
            assert_same(tmp_path / "tree", point)
        check(out, PASSWORD)


@needs_fuse
def test_stock_mounts_rotated_and_resealed_models_and_later_revisions(
    gocryptfs: str, passfile: str, tmp_path: Path
) -> None:
    first, tree = Secret(b"the first password"), tmp_path / "tree"
    tree.mkdir()
    write_tree(tree)
    seal_gocryptfs(tree, tmp_path / "rotated", first, log2_n=10)
    with open_model(tmp_path / "rotated", first) as model:
        assert isinstance(model, CipherModel)
        reseal_gocryptfs(model, tmp_path / "resealed", PASSWORD, log2_n=10)
        (tree / "config.json").write_text("{}")
        seal_gocryptfs(tree, tmp_path / "later", PASSWORD, against=model, log2_n=10)
    rotate_password(tmp_path / "rotated", first, PASSWORD, log2_n=10)
    for name in ("rotated", "resealed", "later"):
        fsck(gocryptfs, passfile, tmp_path / name / "data")
        check(tmp_path / name, PASSWORD)
    with mounted(gocryptfs, passfile, tmp_path / "later" / "data", "-ro") as point:
        assert_same(tree, point)


@needs_fuse
def test_a_password_that_stock_changed_is_taken_over(gocryptfs: str, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    write_tree(tmp_path / "tree")
    report = seal_gocryptfs(tmp_path / "tree", tmp_path / "out", PASSWORD, log2_n=10)
    changed = subprocess.run(
        [gocryptfs, "-q", "-passwd", str(tmp_path / "out" / "data")], text=True,
        input="interop\nchanged\nchanged\n", capture_output=True,
    )
    assert changed.returncode == 0, changed.stderr
    new = Secret(b"changed")
    assert rotate_password(tmp_path / "out", PASSWORD, new, log2_n=10).already
    assert check(tmp_path / "out", new).root == report.root


@needs_fuse
@pytest.mark.parametrize(
    "options",
    [[], ["-plaintextnames"], ["-longnamemax", "100"], ["-deterministic-names"]],
    ids=lambda options: " ".join(options) or "default",
)
def test_we_open_what_stock_wrote(
    options: list[str], gocryptfs: str, passfile: str, tmp_path: Path
) -> None:
    cipher = tmp_path / "cipher"
    cipher.mkdir()
    init = [gocryptfs, "-q", "-init", "-scryptn", "10", "-passfile", passfile, *options]
    done = subprocess.run([*init, str(cipher)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (tmp_path / "tree").mkdir()
    write_tree(tmp_path / "tree")
    with mounted(gocryptfs, passfile, cipher) as point:
        subprocess.run(["cp", "-a", f"{tmp_path}/tree/.", str(point)], check=True)
        # A hole in front, and a part written later.
        with (point / "holes").open("wb") as file:
            file.seek(3 * 4096 + 100)
            file.write(b"after the hole")
        with (tmp_path / "tree" / "holes").open("wb") as file:
            file.seek(3 * 4096 + 100)
            file.write(b"after the hole")
    with open_stock(cipher, PASSWORD) as model:
        assert not model.foreign
        check_stock(model, progress=silent)
        unseal_gocryptfs(model, tmp_path / "plain")
    assert_same(tmp_path / "tree", tmp_path / "plain")


@pytest.mark.parametrize("option", ["-aessiv", "-xchacha", "-reverse"])
def test_what_is_not_read_is_refused_clearly(
    option: str, gocryptfs: str, passfile: str, tmp_path: Path
) -> None:
    from cai.errors import InputError

    folder = tmp_path / "folder"
    folder.mkdir()
    done = subprocess.run(
        [gocryptfs, "-q", "-init", option, "-passfile", passfile, str(folder)],
        capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stderr
    with pytest.raises(InputError, match={"-aessiv": "AES-SIV", "-xchacha": "XChaCha"}.get(
        option, "reverse"
    )):
        open_stock(folder, PASSWORD)


NAMES = st.one_of(
    st.binary(min_size=1, max_size=24),
    st.integers(170, 180).map(lambda length: b"n" * length),
    st.just(b"m" * 255),
    st.sampled_from([b"gocryptfs.conf", b"gocryptfs.diriv", b"a.name", "模型".encode()]),
).filter(lambda name: b"/" not in name and b"\0" not in name and name not in (b".", b".."))

SIZES = st.sampled_from([0, 1, 15, 16, 4095, 4096, 4097, 8192, 12_289, 65_536, 1_052_672 + 17])

NODES = st.recursive(
    st.one_of(
        SIZES.map(lambda size: ("file", size)),
        st.sampled_from([b"x", b"nowhere", b"t" * 300]).map(lambda target: ("link", target)),
    ),
    lambda inner: st.dictionaries(NAMES, inner, max_size=4).map(lambda items: ("dir", items)),
    max_leaves=12,
)


def grow(root: Path, items: dict[bytes, tuple[str, object]]) -> None:
    for name, (kind, value) in items.items():
        path = root / os.fsdecode(name)
        if kind == "dir":
            path.mkdir()
            assert isinstance(value, dict)
            grow(path, value)
        elif kind == "link":
            assert isinstance(value, bytes)
            path.symlink_to(os.fsdecode(value))
        else:
            assert isinstance(value, int)
            path.write_bytes(os.urandom(value))


def close_links(items: dict[bytes, tuple[str, object]]) -> dict[bytes, tuple[str, object]]:
    """No link of a name that another link's target walks through: circles are refused."""
    return {name: item for name, item in items.items() if not (item[0] == "link" and name == b"x")}


@needs_fuse
@settings(
    max_examples=int(os.environ.get("CAI_INTEROP_EXAMPLES", "12")), deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(items=st.dictionaries(NAMES, NODES, max_size=6))
def test_any_tree(
    items: dict[bytes, tuple[str, object]], passfile: str,
) -> None:
    program = shutil.which("gocryptfs")
    if not program:
        pytest.skip("no stock gocryptfs here")
    work = Path(tempfile.mkdtemp(prefix="any-tree-"))
    try:
        (work / "tree").mkdir()
        grow(work / "tree", close_links(items))
        report = seal_gocryptfs(work / "tree", work / "out", PASSWORD, log2_n=10)
        assert check(work / "out", PASSWORD).root == report.root
        fsck(program, passfile, work / "out" / "data")
        with mounted(program, passfile, work / "out" / "data", "-ro") as point:
            assert_same(work / "tree", point)
        with open_model(work / "out", PASSWORD) as model:
            unseal(model, work / "plain")
        assert_same(work / "tree", work / "plain")
        with open_stock(work / "out" / "data", PASSWORD) as stock:
            unseal_gocryptfs(stock, work / "bare")
        assert_same(work / "tree", work / "bare")
    finally:
        shutil.rmtree(work)
