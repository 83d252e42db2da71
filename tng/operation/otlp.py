"""OTLP over HTTP: metrics and spans as JSON, and the same messages as protobuf.

The JSON form is the protobuf form by other names (opentelemetry-proto 1.x, "OTLP/HTTP"), so one
table of field numbers turns the one into the other.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cai import __version__
from cai.attest.ttrpc import bytes_field, varint_field
from tng.operation.accesslog import Access
from tng.operation.metrics import Histogram, Kind, Labels, Numbers

CUMULATIVE = 2
"""AGGREGATION_TEMPORALITY_CUMULATIVE."""

SPAN_SERVER = 2
"""SPAN_KIND_SERVER."""

STATUS_ERROR = 2
"""STATUS_CODE_ERROR."""

INSTANCE = secrets.token_hex(8)
"""Tells the processes of one gateway apart, whose counts a collector may not mix up."""

_SCALARS = ("string", "hex", "double", "fixed64", "fixed64s", "doubles", "enum", "bool")

_MESSAGES: dict[str, dict[str, tuple[int, str]]] = {
    "metrics": {"resourceMetrics": (1, "resourceMetrics")},
    "traces": {"resourceSpans": (1, "resourceSpans")},
    "resourceMetrics": {"resource": (1, "resource"), "scopeMetrics": (2, "scopeMetrics")},
    "resourceSpans": {"resource": (1, "resource"), "scopeSpans": (2, "scopeSpans")},
    "resource": {"attributes": (1, "attribute")},
    "scopeMetrics": {"scope": (1, "scope"), "metrics": (2, "metric")},
    "scopeSpans": {"scope": (1, "scope"), "spans": (2, "span")},
    "scope": {"name": (1, "string"), "version": (2, "string")},
    "attribute": {"key": (1, "string"), "value": (2, "value")},
    "value": {"stringValue": (1, "string")},
    "metric": {
        "name": (1, "string"), "description": (2, "string"), "unit": (3, "string"),
        "gauge": (5, "numbers"), "sum": (7, "numbers"), "histogram": (9, "histogram"),
    },
    "numbers": {
        "dataPoints": (1, "number"), "aggregationTemporality": (2, "enum"),
        "isMonotonic": (3, "bool"),
    },
    "histogram": {"dataPoints": (1, "distribution"), "aggregationTemporality": (2, "enum")},
    "number": {
        "startTimeUnixNano": (2, "fixed64"), "timeUnixNano": (3, "fixed64"),
        "asDouble": (4, "double"), "attributes": (7, "attribute"),
    },
    "distribution": {
        "startTimeUnixNano": (2, "fixed64"), "timeUnixNano": (3, "fixed64"),
        "count": (4, "fixed64"), "sum": (5, "double"), "bucketCounts": (6, "fixed64s"),
        "explicitBounds": (7, "doubles"), "attributes": (9, "attribute"),
    },
    "span": {
        "traceId": (1, "hex"), "spanId": (2, "hex"), "name": (5, "string"), "kind": (6, "enum"),
        "startTimeUnixNano": (7, "fixed64"), "endTimeUnixNano": (8, "fixed64"),
        "attributes": (9, "attribute"), "status": (15, "status"),
    },
    "status": {"message": (2, "string"), "code": (3, "enum")},
}  # fmt: skip


def metrics_message(
    families: Iterable[Numbers | Histogram], *, started_ns: int, now_ns: int
) -> dict[str, Any]:
    """An ExportMetricsServiceRequest.

    Args:
        families: to tell.
        started_ns: when counting began, nanoseconds since 1970.
        now_ns: the time of these numbers.
    """
    when = {"startTimeUnixNano": str(started_ns), "timeUnixNano": str(now_ns)}
    metrics: list[dict[str, Any]] = []
    for family in families:
        told: dict[str, Any] = {"name": family.name, "description": family.text}
        points: list[dict[str, Any]]
        if isinstance(family, Histogram):
            points = [
                {
                    "attributes": _attributes(family.labels, values), **when,
                    "count": str(found.count), "sum": found.total,
                    "bucketCounts": [str(count) for count in found.counts],
                    "explicitBounds": list(family.bounds),
                }
                for values, found in family.series()
            ]  # fmt: skip
            told["histogram"] = {"dataPoints": points, "aggregationTemporality": CUMULATIVE}
        else:
            points = [
                {"attributes": _attributes(family.labels, values), **when, "asDouble": float(value)}
                for values, value in family.series()
            ]
            if family.kind is Kind.GAUGE:
                told["gauge"] = {"dataPoints": points}
            else:
                told["sum"] = {
                    "dataPoints": points, "aggregationTemporality": CUMULATIVE, "isMonotonic": True,
                }  # fmt: skip
        if points:
            metrics.append(told)
    scoped = [{"scope": _scope(), "metrics": metrics}]
    return {"resourceMetrics": [{"resource": _resource(), "scopeMetrics": scoped}]}


def span(access: Access, *, now_ns: int) -> dict[str, Any]:
    """One request as a span; it says what the access log says and no more."""
    attributes = {
        name: str(value)
        for name, value in access.to_json().items()
        if name not in ("what", "ms", "message")
    }
    made: dict[str, Any] = {
        "traceId": secrets.token_hex(16), "spanId": secrets.token_hex(8),
        "name": f"tng {access.what}", "kind": SPAN_SERVER,
        "startTimeUnixNano": str(now_ns - access.elapsed_ms * 1_000_000),
        "endTimeUnixNano": str(now_ns),
        "attributes": _attributes(tuple(attributes), tuple(attributes.values())),
    }  # fmt: skip
    if access.error:
        made["status"] = {"message": access.error, "code": STATUS_ERROR}
    return made


def traces_message(spans: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """An ExportTraceServiceRequest."""
    scoped = [{"scope": _scope(), "spans": list(spans)}]
    return {"resourceSpans": [{"resource": _resource(), "scopeSpans": scoped}]}


def protobuf(kind: str, message: Mapping[str, Any]) -> bytes:
    """The protobuf form of a message.

    Args:
        kind: ``metrics``, ``traces``, or a message inside them.
        message: in the JSON form.
    """
    parts: list[bytes] = []
    for name, (number, form) in _MESSAGES[kind].items():
        value = message.get(name)
        if value is None:
            continue
        if form in _SCALARS:
            parts.append(_scalar(number, form, value))
            continue
        items = value if isinstance(value, list) else [value]
        parts += [bytes_field(number, protobuf(form, item)) for item in items]
    return b"".join(parts)


def _scalar(number: int, form: str, value: Any) -> bytes:
    if form == "string":
        return bytes_field(number, value.encode())
    if form == "hex":
        return bytes_field(number, bytes.fromhex(value))
    if form in ("enum", "bool"):
        return varint_field(number, int(value))
    if form == "fixed64s":
        return bytes_field(number, struct.pack(f"<{len(value)}Q", *map(int, value)))
    if form == "doubles":
        return bytes_field(number, struct.pack(f"<{len(value)}d", *value))
    # Wire type 1, 64 bits; every field number here is below 16.
    tag = bytes([number << 3 | 1])
    return tag + (struct.pack("<d", value) if form == "double" else struct.pack("<Q", int(value)))


def _resource() -> dict[str, Any]:
    names = ("service.name", "service.version", "service.instance.id")
    return {"attributes": _attributes(names, ("tng", __version__, INSTANCE))}


def _scope() -> dict[str, str]:
    return {"name": "tng", "version": __version__}


def _attributes(names: Labels, values: Labels) -> list[dict[str, Any]]:
    return [
        {"key": name, "value": {"stringValue": value}}
        for name, value in zip(names, values, strict=True)
    ]
