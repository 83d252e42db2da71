"""Exporters: what leaves, in which form, and that a receiver's absence harms nobody."""

from __future__ import annotations

import asyncio
import io
import json
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from cai.errors import SettingError
from tests.tng.gateways import read_request, serving
from tng.config.entries import Config, parse
from tng.operation.accesslog import Access
from tng.operation.journal import Journal
from tng.operation.otlp import metrics_message, protobuf, span, traces_message
from tng.operation.telemetry import MAX_SPANS, Exporters, otlp_url

VERIFY = {"as_addr": "http://127.0.0.1:9/as/", "policy_ids": ["default"]}
ACCESS = Access("ingress[0]", "POST", "127.0.0.1:4", "guest:80", 502, 7, error="peer", message="m")


def config(**more: Any) -> Config:
    entry = {
        "mapping": {"in": {"port": 1}, "out": {"host": "192.0.2.1", "port": 2}},
        "verify": VERIFY,
    }
    return parse({"add_ingress": [entry], **more}, where="test")


def otlp(port: int, protocol: str, **more: Any) -> dict[str, Any]:
    return {
        "type": "oltp", "protocol": protocol, "endpoint": f"http://127.0.0.1:{port}", **more,
    }  # fmt: skip


class Receiver:
    """Takes what is posted."""

    def __init__(self, status: int = 200) -> None:
        self.status = status
        self.got: list[tuple[bytes, bytes]] = []

    @asynccontextmanager
    async def running(self) -> AsyncIterator[int]:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while True:
                self.got.append(await read_request(reader))
                writer.write(f"HTTP/1.1 {self.status} X\r\ncontent-length: 0\r\n\r\n".encode())
                await writer.drain()

        async with serving(answer) as port:
            yield port


async def exported(found: Config, journal: Journal | None = None) -> Journal:
    """Everything that the exporters of a configuration send at their end."""
    journal = journal or Journal(io.StringIO())
    exporters = Exporters(found, journal)
    exporters.start()
    journal.meters.connections.add(3, "ingress[0]")
    journal.meters.handshake.observe(0.02, "ingress[0]")
    journal.access(ACCESS)
    await asyncio.sleep(0)
    await exporters.close()
    return journal


@pytest.mark.anyio
async def test_otlp_json() -> None:
    receiver = Receiver()
    async with receiver.running() as port:
        exporter = otlp(port, "http/json", step=60, headers={"x-key": "k"})
        await exported(config(metric={"exporters": [exporter]}))
    ((head, body),) = receiver.got
    assert head.startswith(b"POST /v1/metrics ")
    assert b"x-key: k" in head
    assert b"content-type: application/json" in head
    scoped = json.loads(body)["resourceMetrics"][0]["scopeMetrics"][0]["metrics"]
    by_name = {metric["name"]: metric for metric in scoped}
    (point,) = by_name["tng_connections_total"]["sum"]["dataPoints"]
    assert point["asDouble"] == 3
    assert point["attributes"] == [{"key": "entry", "value": {"stringValue": "ingress[0]"}}]
    (point,) = by_name["tng_handshake_seconds"]["histogram"]["dataPoints"]
    assert (point["count"], point["sum"]) == ("1", 0.02)
    # TNG's own names, for dashboards that were made for it.
    (point,) = by_name["cx_total"]["sum"]["dataPoints"]
    told = {item["key"]: item["value"]["stringValue"] for item in point["attributes"]}
    assert told == {"ingress_type": "mapping", "ingress_id": "0"}


@pytest.mark.anyio
async def test_spans_say_no_more_than_the_access_log() -> None:
    receiver = Receiver()
    async with receiver.running() as port:
        await exported(config(trace={"exporters": [otlp(port, "http/json")]}))
    ((head, body),) = receiver.got
    assert head.startswith(b"POST /v1/traces ")
    (made,) = json.loads(body)["resourceSpans"][0]["scopeSpans"][0]["spans"]
    assert made["name"] == "tng POST"
    assert int(made["endTimeUnixNano"]) - int(made["startTimeUnixNano"]) == 7_000_000
    assert made["status"] == {"message": "peer", "code": 2}
    assert {item["key"] for item in made["attributes"]} == {
        "entry", "client", "peer", "status", "error",
    }  # fmt: skip


@pytest.mark.anyio
async def test_falcon() -> None:
    receiver = Receiver()
    async with receiver.running() as port:
        exporter = {
            "type": "falcon", "server_url": f"http://127.0.0.1:{port}", "endpoint": "host-1",
            "tags": {"zone": "a,b"}, "step": 30,
        }  # fmt: skip
        await exported(config(metric={"exporters": [exporter]}))
    ((head, body),) = receiver.got
    assert head.startswith(b"POST /v1/push ")
    points = {point["metric"]: point for point in json.loads(body)}
    point = points["cx_total"]
    assert (point["endpoint"], point["step"], point["counterType"]) == ("host-1", 30, "COUNTER")
    assert point["tags"] == "ingress_id=0,ingress_type=mapping,zone=a_b"
    assert points["live"]["counterType"] == "GAUGE"
    assert points["tng_handshake_seconds_count"]["value"] == 1


@pytest.mark.anyio
async def test_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    await exported(config(metric={"exporters": [{"type": "stdout"}]}))
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert "resourceMetrics" in json.loads(line)


@pytest.mark.anyio
@pytest.mark.parametrize("status", [None, 500, 302])
async def test_a_receiver_that_fails_is_told_once_and_harms_nobody(status: int | None) -> None:
    out = io.StringIO()
    journal = Journal(out)
    receiver = Receiver(status or 500)
    async with receiver.running() as port:
        where = port if status else 9
        found = config(metric={"exporters": [otlp(where, "http/json", step=1)]})
        exporters = Exporters(found, journal)
        exporters.start()
        await asyncio.sleep(2.3)
        await exporters.close()
    assert out.getvalue().count("telemetry is not received") == 1


@pytest.mark.anyio
async def test_spans_that_nobody_takes_are_bounded() -> None:
    journal = Journal(io.StringIO())
    exporters = Exporters(config(trace={"exporters": [otlp(9, "http/json")]}), journal)
    exporters.start()
    for _ in range(MAX_SPANS + 10):
        journal.access(ACCESS)
    assert len(exporters._spans) == MAX_SPANS
    await exporters.close()


def test_grpc_is_refused_at_the_start_with_what_to_do() -> None:
    found = config(metric={"exporters": [otlp(4317, "grpc", step=60)]})
    with pytest.raises(SettingError, match=r"gRPC.*http/protobuf"):
        found.require_served()


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("http://c:4318", "http://c:4318/v1/metrics"),
        ("http://c:4318/", "http://c:4318/v1/metrics"),
        ("https://c/api/otlp/v1/metrics", "https://c/api/otlp/v1/metrics"),
    ],
)
def test_where_metrics_go(address: str, expected: str) -> None:
    assert otlp_url(address, "metrics") == expected


def fields(data: bytes) -> dict[int, list[Any]]:
    """A protobuf message, read by wire type only."""
    found: dict[int, list[Any]] = {}
    at = 0
    while at < len(data):
        number, wire = data[at] >> 3, data[at] & 7
        at += 1
        if wire == 1:
            value: Any = data[at : at + 8]
            at += 8
        else:
            size = shift = 0
            while True:
                size |= (data[at] & 127) << shift
                shift += 7
                at += 1
                if data[at - 1] < 128:
                    break
            if wire == 2:
                value = data[at : at + size]
                at += size
            else:
                assert wire == 0
                value = size
        found.setdefault(number, []).append(value)
    return found


def test_protobuf_of_metrics() -> None:
    journal = Journal(io.StringIO())
    journal.meters.connections.add(3, "ingress[0]")
    journal.meters.handshake.observe(0.02, "ingress[0]")
    message = metrics_message(journal.meters.families(), started_ns=5, now_ns=6)
    encoded = protobuf("metrics", message)
    scoped = fields(fields(fields(encoded)[1][0])[2][0])
    assert fields(scoped[1][0])[1] == [b"tng"]
    metrics = {fields(item)[1][0]: fields(item) for item in scoped[2]}
    total = fields(metrics[b"tng_connections_total"][7][0])
    assert (total[2], total[3]) == ([2], [1])
    point = fields(total[1][0])
    assert struct.unpack("<d", point[4][0]) == (3.0,)
    assert [struct.unpack("<Q", point[number][0])[0] for number in (2, 3)] == [5, 6]
    attribute = fields(point[7][0])
    assert (attribute[1], fields(attribute[2][0])[1]) == ([b"entry"], [b"ingress[0]"])
    point = fields(fields(metrics[b"tng_handshake_seconds"][9][0])[1][0])
    bounds = len(point[7][0]) // 8
    counts = struct.unpack(f"<{bounds + 1}Q", point[6][0])
    assert sum(counts) == 1
    assert struct.unpack("<Q", point[4][0]) == (1,)


def test_protobuf_of_spans() -> None:
    made = span(ACCESS, now_ns=10**18)
    encoded = protobuf("traces", traces_message([made]))
    found = fields(fields(fields(fields(encoded)[1][0])[2][0])[2][0])
    assert found[1] == [bytes.fromhex(made["traceId"])]
    assert found[2] == [bytes.fromhex(made["spanId"])]
    assert found[5] == [b"tng POST"]
    assert struct.unpack("<Q", found[8][0]) == (10**18,)
    assert fields(found[15][0]) == {2: [b"peer"], 3: [2]}
