"""Numbers about a gateway: counters, gauges and histograms, with a bounded number of series.

A small registry of its own instead of a library: the exposition format is a page long, and every
label here is bounded, because a caller who could make labels could fill the memory.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

MAX_SERIES = 256
"""Most series of one family; what comes after them is counted under ``other``."""

MAX_LABEL = 64
"""Longest label value, characters."""

OTHER = "other"
"""Label value of everything beyond ``MAX_SERIES``."""

LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper bounds of the latency histograms, seconds."""

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Of the text that ``exposition`` makes."""

Labels = tuple[str, ...]
Source = Callable[[], Iterable[tuple[Labels, float]]]


class Kind(StrEnum):
    """What a family's numbers mean."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(slots=True)
class Distribution:
    """One series of a histogram.

    Attributes:
        counts: observations in each bucket, the last one without an upper bound.
        total: sum of what was observed.
    """

    counts: list[int]
    total: float = 0.0

    @property
    def count(self) -> int:
        """Number of observations."""
        return sum(self.counts)


class Family:
    """Every series of one name.

    Args:
        name: e.g. ``tng_connections_total``.
        text: what it is, one line.
        labels: names of its labels; values come in the same order.
    """

    kind = Kind.COUNTER

    def __init__(self, name: str, text: str, labels: Sequence[str] = ()) -> None:
        self.name = name
        self.text = text
        self.labels = tuple(labels)

    def _key(self, values: Labels, known: dict[Labels, object]) -> Labels:
        if values in known:
            return values
        if len(values) != len(self.labels):
            raise TypeError(f"{self.name} has the labels {self.labels}")
        values = tuple(_clean(value) for value in values)
        if values not in known and len(known) >= MAX_SERIES:
            return (OTHER,) * len(self.labels)
        return values


class Numbers(Family):
    """A family with one number a series: a counter, or a gauge."""

    def __init__(
        self, name: str, text: str, labels: Sequence[str] = (), *, kind: Kind = Kind.COUNTER
    ) -> None:
        super().__init__(name, text, labels)
        self.kind = kind
        self._series: dict[Labels, float] = {}
        self._sources: list[Source] = []

    def add(self, amount: float, *values: str) -> None:
        """Add to one series."""
        key = self._key(values, self._series)  # type: ignore[arg-type]
        self._series[key] = self._series.get(key, 0) + amount

    def set(self, value: float, *values: str) -> None:
        """Set one series of a gauge."""
        self._series[self._key(values, self._series)] = value  # type: ignore[arg-type]

    def source(self, source: Source) -> None:
        """Ask ``source`` for series whenever somebody looks."""
        self._sources.append(source)

    def value(self, *values: str) -> float:
        """The number of one series; 0 when there is none."""
        return dict(self.series()).get(values, 0)

    def series(self) -> Iterator[tuple[Labels, float]]:
        """Every series."""
        found = dict(self._series)
        for source in self._sources:
            for values, number in list(source())[:MAX_SERIES]:
                key = tuple(_clean(value) for value in values)
                # Two sources of one series: the larger one, as the older age is the one to watch.
                found[key] = max(number, found.get(key, number))
        yield from found.items()


class Histogram(Family):
    """A family with a distribution a series.

    Args:
        name: e.g. ``tng_handshake_seconds``.
        text: what it is, one line.
        labels: names of its labels.
        bounds: upper bounds of the buckets, ascending.
    """

    kind = Kind.HISTOGRAM

    def __init__(
        self,
        name: str,
        text: str,
        labels: Sequence[str] = (),
        bounds: Sequence[float] = LATENCY_BUCKETS,
    ) -> None:
        super().__init__(name, text, labels)
        self.bounds = tuple(bounds)
        self._series: dict[Labels, Distribution] = {}

    def observe(self, value: float, *values: str) -> None:
        """Count one observation."""
        key = self._key(values, self._series)  # type: ignore[arg-type]
        found = self._series.get(key)
        if found is None:
            found = self._series[key] = Distribution([0] * (len(self.bounds) + 1))
        found.counts[bisect_left(self.bounds, value)] += 1
        found.total += value

    def series(self) -> Iterator[tuple[Labels, Distribution]]:
        """Every series."""
        yield from self._series.items()


@dataclass
class Meters:
    """The families of a gateway."""

    connections: Numbers = field(
        default_factory=lambda: Numbers(
            "tng_connections_total", "Connections that an entry accepted.", ("entry",)
        )
    )
    active: Numbers = field(
        default_factory=lambda: Numbers(
            "tng_connections_active", "Connections open now.", ("entry",), kind=Kind.GAUGE
        )
    )
    failed: Numbers = field(
        default_factory=lambda: Numbers(
            "tng_streams_failed_total", "Streams that broke or had no peer.", ("entry",)
        )
    )
    streams: Numbers = field(
        default_factory=lambda: Numbers(
            "tng_streams_total", "Streams between attested ends.", ("entry",)
        )
    )
    streams_active: Numbers = field(
        default_factory=lambda: Numbers(
            "tng_streams_active", "Streams open now.", ("entry",), kind=Kind.GAUGE
        )
    )
    bytes: Numbers = field(
        default_factory=lambda: Numbers(
            "tng_bytes_total",
            "Bytes of streams; in is towards this gateway's plain side.",
            ("entry", "direction"),
        )
    )
    handshake: Histogram = field(
        default_factory=lambda: Histogram(
            "tng_handshake_seconds",
            "From dialling a peer to its proof being accepted.",
            ("entry",),
        )
    )
    attestation: Histogram = field(
        default_factory=lambda: Histogram(
            "tng_attestation_seconds",
            "Judging evidence (ingress) or getting a proof from the agent (egress).",
            ("entry",),
        )
    )
    evidence_age: Numbers = field(
        default_factory=lambda: Numbers(
            "tng_evidence_age_seconds",
            "Age of the verdict (ingress) or of the last proof (egress); the oldest in use.",
            ("entry",),
            kind=Kind.GAUGE,
        )
    )
    refusals: Numbers = field(
        default_factory=lambda: Numbers(
            "tng_refusals_total", "Requests and peers refused.", ("entry", "reason")
        )
    )
    requests: Numbers = field(
        default_factory=lambda: Numbers(
            "tng_requests_total", "Requests and tunnels that ended.", ("entry", "status")
        )
    )
    tokens: Numbers = field(
        default_factory=lambda: Numbers(
            "tng_tokens_total", "Tokens as the backend counts them.", ("caller", "kind")
        )
    )
    lines_dropped: Numbers = field(
        default_factory=lambda: Numbers(
            "tng_log_lines_dropped_total", "Log lines that the log's reader was too slow for."
        )
    )
    ready: Numbers = field(
        default_factory=lambda: Numbers(
            "tng_ready", "1 when /readyz last said ok.", kind=Kind.GAUGE
        )
    )

    def families(self) -> tuple[Numbers | Histogram, ...]:
        """Every family, in a fixed order."""
        found = (getattr(self, name) for name in self.__dataclass_fields__)
        return tuple(item for item in found if isinstance(item, (Numbers, Histogram)))


def exposition(families: Iterable[Numbers | Histogram]) -> str:
    """Prometheus's text format, version 0.0.4."""
    lines: list[str] = []
    for family in families:
        lines.append(f"# HELP {family.name} {family.text}")
        lines.append(f"# TYPE {family.name} {family.kind}")
        if isinstance(family, Numbers):
            lines += [
                f"{family.name}{_labels(family.labels, values)} {_number(number)}"
                for values, number in family.series()
            ]
            continue
        for values, found in family.series():
            so_far = 0
            for bound, count in zip((*family.bounds, None), found.counts, strict=True):
                so_far += count
                mark = "+Inf" if bound is None else _number(bound)
                labels = _labels((*family.labels, "le"), (*values, mark))
                lines.append(f"{family.name}_bucket{labels} {so_far}")
            labels = _labels(family.labels, values)
            lines.append(f"{family.name}_sum{labels} {_number(found.total)}")
            lines.append(f"{family.name}_count{labels} {so_far}")
    return "\n".join(lines) + "\n"


def _clean(value: str) -> str:
    text = value if value.isprintable() else "".join(c if c.isprintable() else "?" for c in value)
    return text[:MAX_LABEL]


def _labels(names: Labels, values: Labels) -> str:
    if not names:
        return ""
    pairs = (
        '{}="{}"'.format(name, value.replace("\\", "\\\\").replace('"', '\\"'))
        for name, value in zip(names, values, strict=True)
    )
    return "{" + ",".join(pairs) + "}"


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(float(value))
