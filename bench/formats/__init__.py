"""Sealed models against stock gocryptfs, age and rclone: one run, interleaved rounds, ratios.

    python -m bench.formats [--size MIB] [--rounds N] [--full] [--json FILE] [--only NAME,…]

Needs root, /dev/fuse and gocryptfs; age and rclone are measured when they are installed. Source and
output lie in memory, so that no disk is measured, and of each method all is measured before its
output makes room for that of the next. Each line is the median over the rounds, and its ratio to
the measurement that it is compared with; ratios inside one run are what counts. The CPU seconds are
those of all processes for a GiB (for a million reads, where reads are counted).
"""

from __future__ import annotations

from bench.formats.run import main

__all__ = ["main"]
