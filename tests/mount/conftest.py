from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cai.mount import device, system


@pytest.fixture
def fuse_point(tmp_path: Path) -> Iterator[Path]:
    """A mount point where FUSE can be used; whatever is left on it is taken away."""
    obstacle = device.why_unusable()
    if obstacle:
        pytest.skip(f"FUSE cannot be used here: {obstacle}")
    yield from _mount_point(tmp_path)


@pytest.fixture
def tmpfs_point(tmp_path: Path) -> Iterator[Path]:
    """A mount point where a tmpfs can be mounted."""
    if not system.is_administrator():
        pytest.skip("mounting a tmpfs needs CAP_SYS_ADMIN")
    yield from _mount_point(tmp_path)


def _mount_point(tmp_path: Path) -> Iterator[Path]:
    point = tmp_path / "mnt point"
    point.mkdir()
    yield point
    while device.ours(system.mounted_at(point)):
        if os.geteuid() == 0:
            system.unmount(point, system.MNT_DETACH)
        else:
            subprocess.run(["fusermount3", "-u", "-z", str(point)], check=True)
