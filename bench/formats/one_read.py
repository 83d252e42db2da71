"""Reads one file in one way and prints bytes and seconds; each measurement is its own process.

    python -m bench.formats.one_read seq|mmap|random PATH
"""

from __future__ import annotations

import mmap
import os
import random
import sys
import time

STEP = 1024 * 1024
READS = 40_000
"""Most random reads."""

SECONDS = 2.0
"""Longest time for random reads."""


def sequential(path: str) -> tuple[int, float]:
    """The whole file, 1 MiB at a time."""
    buffer = bytearray(STEP)
    descriptor = os.open(path, os.O_RDONLY)
    start, done = time.perf_counter(), 0
    while count := os.readv(descriptor, [buffer]):
        done += count
    return done, time.perf_counter() - start


def mapped(path: str) -> tuple[int, float]:
    """The whole file copied out of a mapping, as safetensors and torch do it."""
    buffer = bytearray(STEP)
    descriptor = os.open(path, os.O_RDONLY)
    size = os.fstat(descriptor).st_size
    start = time.perf_counter()
    with mmap.mmap(descriptor, size, prot=mmap.PROT_READ) as view, memoryview(view) as all_of_it:
        for offset in range(0, size, STEP):
            piece = all_of_it[offset : offset + STEP]
            buffer[: len(piece)] = piece
            piece.release()
    return size, time.perf_counter() - start


def at_random(path: str) -> tuple[int, float]:
    """4 KiB at random places, without read-ahead; counts reads, not bytes."""
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    pages = os.fstat(descriptor).st_size // 4096
    drawn = random.Random(7)
    start, done = time.perf_counter(), 0
    while done < READS and time.perf_counter() - start < SECONDS:
        os.pread(descriptor, 4096, drawn.randrange(pages) * 4096)
        done += 1
    return done, time.perf_counter() - start


WAYS = {"seq": sequential, "mmap": mapped, "random": at_random}

if __name__ == "__main__":
    count, seconds = WAYS[sys.argv[1]](sys.argv[2])
    print(count, seconds)
