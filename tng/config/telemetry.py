"""What a gateway tells about itself: control interface, metrics, traces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cai.errors import SettingError
from cai.settings import Section, suggestion
from tng.config.addresses import Endpoint, parse_endpoint
from tng.config.notes import NoteKind, Notes

STEP_S = 60
"""How often metrics are sent unless told otherwise, seconds (TNG's default)."""

PROTOCOLS = ("http/protobuf", "http/json", "grpc")
"""How OTLP may travel."""


@dataclass(frozen=True, slots=True)
class Exporter:
    """Where metrics or traces go.

    Attributes:
        kind: ``stdout``, ``falcon`` or ``otlp``.
        address: base URL; empty for ``stdout``.
        protocol: one of ``PROTOCOLS``, for ``otlp``.
        headers: for each request.
        step_s: how often, seconds.
        labels: tags of ``falcon``, and its endpoint name under ``endpoint``.
    """

    kind: str
    address: str = ""
    protocol: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    step_s: int = STEP_S
    labels: tuple[tuple[str, str], ...] = ()

    def __repr__(self) -> str:
        # Headers carry credentials.
        return f"Exporter({self.kind}, {self.address})"


@dataclass(frozen=True, slots=True)
class Telemetry:
    """What is told, and where.

    Attributes:
        control: address of the control interface.
        metrics: exporter of metrics.
        traces: exporter of traces.
    """

    control: Endpoint | None = None
    metrics: Exporter | None = None
    traces: Exporter | None = None


def parse_telemetry(top: Section, notes: Notes) -> Telemetry:
    """``control_interface``, ``metric`` (or ``metrics``, as TNG's manual says) and ``trace``.

    Raises:
        SettingError: something of another shape.
    """
    if top.has("metric") and top.has("metrics"):
        raise SettingError(f"{top.where}: metric and metrics are the same setting")
    bind = top.section("admin_bind")
    if bind is not None:
        parse_endpoint(bind, default_host="0.0.0.0")  # noqa: S104 - only read
        notes.add(NoteKind.IGNORED, bind.where, "has no effect, as in TNG")
    metric = top.section("metric") or top.section("metrics")
    trace = top.section("trace")
    return Telemetry(
        _control(top.section("control_interface")),
        _one(metric, notes, traces=False),
        _one(trace, notes, traces=True),
    )


def _control(control: Section | None) -> Endpoint | None:
    if control is None:
        return None
    restful, ttrpc = control.section("restful"), control.section("ttrpc")
    control.finish()
    if ttrpc is not None:
        raise SettingError(f"{control.where}: ttrpc is not done by any version", hint="use restful")
    if restful is None:
        raise SettingError(f"{control.where}: restful is missing", hint='give {"port": 50000}')
    # It tells about peers and verdicts, so it is for this machine unless somebody says otherwise.
    return parse_endpoint(restful, default_host="127.0.0.1")


def _one(section: Section | None, notes: Notes, *, traces: bool) -> Exporter | None:
    if section is None:
        return None
    raw = section.raw("exporters")
    section.finish()
    items = [] if raw is None else raw
    if not isinstance(items, list):
        raise SettingError(f"{section.where}: exporters must be a list")
    if len(items) > 1:
        raise SettingError(f"{section.where}: one exporter at most")
    if not items:
        return None
    item = Section(items[0], where=f"{section.where}.exporters[0]")
    kind = item.text("type")
    if kind in ("oltp", "otlp"):
        exporter = _otlp(item, notes, traces=traces)
    elif kind == "stdout":
        exporter = Exporter("stdout", step_s=_step(item, STEP_S))
    elif kind == "falcon" and not traces:
        labels = {**_texts(item, "tags"), "endpoint": item.text("endpoint")}
        exporter = Exporter(
            "falcon", _url(item, "server_url"), step_s=_step(item, STEP_S),
            labels=tuple(sorted(labels.items())),
        )  # fmt: skip
    else:
        known = ("stdout", "otlp") if traces else ("stdout", "otlp", "falcon")
        raise SettingError(
            f"{item.where}: type is {kind!r}", hint=suggestion(kind, known) or f"use {known}"
        )
    if traces and kind != "stdout":
        item.finish()
    else:
        notes.ignore_unknown(item)
    return exporter


def _otlp(item: Section, notes: Notes, *, traces: bool) -> Exporter:
    protocol = item.text("protocol")
    if protocol not in PROTOCOLS:
        raise SettingError(
            f"{item.where}: protocol is {protocol!r}", hint=suggestion(protocol, PROTOCOLS)
        )
    if protocol == "grpc":
        notes.refuse(item.where, "OTLP over gRPC", "use http/protobuf; collectors take both")
    headers = tuple(sorted(_texts(item, "headers").items()))
    # In TNG the step is required for metrics and unknown for traces.
    step = STEP_S if traces else item.integer("step", least=1, most=86_400, unit="seconds")
    return Exporter("otlp", _url(item, "endpoint"), protocol, headers, step)


def _step(item: Section, default: int) -> int:
    return item.integer("step", default, least=1, most=86_400, unit="seconds")


def _url(item: Section, name: str) -> str:
    value = item.text(name)
    if not value.startswith(("http://", "https://")) or not value.isprintable() or " " in value:
        raise SettingError(f"{item.where}: {name} is not an http or https URL")
    return value


def _texts(item: Section, name: str) -> dict[str, Any]:
    value = item.raw(name)
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise SettingError(f"{item.where}: {name} must map names to strings")
    return value
