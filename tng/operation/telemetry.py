"""Sending metrics and traces to where the configuration says, without holding up any request."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import httpx

from tng.config.entries import Config, Egress, Ingress
from tng.config.telemetry import Exporter
from tng.operation.accesslog import Access
from tng.operation.journal import Journal
from tng.operation.metrics import Histogram, Kind, Meters, Numbers
from tng.operation.otlp import metrics_message, protobuf, span, traces_message

SEND_TIMEOUT_S = 5.0
"""Longest wait for the receiver, seconds (TNG's own)."""

FALCON_TRIES = 5
"""How often one push to falcon is tried (TNG's own)."""

FALCON_PAUSE_S = 1.0
"""Between two tries, seconds (TNG's own)."""

TRACE_STEP_S = 5.0
"""How often spans are sent, seconds."""

MAX_SPANS = 2048
"""Most spans that wait to be sent; later ones are dropped."""

STOCK_NAMES = {
    "cx_total": "tng_connections_total", "cx_active": "tng_connections_active",
    "cx_failed": "tng_streams_failed_total",
}  # fmt: skip
"""TNG's own metrics and what they are here; ``live`` and the two byte counts come beside them."""


class _Send(Protocol):
    async def __call__(self, *, last: bool) -> None:
        """Send what there is."""


class Exporters:
    """The exporters of one configuration.

    Args:
        config: with its ``telemetry``.
        journal: whose meters are sent, and where a receiver's failure is told.
    """

    def __init__(self, config: Config, journal: Journal) -> None:
        self._config = config
        self._journal = journal
        self._started_ns = time.time_ns()
        self._tasks: list[asyncio.Task[None]] = []
        self._sends: list[_Send] = []
        self._spans: list[dict[str, Any]] = []
        self._client = httpx.AsyncClient(trust_env=False, timeout=SEND_TIMEOUT_S)
        self._failed = ""

    def start(self) -> None:
        """Begin to send (inside a running loop)."""
        metrics, traces = self._config.telemetry.metrics, self._config.telemetry.traces
        if metrics is not None:
            self._every(float(metrics.step_s), self._metrics_sender(metrics))
        if traces is not None:
            self._journal.listen(self._keep_span)
            self._every(TRACE_STEP_S, self._traces_sender(traces))

    async def close(self) -> None:
        """Send the rest, for at most ``SEND_TIMEOUT_S``, and stop."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._tasks:
            sends = (self._attempt(send, last=True) for send in self._sends)
            await asyncio.wait(
                [asyncio.create_task(send) for send in sends], timeout=SEND_TIMEOUT_S
            )
        self._tasks.clear()
        await self._client.aclose()

    def _every(self, step_s: float, send: _Send) -> None:
        async def run() -> None:
            while True:
                await asyncio.sleep(step_s)
                await self._attempt(send, last=False)

        self._sends.append(send)
        self._tasks.append(asyncio.create_task(run()))

    async def _attempt(self, send: _Send, *, last: bool) -> None:
        try:
            await send(last=last)
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
            # Told once, not every step: a receiver may be away for long.
            reason = f"{type(error).__name__}: {error}"
            if reason != self._failed:
                self._journal.line(f"telemetry is not received: {reason}")
            self._failed = reason
        else:
            self._failed = ""

    def _metrics_sender(self, exporter: Exporter) -> _Send:
        if exporter.kind == "falcon":
            return lambda *, last: self._push(exporter, tries=1 if last else FALCON_TRIES)

        async def send(*, last: bool) -> None:
            del last
            message = metrics_message(
                self._families(), started_ns=self._started_ns, now_ns=time.time_ns()
            )
            await self._deliver(exporter, "metrics", message)

        return send

    def _traces_sender(self, exporter: Exporter) -> _Send:
        async def send(*, last: bool) -> None:
            del last
            spans, self._spans = self._spans, []
            if spans:
                await self._deliver(exporter, "traces", traces_message(spans))

        return send

    async def _deliver(self, exporter: Exporter, kind: str, message: dict[str, Any]) -> None:
        if exporter.kind == "stdout":
            text = json.dumps(message, separators=(",", ":")) + "\n"
            await asyncio.to_thread(_print, text)
            return
        if exporter.protocol == "http/json":
            body, form = json.dumps(message, separators=(",", ":")).encode(), "application/json"
        else:
            body, form = protobuf(kind, message), "application/x-protobuf"
        headers = [*exporter.headers, ("content-type", form)]
        url = otlp_url(exporter.address, kind)
        answer = await self._client.post(url, content=body, headers=headers)
        answer.raise_for_status()

    async def _push(self, exporter: Exporter, *, tries: int) -> None:
        body = falcon_points(exporter, self._families(), now_s=int(time.time()))
        url = exporter.address.rstrip("/") + "/v1/push"
        for number in range(tries):
            try:
                answer = await self._client.post(url, json=body)
                answer.raise_for_status()
            except (httpx.HTTPError, OSError):
                if number + 1 == tries:
                    raise
                await asyncio.sleep(FALCON_PAUSE_S)
            else:
                return

    def _families(self) -> tuple[Numbers | Histogram, ...]:
        meters = self._journal.meters
        return (*stock_families(self._config, meters), *meters.families())

    def _keep_span(self, access: Access) -> None:
        if len(self._spans) < MAX_SPANS:
            self._spans.append(span(access, now_ns=time.time_ns()))


def otlp_url(address: str, kind: str) -> str:
    """Where messages go: the address as it is, or under ``/v1/`` when it has no path."""
    base = address.rstrip("/")
    return f"{base}/v1/{kind}" if base.count("/") == 2 else address


def falcon_points(
    exporter: Exporter, families: Iterable[Numbers | Histogram], *, now_s: int
) -> list[dict[str, object]]:
    """The body of a push: one point a series; of a histogram its count and its sum."""
    labels = dict(exporter.labels)
    endpoint = labels.pop("endpoint", "")
    points: list[dict[str, object]] = []

    def add(name: str, family: Numbers | Histogram, values: tuple[str, ...], value: float) -> None:
        tags = labels | dict(zip(family.labels, values, strict=True))
        gauge = family.kind is Kind.GAUGE
        points.append(
            {
                "endpoint": endpoint, "metric": name, "timestamp": now_s, "step": exporter.step_s,
                "value": value, "counterType": "GAUGE" if gauge else "COUNTER",
                "tags": ",".join(f"{key}={_tag(text)}" for key, text in sorted(tags.items())),
            }
        )  # fmt: skip

    for family in families:
        if isinstance(family, Histogram):
            for values, found in family.series():
                add(f"{family.name}_count", family, values, found.count)
                add(f"{family.name}_sum", family, values, found.total)
        else:
            for values, value in family.series():
                add(family.name, family, values, value)
    return points


def stock_families(config: Config, meters: Meters) -> tuple[Numbers, ...]:
    """The same numbers under TNG's own names, so that dashboards made for it go on."""
    live = Numbers("live", "1 while it runs.", kind=Kind.GAUGE)
    live.set(1)
    found = [live]
    for side, entries in (("ingress", config.ingress), ("egress", config.egress)):
        labels = (f"{side}_type", f"{side}_id")
        for name, ours in STOCK_NAMES.items():
            source = next(family for family in meters.families() if family.name == ours)
            if isinstance(source, Numbers):
                stock = Numbers(name, source.text, labels, kind=source.kind)
                _fill(stock, entries, lambda entry, source=source: source.value(entry))  # type: ignore[misc]
                found.append(stock)
        for name, direction in (("tx_bytes_total", "out"), ("rx_bytes_total", "in")):
            stock = Numbers(name, meters.bytes.text, labels)
            _fill(stock, entries, lambda entry, way=direction: meters.bytes.value(entry, way))  # type: ignore[misc]
            found.append(stock)
    return tuple(found)


def _fill(
    family: Numbers, entries: Iterable[Ingress | Egress], value: Callable[[str], float]
) -> None:
    for number, entry in enumerate(entries):
        family.set(value(entry.name), type(entry.mode).__name__.lower(), str(number))


def _tag(text: str) -> str:
    return text.replace(",", "_").replace("=", "_")


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
