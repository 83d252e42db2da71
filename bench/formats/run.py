"""The order of a run, and its options."""

from __future__ import annotations

import argparse
import compileall
import json
import os
import sys
import tempfile
from pathlib import Path

from bench.formats.ballast import Ballast
from bench.formats.ground import MIB, ROOT, SPARE, Bench, available_memory, tmpfs, write_model
from bench.formats.many import many_files
from bench.formats.materialising import materialise
from bench.formats.memory import peak_memory
from bench.formats.methods import GOCRYPTFS, NATIVE, STOCK, encrypt, others
from bench.formats.reading import THROUGH, read_plain, read_sealed
from bench.formats.report import report

SPEED = ("encrypt", "materialise", "seq", "warm", "mmap", "random", "first open")


def one_round(bench: Bench) -> None:
    """Everything once; of each method all, so that one sealed copy is there at a time."""
    for method in (STOCK, NATIVE, GOCRYPTFS):
        shown = [method, THROUGH] if method == NATIVE else [method]
        if not bench.wanted(*(f"{what}/{name}" for what in SPEED for name in shown)):
            continue
        encrypt(bench, method)
        materialise(bench, method)
        read_sealed(bench, method)
    others(bench)
    bench.fresh(bench.sealed.name)
    read_plain(bench)


def main() -> None:
    """Measure, and print."""
    options = argparse.ArgumentParser(prog="python -m bench.formats")
    options.add_argument("--size", type=int, default=512, help="MiB of weights")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--full", action="store_true", help="4 GiB, and memory at 1, 4, 16 GiB")
    options.add_argument("--json", type=Path)
    options.add_argument("--only", default="", help="names, or beginnings of names, with commas")
    given = options.parse_args()
    size = 4096 * MIB if given.full else given.size * MIB
    # The source, one sealed copy, and what is made of it.
    needed = 3 * size + 512 * MIB + SPARE
    if needed > available_memory():
        options.error(
            f"{needed / MIB / 1024:.0f} GiB of memory are needed, "
            f"{available_memory() / MIB / 1024:.0f} are available; choose a smaller --size"
        )
    # As it is installed: compiled once.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    compileall.compile_dir(ROOT / "cai", quiet=1)
    compileall.compile_dir(ROOT / "bench", quiet=1)
    only = tuple(part for part in given.only.split(",") if part)
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    load = os.getloadavg()[0]
    extra: dict[str, dict[str, float]] = {}
    with Ballast() as ballast, tmpfs(folder, 3 * size + 512 * MIB, "never") as work:
        bench = Bench(work, size, ballast, only)
        bench.secret.write_text("bench\n")
        bench.key.write_text(os.urandom(32).hex() + "\n")
        if bench.wanted(*SPEED):
            write_model(bench.plain, size)
            for number in range(given.rounds):
                print(f"round {number + 1} of {given.rounds}", file=sys.stderr)
                one_round(bench)
            bench.fresh(bench.plain.name)
        if bench.wanted("many"):
            extra["open, list, first byte of 200 files, CPU s"] = many_files(bench)
        if bench.wanted("memory"):
            extra["peak memory, MiB"] = peak_memory(bench, (1, 4, 16) if given.full else (1,))
    folder.rmdir()
    bench.account.close()
    print(f"{size / MIB:.0f} MiB, {os.cpu_count()} cores, load before {load:.1f}, after "
          f"{os.getloadavg()[0]:.1f}, Linux {os.uname().release}")  # fmt: skip
    result = report(bench, extra)
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n")
