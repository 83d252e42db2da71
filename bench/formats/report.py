"""Medians, spreads and ratios of what was measured, and the targets that they are held to."""

from __future__ import annotations

import statistics

from bench.formats.ground import Bench

TARGETS = {
    "encrypt/native": ("encrypt/stock", 5.5), "encrypt/gocryptfs": ("encrypt/stock", 4.5),
    "materialise/native plain": ("materialise/stock plain", 2.5),
    "materialise/native huge": ("materialise/stock huge", 6.0),
    "materialise/gocryptfs plain": ("materialise/stock plain", 2.0),
    "materialise/gocryptfs huge": ("materialise/stock huge", 2.0),
    "seq/native": ("seq/stock", 2.2), "mmap/native": ("mmap/stock", 2.5),
    "warm/native": ("warm/plain file", 0.7),
    "seq/pass-through": ("seq/plain file", 0.7), "mmap/pass-through": ("mmap/plain file", 0.7),
    "random/native": ("random/stock", 0.5), "random/pass-through": ("random/plain file", 0.7),
}  # fmt: skip
"""What each is compared with, and the least ratio."""


def report(bench: Bench, extra: dict[str, dict[str, float]]) -> dict[str, object]:
    """Print a Markdown table; returns everything for ``--json``."""
    rows = {}
    print("| what | MB/s | spread | CPU s | ratio | target |")
    print("|---|---|---|---|---|---|")
    for name, values in bench.found.items():
        median = statistics.median(values)
        reads = name.startswith("random")
        value = median if reads else median / 1e6
        against, least = TARGETS.get(name, (f"{name.split('/')[0]}/stock", 0.0))
        if name.startswith("materialise/") and not least:
            against = f"materialise/stock {name.split()[-1]}"
        other = bench.found.get(against)
        ratio = median / statistics.median(other) if other else None
        spread = (max(values) - min(values)) / median * 100
        cost = bench.cpu.get(name)
        rows[name] = {
            "cpu": cost and round(statistics.median(cost), 3), "value": round(value, 1),
            "unit": "reads/s" if reads else "MB/s", "spread": round(spread), "against": against,
            "ratio": ratio and round(ratio, 2), "target": least,
            "values": [round(one / (1 if reads else 1e6), 1) for one in values],
        }  # fmt: skip
        cells = [
            name, f"{value:.0f}{' reads/s' if reads else ''}", f"{spread:.0f} %",
            f"{statistics.median(cost):.2f}" if cost else "",
            f"{ratio:.2f}x of {against}" if ratio is not None and name != against else "",
            f">= {least}x: {'ok' if ratio >= least else 'missed'}" if least and ratio else "",
        ]  # fmt: skip
        print(f"| {' | '.join(cells)} |")
    for title, numbers in extra.items():
        for name, number in numbers.items():
            print(f"{title}: {name}: {number:.2f}")
    for name, reason in bench.skipped.items():
        print(f"{name}: not measured: {reason}")
    return {"size": bench.size, "rows": rows, "extra": extra, "skipped": bench.skipped}
