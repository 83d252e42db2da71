"""A model of many files: how long it takes until it can be used."""

from __future__ import annotations

import os
import shutil
import subprocess

from bench.formats.ground import CAI, PYTHON, ROOT, Bench, run

FILES = 200
LIMIT_S = 0.3


def many_files(bench: Bench) -> dict[str, float]:
    """CPU seconds to open a model of 200 files, list it and read the first byte of each."""
    plain, out = bench.fresh("many"), bench.fresh("many.sealed")
    plain.mkdir()
    for number in range(FILES):
        (plain / f"part-{number:03}.safetensors").write_bytes(os.urandom(100_000))
    run(*CAI, "encrypt", plain, "-o", out, "--key-file", bench.key)
    done = subprocess.check_output(
        [*PYTHON, "-m", "bench.formats.one_job", out, bench.key, "first-bytes"], cwd=ROOT, text=True
    )
    shutil.rmtree(plain)
    shutil.rmtree(out)
    whole, work = (float(part) for part in done.split())
    return {"whole process": whole, "without starting Python": work}
