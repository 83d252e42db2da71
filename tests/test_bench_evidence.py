"""The measurements of evidence run, and say what they are meant to."""

from __future__ import annotations

from bench.evidence import MAX_WHOLE_MS, Row, measure, whole_ms


def test_every_row_is_measured() -> None:
    rows = measure(0.01)
    names = [row.name for row in rows]
    assert {"quote", "GPU report and chain", "RIM", "bare dcap-qvl", "bare ECDSA P-384"} <= {*names}
    assert len(set(names)) == len(names)
    assert all(row.seconds > 0 for row in rows)
    assert all(row.ratio > 0 for row in rows if row.against)
    # CPU time of one thread: other load of the machine does not count.
    assert whole_ms(rows) < MAX_WHOLE_MS


def test_the_limit_is_about_the_whole_verdict() -> None:
    rows = [Row("quote", 9.0), Row("TDX + 8 GPUs, RIM, OCSP", 0.25)]
    assert whole_ms(rows) == 250
