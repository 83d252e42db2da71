"""Reading through mounts, each read by a process of its own, and plain files beside them."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from bench.formats.ground import FILE, MIB, PYTHON, ROOT, Bench, tmpfs
from bench.formats.methods import GOCRYPTFS, NATIVE, STOCK, our_mount, stock_mount, tuned_stock

WAYS = ("seq", "mmap", "random")
THROUGH = "pass-through"
PLAIN = "plain file"

Mounter = Callable[[], contextlib.AbstractContextManager[Path]]


def read_sealed(bench: Bench, method: str) -> None:
    """Read what is in ``bench.sealed`` in every way that it can be shown."""
    mounts: dict[str, Mounter] = {
        STOCK: lambda: stock_mount(bench, "-ro"),
        "stock, read-ahead raised": lambda: tuned_stock(bench),
        NATIVE: lambda: our_mount(bench, "fuse"),
        THROUGH: lambda: our_mount(bench, "passthrough"),
        GOCRYPTFS: lambda: our_mount(bench, "fuse"),
    }
    shown = {STOCK: [STOCK, "stock, read-ahead raised"], NATIVE: [NATIVE, THROUGH]}
    for name in shown.get(method, [method]):
        _read_all(bench, name, mounts[name])


def read_plain(bench: Bench) -> None:
    """Read the model itself, and a copy of it on large pages, which is what pass-through reads."""
    _read_all(bench, PLAIN, lambda: contextlib.nullcontext(bench.plain))
    name = f"{PLAIN}, large pages"
    if not bench.wanted(*(f"{way}/{name}" for way in (*WAYS, "warm"))):
        return
    with tmpfs(bench.work / "large", bench.size + 64 * MIB, "within_size") as large:
        shutil.copyfile(bench.plain / FILE, large / FILE)
        _read_all(bench, name, lambda: contextlib.nullcontext(large))


def _read_all(bench: Bench, name: str, mounter: Mounter) -> None:
    for way in WAYS:
        ways = (way, "warm") if way == "seq" else (way,)
        if not bench.wanted(*(f"{each}/{name}" for each in ways)):
            continue
        with mounter() as point:
            if name == THROUGH:
                bench.ready()
                start = time.perf_counter()
                with (point / FILE).open("rb"):
                    bench.note(f"first open/{name}", bench.size, time.perf_counter() - start)
            elif not name.startswith(PLAIN) and way != "random":
                bench.ready()
            _read(bench, f"{way}/{name}", way, point / FILE)
            if way == "seq":
                _read(bench, f"warm/{name}", "seq", point / FILE)


def _read(bench: Bench, name: str, way: str, path: Path) -> None:
    bench.account.restart()
    done = subprocess.check_output(
        [*PYTHON, "-m", "bench.formats.one_read", way, str(path)], cwd=ROOT, text=True
    )
    count, seconds = done.split()
    bench.note(name, float(count), float(seconds))
