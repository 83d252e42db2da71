"""Seal, check, mount, compare, unmount through the command line; then tampering, and the memory.

What the product promises of a sealed model, shown from outside: "Must show 2" of its first issue.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cai.mount import device, place, system
from tests.e2e.process_memory import PeakPss

MIB = 1024 * 1024
GIB = 1024 * MIB
MOST_PSS = 200 * MIB
LARGE = 3 * GIB
DISK_NEEDED = 10 * GIB


def why_not_fuse() -> str:
    return device.why_unusable() or ""


needs_fuse = pytest.mark.skipif(
    bool(why_not_fuse()), reason=f"FUSE cannot be used here: {why_not_fuse()}"
)


@dataclass
class Story:
    """A plain tree, where it is sealed, and the commands about it."""

    work: Path
    peaks: dict[str, int] = field(default_factory=dict)

    @property
    def plain(self) -> Path:
        return self.work / "model"

    @property
    def sealed(self) -> Path:
        return self.work / "model.sealed"

    @property
    def point(self) -> Path:
        return self.work / "mnt"

    @property
    def key(self) -> Path:
        return self.work / "model.key"

    def cai(self, verb: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a verb to its end, and note its peak memory."""
        command = [sys.executable, "-m", "cai", verb, *map(str, arguments)]
        pipe = subprocess.PIPE
        with (
            subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process,
            PeakPss(process.pid) as memory,
        ):
            out, err = process.communicate(timeout=280)
        self.peaks[verb] = memory.peak
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def seal(self) -> None:
        done = self.cai("encrypt", self.plain, "-o", self.sealed, "--key-out", self.key)
        assert done.returncode == 0, done.stderr

    def check(self) -> subprocess.CompletedProcess[str]:
        return self.cai("check", self.sealed, "--key-file", self.key)

    @contextlib.contextmanager
    def mounted(self, kind: str = "fuse") -> Iterator[int]:
        """Mounted in the background; gives the process that serves it."""
        done = self.cai(
            "mount", self.sealed, self.point, "--key-file", self.key, "--kind", kind, "--json"
        )
        assert done.returncode == 0, done.stderr
        facts = json.loads(done.stdout)
        assert facts["kind"] == kind
        try:
            yield int(facts["pid"])
        finally:
            done = self.cai("unmount", self.point)
            assert done.returncode == 0, done.stderr
        assert system.mounted_at(place.resolve(self.point)) is None
        assert not list(self.point.iterdir())

    def compare(self) -> None:
        done = subprocess.run(
            ["diff", "-r", "--no-dereference", self.plain, self.point],
            capture_output=True, text=True,
        )  # fmt: skip
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.fixture
def story(tmp_path: Path) -> Iterator[Story]:
    story = Story(tmp_path)
    story.plain.mkdir()
    story.point.mkdir()
    write_tree(story.plain)
    yield story
    while device.ours(system.mounted_at(story.point)):
        system.unmount(story.point, system.MNT_DETACH)
    # Several GiB are not left to the retention of temporary directories.
    shutil.rmtree(tmp_path)


def write_tree(root: Path) -> None:
    (root / "one-byte").write_bytes(b"x")
    (root / "empty").touch()
    nested = root / "nested" / "deeper" / "deepest"
    nested.mkdir(parents=True)
    (nested / "empty too").touch()
    (nested / "weights.bin").write_bytes(os.urandom(3 * MIB + 1))
    (root / "nested" / "boundary.bin").write_bytes(os.urandom(MIB))
    (root / "no files").mkdir()
    names = root / "ünïcødé 模型 🦜"
    names.mkdir()
    (names / "naïve\ttab and\nnewline.json").write_text("{}")
    (names / ("n" * 255)).write_bytes(b"long name")
    (root / "link to file").symlink_to("nested/boundary.bin")
    (root / "nested" / "link up").symlink_to("../one-byte")
    (root / "link to directory").symlink_to("nested/deeper")
    script = root / "run.sh"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)


@needs_fuse
@pytest.mark.fuse
def test_a_small_tree(story: Story) -> None:
    story.seal()
    assert story.check().returncode == 0
    with story.mounted():
        story.compare()
        assert os.access(story.point / "run.sh", os.X_OK)
        assert not os.access(story.point / "one-byte", os.X_OK)
        assert (story.point / "nested/link up").read_bytes() == b"x"
    assert story.key.stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(not system.is_administrator(), reason="mounting a tmpfs needs CAP_SYS_ADMIN")
def test_a_small_tree_in_memory(story: Story) -> None:
    story.seal()
    with story.mounted("tmpfs"):
        story.compare()


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ (1 << random.randrange(8))]))


def stored_files(sealed: Path) -> list[Path]:
    return sorted(path for path in sealed.rglob("*") if path.is_file())


def test_a_flipped_byte_anywhere_fails_the_check_and_is_named(story: Story) -> None:
    story.seal()
    for path in stored_files(story.sealed):
        sound = path.read_bytes()
        position = random.randrange(len(sound))
        flip(path, position)
        done = story.check()
        place_of_it = f"{path.name} at {position}"
        assert done.returncode != 0, place_of_it
        assert path.name in done.stderr, place_of_it
        assert "Traceback" not in done.stderr, place_of_it
        path.write_bytes(sound)
    assert story.check().returncode == 0


def test_a_file_cut_short_or_gone_fails_the_check(story: Story) -> None:
    story.seal()
    for path in stored_files(story.sealed):
        sound = path.read_bytes()
        path.write_bytes(sound[:-1])
        assert story.check().returncode != 0, path.name
        path.unlink()
        assert story.check().returncode != 0, path.name
        path.write_bytes(sound)


def fails_or_is_right(path: Path, right: bytes, step: int) -> int:
    """Read a file piece by piece; how many pieces failed. None may be wrong."""
    failed = 0
    with path.open("rb", buffering=0) as file:
        for offset in range(0, len(right), step):
            try:
                got = os.pread(file.fileno(), step, offset)
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                failed += 1
            else:
                assert got == right[offset : offset + step]
    return failed


@needs_fuse
@pytest.mark.fuse
def test_a_flipped_byte_is_an_io_error_through_the_mount(story: Story) -> None:
    story.seal()
    objects = [path for path in stored_files(story.sealed) if path.parent.name == "objects"]
    contents = {
        path: path.read_bytes()
        for path in (story.plain / "nested").rglob("*.bin")
    }  # fmt: skip
    assert len(objects) == len(contents) == 2
    with story.mounted():
        for path in objects:
            flip(path, path.stat().st_size - 5)
        failed = {
            path.name: fails_or_is_right(
                story.point / path.relative_to(story.plain), right, 4096
            )
            for path, right in contents.items()
        }  # fmt: skip
        # What shares a chunk with the flipped byte fails, everything else is there.
        assert all(1 <= count <= 64 for count in failed.values()), failed
        whole = subprocess.run(
            ["cat", story.point / "nested/deeper/deepest/weights.bin"], capture_output=True
        )
        assert whole.returncode != 0
        assert "Input/output error" in whole.stderr.decode()
        assert (story.point / "one-byte").read_bytes() == b"x"


@needs_fuse
@pytest.mark.fuse
def test_an_object_that_is_gone_is_an_io_error(story: Story) -> None:
    story.seal()
    for path in stored_files(story.sealed):
        if path.parent.name == "objects":
            path.unlink()
    with story.mounted():
        for path in (story.point / "nested").rglob("*.bin"):
            with pytest.raises(OSError, match="Input/output error"):
                path.read_bytes()
        assert (story.point / "one-byte").read_bytes() == b"x"


@pytest.mark.skipif(not system.is_administrator(), reason="mounting a tmpfs needs CAP_SYS_ADMIN")
def test_tampering_shows_nothing_in_memory(story: Story) -> None:
    story.seal()
    target = next(path for path in stored_files(story.sealed) if path.parent.name == "objects")
    flip(target, target.stat().st_size - 5)
    done = story.cai(
        "mount", story.sealed, story.point, "--key-file", story.key, "--kind", "tmpfs"
    )
    assert done.returncode == 6
    assert target.name in done.stderr
    assert not list(story.point.iterdir())


def write_large(path: Path) -> None:
    """3 GiB that no compression or deduplication of pages makes smaller, quickly."""
    block = bytearray(os.urandom(64 * MIB))
    with path.open("wb") as file:
        for number in range(LARGE // len(block)):
            for start in range(0, len(block), 4096):
                block[start] = (block[start] + number) & 0xFF
            file.write(block)


@needs_fuse
@pytest.mark.fuse
@pytest.mark.large
def test_a_large_tree_in_little_memory(story: Story) -> None:
    free = shutil.disk_usage(story.work).free
    if free < DISK_NEEDED:
        pytest.skip(f"{free // GIB} GiB free in {story.work}, {DISK_NEEDED // GIB} are needed")
    write_large(story.plain / "model-00001-of-00001.safetensors")
    story.seal()
    assert story.check().returncode == 0
    with story.mounted() as server, PeakPss(server) as memory:
        story.compare()
    if memory.unreadable:
        pytest.skip("this user may not look at the memory of the mount's processes")
    assert memory.samples > 3
    story.peaks["serving"] = memory.peak
    assert set(story.peaks) == {"encrypt", "check", "mount", "serving", "unmount"}
    for verb, peak in story.peaks.items():
        assert 5 * MIB < peak < MOST_PSS, (verb, peak)
