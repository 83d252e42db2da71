"""Peak memory at sizes that need not fit: a sparse source, and the sealed model on a disk."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from bench.formats.ground import CAI, FILE, MIB, PYTHON, ROOT, Bench, run
from tests.e2e.process_memory import PeakPss

LIMIT_MIB = 300.0


def peak_memory(bench: Bench, sizes: tuple[int, ...]) -> dict[str, float]:
    """Peak MiB (proportional set size, all processes) of sealing, checking and serving.

    The page cache is not counted: it goes when others want memory. The disk is ``CAI_BENCH_DISK``,
    by default where temporary files are; it must hold the largest size.
    """
    found = {}
    with tempfile.TemporaryDirectory(dir=os.environ.get("CAI_BENCH_DISK")) as disk:
        for gib in sizes:
            plain, out = Path(disk) / "sparse", Path(disk) / "sparse.sealed"
            plain.mkdir()
            with (plain / FILE).open("wb") as file:
                file.truncate(gib * 1024 * MIB)
            for method in ("cai", "gocryptfs"):
                key = ["--key-file", str(bench.key)]
                sealing = ["encrypt", str(plain), "-o", str(out), "--method", method, *key]
                found[f"encrypt {method} {gib} GiB"] = _peak([*CAI, *sealing])
                found[f"check {method} {gib} GiB"] = _peak([*CAI, "check", str(out), *key])
                found[f"FUSE {method} {gib} GiB"] = _peak_of_mount(out, key, Path(disk) / "mnt")
                shutil.rmtree(out)
            shutil.rmtree(plain)
    return found


def _peak(command: list[str]) -> float:
    with (
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process,
        PeakPss(process.pid) as memory,
    ):
        if process.wait():
            raise SystemExit(f"{command} failed")
    return memory.peak / MIB


def _peak_of_mount(sealed: Path, key: list[str], point: Path) -> float:
    """All of the file read through FUSE; the server and its workers count."""
    point.mkdir(exist_ok=True)
    command = [*CAI, "mount", str(sealed), str(point), *key, "--kind", "fuse", "--foreground"]
    with (
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process,
        PeakPss(process.pid) as memory,
    ):
        assert process.stdout is not None
        process.stdout.readline()
        run(*PYTHON, "-m", "bench.formats.one_read", "seq", point / FILE)
        peak = memory.peak
        run(*CAI, "unmount", "--force", point)
        process.wait()
    return peak / MIB
