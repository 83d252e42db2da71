"""What every measurement stands on: folders in memory, commands, and notes of what was found."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bench.formats.account import Account
from bench.formats.ballast import KEEP, Ballast
from cai.mount import system

MIB = 1024 * 1024
PYTHON = [sys.executable]
CAI = [*PYTHON, "-m", "cai"]
FILE = "model.safetensors"
ROOT = Path(__file__).resolve().parent.parent.parent
SPARE = KEEP
"""Memory that is never taken, bytes: a machine without swap that runs out kills something."""


@dataclass
class Bench:
    """The folders of one run and what was measured.

    Attributes:
        work: a tmpfs of our own, without large pages.
        size: bytes of the model's weights.
        ballast: makes memory equally fast for all.
        only: names, or their beginnings, that are measured; all when empty.
        found: name to measurements, MB/s or reads a second.
        cpu: name to CPU seconds of all processes for a GiB, or for a million reads.
        account: counts CPU time.
        skipped: name to reason.
    """

    work: Path
    size: int
    ballast: Ballast
    only: tuple[str, ...] = ()
    found: dict[str, list[float]] = field(default_factory=dict)
    cpu: dict[str, list[float]] = field(default_factory=dict)
    account: Account = field(default_factory=Account)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def plain(self) -> Path:
        """The model."""
        return self.work / "plain"

    @property
    def sealed(self) -> Path:
        """The one sealed copy that there is at a time."""
        return self.work / "sealed"

    @property
    def secret(self) -> Path:
        """Password of stock gocryptfs."""
        return self.work / "password"

    @property
    def key(self) -> Path:
        """Key of our methods."""
        return self.work / "key"

    def ready(self) -> None:
        """Begin a measurement."""
        self.ballast.fill()
        self.account.restart()

    def note(self, name: str, amount: float, seconds: float) -> None:
        """Note a measurement, and the CPU time since ``ready`` or ``account.restart``."""
        self.found.setdefault(name, []).append(amount / seconds)
        used = self.account.used()
        if used is not None:
            unit = 1e6 if name.startswith("random") else 1024 * MIB
            self.cpu.setdefault(name, []).append(used / amount * unit)

    def wanted(self, *names: str) -> bool:
        """Whether one of these, or something whose name begins so, shall be measured."""
        return not self.only or any(
            name.startswith(part) or part.startswith(name) for part in self.only for name in names
        )

    def fresh(self, name: str) -> Path:
        """A path with nothing there."""
        path = self.work / name
        shutil.rmtree(path, ignore_errors=True)
        return path


def run(*command: str | Path) -> float:
    """Run a command; wall seconds."""
    # Not a pipe: what goes into the background would keep it open.
    with tempfile.TemporaryFile() as said:
        start = time.perf_counter()
        done = subprocess.run(
            [str(part) for part in command], check=False, stdin=subprocess.DEVNULL, stdout=said,
            stderr=said, cwd=ROOT, timeout=1800,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        if done.returncode:
            said.seek(0)
            raise SystemExit(f"{command[:4]}: {said.read().decode(errors='replace')}")
    return seconds


def available_memory() -> int:
    """Bytes that can be taken without swapping (proc(5), MemAvailable)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


@contextlib.contextmanager
def tmpfs(path: Path, size: int, huge: str) -> Iterator[Path]:
    """A tmpfs on ``path``."""
    path.mkdir(exist_ok=True)
    system.mount("bench", path, "tmpfs", 0, f"size={size},huge={huge},mode=0700")
    try:
        yield path
    finally:
        system.unmount(path, system.MNT_DETACH)


def write_model(path: Path, size: int) -> None:
    """A safetensors file that no compression makes smaller."""
    path.mkdir()
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    block = bytearray(os.urandom(64 * MIB))
    with (path / FILE).open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for number in range(-(-size // len(block))):
            for start in range(0, len(block), 4096):
                block[start] = (block[start] + number) & 0xFF
            file.write(block[: min(len(block), size - number * len(block))])
