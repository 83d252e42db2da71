"""Sealing and unsealing whole trees, and everything that a writer refuses."""

from __future__ import annotations

import errno
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cai.errors import (
    CaiError,
    FormatError,
    InputError,
    InputMissing,
    NoSpace,
    Refused,
    StorageError,
    UsageError,
)
from cai.model import (
    SealOptions,
    check,
    content_root_of_tree,
    new_key,
    open_model,
    seal,
    unseal,
)
from cai.model import source as source_module
from cai.model import stage as stage_module
from cai.secret import Secret


def snapshot(root: Path) -> dict[str, tuple[str, int, bytes]]:
    found = {}
    for path in sorted(root.rglob("*")):
        mode = stat.S_IMODE(path.lstat().st_mode)
        if path.is_symlink():
            found[str(path.relative_to(root))] = ("link", 0, os.fsencode(path.readlink()))
        elif path.is_dir():
            found[str(path.relative_to(root))] = ("dir", mode, b"")
        else:
            found[str(path.relative_to(root))] = ("file", mode, path.read_bytes())
    return found


def nothing_left(tmp_path: Path, out: Path) -> None:
    assert not out.exists()
    assert not [path for path in tmp_path.iterdir() if ".partial-" in path.name]


def test_a_tree_comes_back_as_it_was(sample: Path, tmp_path: Path) -> None:
    kek = new_key()
    report = seal(sample, tmp_path / "out", kek)
    assert (report.files, report.directories, report.symlinks, report.objects) == (7, 3, 2, 2)
    checked = check(tmp_path / "out", kek, expect_root=report.root)
    assert checked.content_verified
    assert checked.content_root == content_root_of_tree(sample)
    with open_model(tmp_path / "out", kek) as model:
        unseal(model, tmp_path / "back")
    assert snapshot(tmp_path / "back") == snapshot(sample)
    assert stat.S_IMODE((tmp_path / "back").stat().st_mode) == 0o700


@settings(
    max_examples=15, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(
    files=st.dictionaries(
        st.lists(
            st.text(
                st.characters(exclude_characters="/\0", exclude_categories=["Cs"]),
                min_size=1, max_size=12,
            ).filter(lambda part: part not in (".", "..")),
            min_size=1, max_size=3,
        ).map("/".join),
        st.one_of(
            st.binary(max_size=40),
            st.sampled_from([65_535, 65_536, 65_537, 131_072, 200_001]).map(os.urandom),
        ),
        max_size=6,
    )
)  # fmt: skip
def test_any_tree_comes_back(
    files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    work = tmp_path_factory.mktemp("any")
    root = work / "root"
    root.mkdir()
    for name, content in files.items():
        path = root / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        except OSError:
            continue  # another name of the draw is in its way
    kek = new_key()
    seal(root, work / "out", kek, options=SealOptions(allow=("pickle",), chunk=65_536, workers=2))
    assert check(work / "out", kek).content_root == content_root_of_tree(root)
    with open_model(work / "out", kek) as model:
        unseal(model, work / "back")
    assert snapshot(work / "back") == snapshot(root)


def test_files_round_the_borders(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    for chunks in (1, 2, 16, 17):
        for more in (-1, 0, 1):
            size = chunks * 262_144 + more
            (root / f"{size}").write_bytes(os.urandom(size))
    kek = new_key()
    seal(root, tmp_path / "out", kek)
    check(tmp_path / "out", kek)
    with open_model(tmp_path / "out", kek) as model:
        unseal(model, tmp_path / "back")
    assert snapshot(tmp_path / "back") == snapshot(root)


def test_names_and_contents_are_nowhere_in_clear(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "SECRETFOLDER").mkdir(parents=True)
    (root / "SECRETFOLDER" / "SECRETNAME").write_bytes(b"SECRETCONTENT" * 10_000)
    (root / "small").write_bytes(b"SECRETSMALL")
    kek = new_key()
    seal(root, tmp_path / "out", kek)
    stored = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    names = " ".join(str(path) for path in (tmp_path / "out").rglob("*"))
    assert b"SECRET" not in stored
    assert "SECRET" not in names
    assert kek.reveal() not in stored
    assert kek.reveal().hex().encode() not in stored


def test_sizes_of_small_files_do_not_show(tmp_path: Path) -> None:
    sizes = []
    for number, (count, size) in enumerate([(1, 0), (1, 65_536), (9, 5_000)]):
        root = tmp_path / f"root{number}"
        root.mkdir()
        for index in range(count):
            (root / f"f{index}").write_bytes(bytes(size))
        report = seal(root, tmp_path / f"out{number}", new_key())
        sizes.append((report.objects, (tmp_path / f"out{number}" / "manifest.cai").stat().st_size))
    assert len(set(sizes)) == 1


def test_small_files_beyond_the_inline_budget_keep_their_size_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cai.model.sealer.INLINE_TOTAL", 10)
    root = tmp_path / "root"
    root.mkdir()
    (root / "a").write_bytes(b"123456789")
    (root / "b").write_bytes(b"xy")
    (root / "c").write_bytes(b"z")
    kek = new_key()
    report = seal(root, tmp_path / "out", kek)
    assert report.objects == 1
    (stored,) = (tmp_path / "out" / "objects").iterdir()
    assert stored.stat().st_size == 8192 + 65_536
    check(tmp_path / "out", kek)
    with open_model(tmp_path / "out", kek) as model:
        assert model.open("b").readinto(0, memoryview(bytearray(9))) == 2
        unseal(model, tmp_path / "back")
    assert snapshot(tmp_path / "back") == snapshot(root)


def test_two_sealings_share_nothing(sample: Path, tmp_path: Path) -> None:
    kek = new_key()
    first = seal(sample, tmp_path / "a", kek)
    second = seal(sample, tmp_path / "b", kek)
    assert first.content_root == second.content_root
    assert first.root != second.root
    names = [{path.name for path in (tmp_path / out / "objects").iterdir()} for out in "ab"]
    assert not names[0] & names[1]


def test_missing_source(tmp_path: Path) -> None:
    with pytest.raises(InputMissing):
        seal(tmp_path / "nothing", tmp_path / "out", new_key())
    nothing_left(tmp_path, tmp_path / "out")


def test_source_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="not a directory"):
        seal(tmp_path / "file", tmp_path / "out", new_key())


@pytest.mark.parametrize("inside", ["out", "nested/out", ".", "nested"])
def test_output_inside_the_source(inside: str, sample: Path) -> None:
    before = snapshot(sample)
    with pytest.raises(UsageError):
        seal(sample, sample / inside, new_key())
    assert snapshot(sample) == before


def test_output_inside_the_source_through_a_link(sample: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(sample)
    with pytest.raises(UsageError, match="inside the model"):
        seal(sample, tmp_path / "alias" / "out", new_key())


def test_occupied_output(sample: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("precious")
    with pytest.raises(UsageError, match="exists already"):
        seal(sample, out, new_key())
    assert (out / "mine").read_text() == "precious"


@pytest.mark.parametrize("kind", ["file", "link", "dangling"])
def test_output_that_is_no_directory(kind: str, sample: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("x")
    else:
        (tmp_path / "empty").mkdir()
        out.symlink_to("empty" if kind == "link" else "nowhere")
    with pytest.raises(UsageError):
        seal(sample, out, new_key())
    assert out.is_symlink() or out.read_text() == "x"


def test_empty_output_directory_is_used(sample: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    kek = new_key()
    seal(sample, tmp_path / "out", kek)
    check(tmp_path / "out", kek)


def test_output_whose_folder_is_missing(sample: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        seal(sample, tmp_path / "no" / "out", new_key())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_output_in_a_folder_without_permission(sample: Path, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    with pytest.raises(StorageError):
        seal(sample, closed / "out", new_key())


@pytest.mark.parametrize("target", ["/etc/passwd", "..", "../../x", "nested/../../sample/one"])
def test_links_that_leave_the_tree(target: str, sample: Path, tmp_path: Path) -> None:
    (sample / "bad").symlink_to(target)
    with pytest.raises(InputError, match="bad"):
        seal(sample, tmp_path / "out", new_key())
    nothing_left(tmp_path, tmp_path / "out")


def test_a_name_that_is_not_utf8(sample: Path, tmp_path: Path) -> None:
    (Path(os.fsdecode(os.fsencode(sample) + b"/bad\xff"))).write_text("x")
    with pytest.raises(InputError, match=r"bad\\xff"):
        seal(sample, tmp_path / "out", new_key())


def test_a_link_target_that_is_not_utf8(sample: Path, tmp_path: Path) -> None:
    (sample / "link").symlink_to(os.fsdecode(b"bad\xff"))
    with pytest.raises(InputError, match="UTF-8"):
        seal(sample, tmp_path / "out", new_key())


def test_a_pipe_is_refused_and_not_waited_for(sample: Path, tmp_path: Path) -> None:
    os.mkfifo(sample / "pipe")
    with pytest.raises(InputError, match="pipe"):
        seal(sample, tmp_path / "out", new_key())


def test_a_socket_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "r"
    root.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(root / "s"))
        with pytest.raises(InputError):
            seal(root, tmp_path / "out", new_key())


@pytest.mark.parametrize(
    "head", [b"\x80\x04\x95\x00\x00", b"\x80\x02}q\x00", b"PK\x03\x04" + bytes(26) + b"a/data.pkl"]
)
def test_pickles_are_refused_unless_allowed(head: bytes, sample: Path, tmp_path: Path) -> None:
    (sample / "model.bin").write_bytes(head + bytes(100))
    with pytest.raises(Refused, match=r"model\.bin"):
        seal(sample, tmp_path / "out", new_key())
    nothing_left(tmp_path, tmp_path / "out")
    kek = new_key()
    seal(sample, tmp_path / "out", kek, options=SealOptions(allow=("pickle",)))
    with open_model(tmp_path / "out", kek) as model:
        assert model.allow == ("pickle",)


def test_a_safetensors_header_length_is_no_pickle(sample: Path, tmp_path: Path) -> None:
    (sample / "w").write_bytes((0x7D0280).to_bytes(8, "little") + b'{"a":1}')
    seal(sample, tmp_path / "out", new_key())


@pytest.mark.parametrize("change", ["grows", "shrinks", "is rewritten"])
def test_a_file_that_changes_while_it_is_read(
    change: str, sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = sample / "nested" / "weights.safetensors"
    original = source_module.SourceFile.readinto

    def meddle(self: source_module.SourceFile, offset: int, view: memoryview) -> None:
        # The look at the first bytes for pickles comes before.
        if self.entry.path == "nested/weights.safetensors" and len(view) > 4096:
            with victim.open("r+b") as file:
                if change == "is rewritten":
                    file.write(b"other")
                else:
                    file.truncate(700_000 if change == "grows" else 10)
        original(self, offset, view)

    monkeypatch.setattr(source_module.SourceFile, "readinto", meddle)
    with pytest.raises(InputError, match="changed while it was read"):
        seal(sample, tmp_path / "out", new_key())
    nothing_left(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_leaves_nothing(
    number: int, sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = 0
    original = os.pwritev

    def pwritev(fd: int, views: list[memoryview], offset: int) -> int:
        nonlocal written
        written += 1
        if written > 2:
            raise OSError(number, os.strerror(number))
        return original(fd, views, offset)

    monkeypatch.setattr(stage_module.os, "pwritev", pwritev)
    with pytest.raises(StorageError) as caught:
        seal(sample, tmp_path / "out", new_key())
    assert isinstance(caught.value, NoSpace) == (number != errno.EIO)
    nothing_left(tmp_path, tmp_path / "out")


def test_a_short_write_is_continued(
    sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = os.pwritev

    def pwritev(fd: int, views: list[memoryview], offset: int) -> int:
        return original(fd, [views[0][: max(1, min(len(views[0]), 30_000))]], offset)

    monkeypatch.setattr(stage_module.os, "pwritev", pwritev)
    kek = new_key()
    seal(sample, tmp_path / "out", kek)
    check(tmp_path / "out", kek)


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), SystemExit(143), StorageError("no")])
def test_what_stops_the_last_step_undoes_everything(
    failure: BaseException, sample: Path, tmp_path: Path
) -> None:
    def stop(_report: object) -> None:
        raise failure

    with pytest.raises(type(failure)):
        seal(sample, tmp_path / "out", new_key(), before_commit=stop)
    nothing_left(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_the_middle_leaves_nothing(
    number: signal.Signals, status: int, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    with (root / "w").open("wb") as file:
        file.truncate(20 * 2**30)  # sparse: long to seal, nothing to store
    process = subprocess.Popen(
        [sys.executable, "-m", "cai", "encrypt", "root", "-o", "out"], cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        stderr=subprocess.PIPE,
    )  # fmt: skip
    deadline = time.monotonic() + 20
    while not any(tmp_path.glob("out.partial-*/objects/*")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == status, stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["root"]
    assert b"Traceback" not in stderr


def test_while_it_works_nothing_looks_whole(sample: Path, tmp_path: Path) -> None:
    seen: list[str] = []

    def look(_report: object) -> None:
        seen.extend(path.name for path in tmp_path.iterdir())
        (partial,) = tmp_path.glob("out.partial-*")
        assert stat.S_IMODE(partial.stat().st_mode) == 0o700

    seal(sample, tmp_path / "out", new_key(), before_commit=look)
    assert "out" not in seen


def test_an_output_that_appears_meanwhile_is_not_replaced(sample: Path, tmp_path: Path) -> None:
    def occupy(_report: object) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("x")

    with pytest.raises(UsageError):
        seal(sample, tmp_path / "out", new_key(), before_commit=occupy)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["theirs"]


def test_unsealing_something_tampered_leaves_nothing(sample: Path, tmp_path: Path) -> None:
    kek = new_key()
    seal(sample, tmp_path / "sealed", kek)
    victim = max((tmp_path / "sealed" / "objects").iterdir(), key=lambda p: p.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    with open_model(tmp_path / "sealed", kek) as model, pytest.raises(CaiError, match=victim.name):
        unseal(model, tmp_path / "out")
    nothing_left(tmp_path, tmp_path / "out")


def test_folders_that_forbid_writing_come_back(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "closed").mkdir(parents=True)
    (root / "closed" / "f").write_text("x")
    (root / "closed").chmod(0o555)
    kek = new_key()
    seal(root, tmp_path / "out", kek)
    with open_model(tmp_path / "out", kek) as model:
        unseal(model, tmp_path / "back")
        assert snapshot(tmp_path / "back") == snapshot(root)
        with pytest.raises(UsageError):
            unseal(model, tmp_path / "out" / "objects" / "x")
    for path in (root, tmp_path / "back"):
        (path / "closed").chmod(0o755)


@pytest.mark.parametrize(
    "options",
    [
        SealOptions(chunk=65_535), SealOptions(chunk=2**23), SealOptions(allow=("b", "a")),
        SealOptions(name="x" * 300), SealOptions(revision=0), SealOptions(previous="zz"),
        SealOptions(model_id="AB" * 32), SealOptions(provenance={"x": "y" * 5000}),
    ],
)  # fmt: skip
def test_a_writer_never_makes_what_a_reader_refuses(
    options: SealOptions, sample: Path, tmp_path: Path
) -> None:
    with pytest.raises((FormatError, UsageError)):
        seal(sample, tmp_path / "out", new_key(), options=options)
    nothing_left(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_a_key_of_another_length(size: int, sample: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError):
        seal(sample, tmp_path / "out", Secret(bytes(size)))


def test_no_thread_is_left_behind(sample: Path, tmp_path: Path) -> None:
    seal(sample, tmp_path / "out", new_key())
    assert not [t for t in threading.enumerate() if t.name.startswith("cai-model")]
