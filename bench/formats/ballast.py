"""Memory that is as fast to take for every method: a process that holds what is free.

Run as a program: "fill" on its input holds all but ``KEEP``, and is answered.

A virtual machine's host may take back memory that has been free for some seconds, and what touches
it next waits for the host: whatever is measured then is mostly the host. So nearly all of the
memory is held, touched, and let go bit by bit as the measured programs take memory. What was let
go last is taken first, so it is never old.
"""

from __future__ import annotations

import contextlib
import mmap
import select
import subprocess
import sys
from pathlib import Path

CHUNK = 64 * 1024 * 1024
"""Bytes that are let go at once."""

KEEP = 3584 * 1024 * 1024
"""Bytes that stay free, so that nothing on the machine runs out."""

TICK_S = 0.02
MADV_POPULATE_WRITE = 23


class Ballast:
    """The process, from where it is wanted; to be used as a context manager."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def fill(self) -> None:
        """Hold what is free by now."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"fill\n")
        process.stdin.flush()
        if not process.stdout.readline():
            raise SystemExit("the process that holds memory has ended")

    def __enter__(self) -> Ballast:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._process.terminate()
        self._process.wait()


def free_memory() -> int:
    """Bytes that nobody uses, not even as a cache."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemFree:"):
            return int(line.split()[1]) * 1024
    return 0


def main() -> None:
    """Hold and let go, until the input ends."""
    Path("/proc/self/oom_score_adj").write_text("1000")
    held: list[mmap.mmap] = []
    while True:
        if select.select([sys.stdin], [], [], TICK_S)[0]:
            if not sys.stdin.readline():
                return
            with contextlib.suppress(OSError):
                while free_memory() > KEEP + 2 * CHUNK:
                    chunk = mmap.mmap(-1, CHUNK, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                    chunk.madvise(mmap.MADV_HUGEPAGE)
                    chunk.madvise(MADV_POPULATE_WRITE)
                    held.append(chunk)
            print("held", flush=True)
        while held and free_memory() < KEEP:
            held.pop().close()


if __name__ == "__main__":
    main()
