"""The registry: bounded, and its text is what Prometheus reads."""

from __future__ import annotations

import pytest

from tng.operation.metrics import MAX_LABEL, MAX_SERIES, OTHER, Histogram, Kind, Numbers, exposition


def test_exposition() -> None:
    bytes_ = Numbers("b_total", "Bytes.", ("entry", "direction"))
    bytes_.add(3, "ingress[0]", "in")
    bytes_.add(4, "ingress[0]", "in")
    gauge = Numbers("age_seconds", "Age.", kind=Kind.GAUGE)
    gauge.set(1.5)
    seconds = Histogram("h_seconds", "Time.", ("entry",), bounds=(0.1, 1.0))
    for value in (0.1, 0.5, 7.0):
        seconds.observe(value, "e")
    assert exposition([bytes_, gauge, seconds]).splitlines() == [
        "# HELP b_total Bytes.",
        "# TYPE b_total counter",
        'b_total{entry="ingress[0]",direction="in"} 7',
        "# HELP age_seconds Age.",
        "# TYPE age_seconds gauge",
        "age_seconds 1.5",
        "# HELP h_seconds Time.",
        "# TYPE h_seconds histogram",
        'h_seconds_bucket{entry="e",le="0.1"} 1',
        'h_seconds_bucket{entry="e",le="1"} 2',
        'h_seconds_bucket{entry="e",le="+Inf"} 3',
        'h_seconds_sum{entry="e"} 7.6',
        'h_seconds_count{entry="e"} 3',
    ]


def test_a_caller_who_makes_labels_does_not_fill_the_memory() -> None:
    family = Numbers("tokens_total", "Tokens.", ("caller",))
    for number in range(MAX_SERIES + 50):
        family.add(1, f"caller {number}")
    assert len(list(family.series())) == MAX_SERIES + 1
    assert family.value(OTHER) == 50
    # A caller that has a series keeps it.
    family.add(1, "caller 0")
    assert family.value("caller 0") == 2


def test_a_label_cannot_break_a_line() -> None:
    family = Numbers("r_total", "R.", ("reason",))
    family.add(1, 'a"b\\c\nd\x1b')
    family.add(1, "x" * 1000)
    lines = exposition([family]).splitlines()
    assert lines[2] == 'r_total{reason="a\\"b\\\\c?d?"} 1'
    assert lines[3] == f'r_total{{reason="{"x" * MAX_LABEL}"}} 1'
    assert len(lines) == 4


def test_a_histogram_is_bounded_too() -> None:
    family = Histogram("h", "H.", ("entry",))
    for number in range(2 * MAX_SERIES):
        family.observe(0.1, str(number))
    assert len(list(family.series())) == MAX_SERIES + 1


def test_wrong_number_of_labels_is_a_fault() -> None:
    with pytest.raises(TypeError):
        Numbers("a", "A.", ("entry",)).add(1)


def test_a_source_is_asked_when_somebody_looks() -> None:
    family, ages = Numbers("age", "Age.", ("entry",), kind=Kind.GAUGE), [1.0]
    family.source(lambda: [(("e",), ages[0])])
    ages[0] = 9.0
    assert family.value("e") == 9.0
    family.source(lambda: [(("e",), 20.0)])
    family.source(lambda: [(("e",), 3.0)])
    assert list(family.series()) == [(("e",), 20.0)]
