"""Decrypting all of a model into a tmpfs, with and without large pages."""

from __future__ import annotations

import time

from bench.formats.ground import FILE, MIB, PYTHON, Bench, run, tmpfs
from bench.formats.methods import STOCK, stock_mount

PAGES = {"plain": "never", "huge": "within_size"}
"""Name to the tmpfs option ``huge``."""


def materialise(bench: Bench, method: str) -> None:
    """Measure what is in ``bench.sealed``."""
    for pages, huge in PAGES.items():
        name = f"materialise/{method} {pages}"
        if not bench.wanted(name):
            continue
        if method == STOCK:
            with tmpfs(bench.work / "target", bench.size + 64 * MIB, huge) as target:
                bench.ready()
                start = time.perf_counter()
                with stock_mount(bench, "-ro") as point:
                    run("cp", point / FILE, target / FILE)
                seconds = time.perf_counter() - start
        else:
            bench.ready()
            job = [*PYTHON, "-m", "bench.formats.one_job"]
            seconds = run(*job, bench.sealed, bench.key, huge)
        bench.note(name, bench.size, seconds)
