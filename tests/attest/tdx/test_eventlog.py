"""Event logs: replay of real ones, the launch rule, and that no crafted log leaks anything."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import struct
from datetime import UTC, datetime
from hashlib import sha384
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cai import jcs
from cai.attest.tdx.event_claims import MAX_CLAIMS, event_claims
from cai.attest.tdx.eventlog import (
    EV_EVENT_TAG,
    EV_NO_ACTION,
    MAX_EVENT_LOG,
    MAX_EVENTS,
    launched,
    parse_event_log,
)
from cai.attest.tdx.quote import parse_quote
from cai.attest.tdx.runtime_events import launch_events, replay, tagged_event
from cai.errors import FormatError, LimitExceeded

ROOT = Path(__file__).resolve().parents[3]
VECTORS = ROOT / os.environ.get("CAI_VECTORS", "../shared/vectors")
EVIDENCE = VECTORS / "evidence"
TRUSTEE = VECTORS / "trustee" / "eventlog"

SEPARATOR = bytes(4)


def header(algorithms: tuple[tuple[int, int], ...] = ((12, 48),), vendor: bytes = b"") -> bytes:
    body = b"Spec ID Event03\x00" + bytes(4) + b"\x00\x02\x00\x02"
    body += struct.pack("<I", len(algorithms))
    body += b"".join(struct.pack("<HH", *item) for item in algorithms)
    body += bytes((len(vendor),)) + vendor
    return struct.pack("<II", 0, EV_NO_ACTION) + bytes(20) + struct.pack("<I", len(body)) + body


def record(register: int, kind: int, data: bytes, digest: bytes | None = None) -> bytes:
    value = sha384(data).digest() if digest is None else digest
    return (
        struct.pack("<IIIH", register, kind, 1, 12) + value + struct.pack("<I", len(data)) + data
    )


def log_of(*records: bytes, padding: bytes = b"\xff" * 8) -> bytes:
    return header() + b"".join(records) + padding


def runtime(*texts: str) -> bytes:
    return log_of(*(record(4, EV_EVENT_TAG, tagged_event(text)) for text in texts))


def manifest() -> dict[str, Any]:
    path = EVIDENCE / "tdx" / "manifest.json"
    value: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return value


LOGS = [(name, item) for name, item in manifest().get("eventlog", {}).items()
        if "format" in item]  # fmt: skip

needs_vectors = pytest.mark.skipif(not LOGS, reason="no evidence vectors (set CAI_VECTORS)")


@needs_vectors
@pytest.mark.parametrize(("name", "item"), LOGS)
def test_real_logs(name: str, item: dict[str, Any]) -> None:
    data = (EVIDENCE / item["file"]).read_bytes()
    if 12 not in item.get("algorithms", [12]):
        with pytest.raises(FormatError, match="SHA-384"):
            parse_event_log(data)
        return
    log = parse_event_log(data)
    registers = log.replay()
    for place, register in enumerate(registers):
        assert register.hex() == item.get("rtmr", {}).get(f"rtmr{place}", register.hex())
    quotes = {quote["name"]: quote["file"] for quote in manifest()["quotes"]}
    if item.get("matches_quote") in quotes:
        body = parse_quote((EVIDENCE / quotes[item["matches_quote"]]).read_bytes()).body
        for place, register in enumerate(registers):
            same = body[f"rtmr_{place}"] == register
            assert same is item["match"][f"rtmr{place}"], place


@needs_vectors
def test_a_log_that_fits_a_local_report() -> None:
    report = (EVIDENCE / "tdx/eventlog/attestation-rs-tdreport-1.bin").read_bytes()
    log = parse_event_log((EVIDENCE / "tdx/eventlog/attestation-rs-ccel-1.bin").read_bytes())
    assert log.replay() == tuple(report[at : at + 48] for at in (720, 768, 816, 864))
    with pytest.raises(FormatError):
        parse_quote(report)


@needs_vectors
@pytest.mark.parametrize(
    ("log", "failing"),
    [("cos-113-ccel.bin", set()), ("cos-113-dupe-separator-ccel.bin", {"tdx.event_log"}),
     ("trustee-CCEL_data_csv.bin", {"tdx.event_log"})],
)  # fmt: skip
def test_a_log_is_a_hard_check(log: str, failing: set[str]) -> None:
    from cai.attest.anchors import vendor_anchors
    from cai.attest.evidence import Evidence
    from cai.attest.tdx.collateral import CollateralStore, parse_collateral
    from cai.attest.verify import verify_evidence

    quote = next(item for item in manifest()["quotes"] if "cos113" in item["name"])
    expect = quote["expect"]
    path = EVIDENCE / "tdx" / "collateral" / f"{expect['collateral']}.json"
    item = parse_collateral(path.read_bytes(), where=path.name)
    assert item is not None
    data = (EVIDENCE / quote["file"]).read_bytes()
    verdict, facts = verify_evidence(
        Evidence(data, event_log=(EVIDENCE / "tdx/eventlog" / log).read_bytes()), subject="guest",
        report_data=parse_quote(data).body["report_data"], gpu_nonce=None,
        anchors=vendor_anchors(), collateral=CollateralStore([item]),
        now=datetime.fromtimestamp(expect["at_unix"], UTC), require_agreement=True,
    )  # fmt: skip
    # The vector's guest lacks SEPT_VE_DISABLE or not; only what concerns the log is asked here.
    failed = {item.name for item in verdict.failures}
    assert failed == failing
    assert (facts is None) == bool(failing)
    if facts is not None:
        assert facts.runtime_events == ()
        assert facts.event_claims
        assert facts.from_json(json.loads(jcs.canonical(facts.to_json()))) == facts


QUIRKS = {"td_hob"}
"""Trustee shows an empty text for this one event; we show its name."""


@pytest.mark.skipif(not TRUSTEE.exists(), reason="no trustee vectors (set CAI_VECTORS)")
@pytest.mark.parametrize(
    "name",
    ["CCEL_AAEL_alibabacloud", "CCEL_data", "CCEL_data_grub", "CCEL_data_grub_gke",
     "CCEL_data_ovmf"],
)  # fmt: skip
def test_claims_are_trustees(name: str) -> None:
    path = TRUSTEE / name
    packed = TRUSTEE / f"{name}.gz"
    data = path.read_bytes() if path.exists() else gzip.decompress(packed.read_bytes())
    expected = json.loads((TRUSTEE / f"{name}_parsed.json").read_text())["uefi_event_logs"]
    claims = event_claims(parse_event_log(data))
    assert claims is not None
    assert len(claims) == len(expected)
    for ours, theirs in zip(claims, expected, strict=True):
        if ours["details"].get("string") in QUIRKS:  # type: ignore[attr-defined]
            continue
        assert ours == theirs


def test_launch_and_ready() -> None:
    launch = b'{"launch":1}'
    events = [data[8:].decode() for data in launch_events(launch)]
    log = parse_event_log(runtime(*events))
    assert log.runtime_events() == tuple(events)
    assert log.replay()[3] == replay(launch_events(launch))
    assert launched(log.runtime_events()) == sha384(launch).hexdigest()


GOOD = f"cai launch {'ab' * 48}"


@pytest.mark.parametrize(
    "events",
    [
        [], [GOOD], ["cai ready"], ["cai ready", GOOD], [GOOD, GOOD], [GOOD, "cai ready", "more"],
        ["first", GOOD, "cai ready"], [GOOD, "between", "cai ready"], [GOOD, GOOD, "cai ready"],
        [GOOD, "cai ready", "cai ready"], [GOOD, "cai ready "], [GOOD.upper(), "cai ready"],
        ["cai launch " + "ab" * 47, "cai ready"], ["cai launch " + "AB" * 48, "cai ready"],
        ["cai launch  " + "ab" * 48, "cai ready"], [GOOD + " x", "cai ready"],
    ],
)  # fmt: skip
def test_anything_else_is_no_launch(events: list[str]) -> None:
    assert launched(parse_event_log(runtime(*events)).runtime_events()) is None


def test_text_counts_only_where_the_digest_covers_it() -> None:
    data = tagged_event(GOOD)
    others = {
        "another digest": record(4, EV_EVENT_TAG, data, sha384(b"other").digest()),
        "another type": record(4, 5, data),
        "another tag": record(4, EV_EVENT_TAG, b"XXXX" + data[4:]),
        "another size": record(4, EV_EVENT_TAG, data + b"x"),
        "not UTF-8": record(4, EV_EVENT_TAG, data[:8] + b"\xff" * (len(data) - 8)),
        "empty": record(4, EV_EVENT_TAG, b""),
    }
    for what, item in others.items():
        (text,) = parse_event_log(log_of(item)).runtime_events()
        assert text.startswith("sha384:"), what
    elsewhere = parse_event_log(log_of(record(3, EV_EVENT_TAG, data)))
    assert elsewhere.runtime_events() == ()


def test_no_action_extends_nothing() -> None:
    quiet = log_of(record(1, EV_NO_ACTION, b"x"), record(0, EV_NO_ACTION, b"y"))
    assert parse_event_log(quiet).replay() == (bytes(48),) * 4
    assert parse_event_log(log_of(record(1, 4, SEPARATOR))).replay()[0] != bytes(48)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "ends inside"),
        (header()[:-1], "ends inside"),
        (header() + b"\x01", "ends inside"),
        (log_of(record(1, 4, SEPARATOR))[:-12], "ends inside"),
        (header().replace(b"Event03", b"Event02"), "crypto-agile"),
        (header().replace(b"\x00\x02\x00\x02", b"\x01\x02\x00\x02"), "not 2.0"),
        (b"\x01" * 8 + header()[8:], "specification record"),
        (header()[:8] + b"\x01" + header()[9:], "has a digest"),
        (header(((11, 32),)), "SHA-384"),
        (header(((12, 47),)), "of 47 bytes"),
        (header(((12, 48), (12, 48))), "of 48 bytes"),
        (header(((0x99, 8), (12, 48))), "of 8 bytes"),
        (log_of(record(5, 4, SEPARATOR)), "names register 5"),
        (log_of(record(0, 4, SEPARATOR)), "names register 0"),
        (log_of(record(1, 4, SEPARATOR), padding=b"\xff" * 8 + b"\x00"), "follows its end"),
        (log_of(padding=bytes(8) + record(1, 4, SEPARATOR)), "follows its end"),
        (header() + struct.pack("<III", 1, 4, 0), "0 digests"),
        (header() + struct.pack("<III", 1, 4, 2), "2 digests"),
        (header() + struct.pack("<IIIH", 1, 4, 1, 11) + bytes(32), "not announced"),
        (header(((11, 32), (12, 48))) + struct.pack("<IIIH", 1, 4, 1, 11) + bytes(36),
         "without SHA-384"),
        (header(((11, 32), (12, 48))) + struct.pack("<IIIH", 1, 4, 2, 12) + bytes(48)
         + struct.pack("<H", 12) + bytes(52), "twice"),
        (log_of(record(1, 4, SEPARATOR)[:-8] + b"\xff\xff\xff\x7f"), "ends inside event data"),
        (b"[1]", "not an object"),
        (b"[{}]", "register or type"),
        (b'[{"imr":4,"event_type":1}]', "register or type"),
        (b'[{"imr":true,"event_type":1}]', "register or type"),
        (b'[{"imr":0,"event_type":4294967296}]', "out of range"),
        (b'[{"imr":0,"event_type":1,"digest":"00"}]', "not of SHA-384"),
        (b'[{"imr":0,"event_type":1,"digest":"zz"}]', "hex"),
        (b'[{"imr":0,"event_type":1,"event":1}]', "name"),
        (b"[", "not JSON"),
    ],
)
def test_malformed_logs(data: bytes, message: str) -> None:
    with pytest.raises((FormatError, LimitExceeded), match=message):
        parse_event_log(data)


def test_limits() -> None:
    with pytest.raises(LimitExceeded, match="bytes"):
        parse_event_log(b"\xff" * (MAX_EVENT_LOG + 1))
    with pytest.raises(LimitExceeded, match="events"):
        parse_event_log(log_of(record(1, 4, b"") * (MAX_EVENTS + 1)))
    with pytest.raises(LimitExceeded, match="algorithms"):
        parse_event_log(header(tuple((item, 1) for item in range(9))))
    many = parse_event_log(log_of(record(1, 4, bytes(64)) * 1000))
    assert event_claims(many) is None
    few = event_claims(parse_event_log(log_of(record(1, 4, bytes(64)) * 10)))
    assert few is not None
    assert len(json.dumps(few)) < MAX_CLAIMS


@settings(max_examples=200)
@given(st.binary(max_size=400), st.booleans())
def test_arbitrary_bytes_leak_nothing(data: bytes, started: bool) -> None:
    with contextlib.suppress(FormatError, LimitExceeded):
        log = parse_event_log(header() + data if started else data)
        log.replay()
        jcs.canonical(event_claims(log))


KINDS = st.sampled_from([1, 4, 6, 0xA, 0xD, 0x80000001, 0x80000002, 0x80000003, 0x8000000A])


@settings(max_examples=300)
@given(st.lists(st.tuples(KINDS, st.binary(max_size=120)), max_size=4))
def test_claims_of_arbitrary_events_can_be_written(events: list[tuple[int, bytes]]) -> None:
    log = parse_event_log(log_of(*(record(1, kind, data) for kind, data in events)))
    claims = event_claims(log)
    assert claims is not None
    assert json.loads(jcs.canonical(claims)) == claims


@settings(max_examples=100)
@given(st.text(max_size=80), st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
))  # fmt: skip
def test_runtime_events_hold_any_text(text: str, value: Any) -> None:
    for content in (text, json.dumps(value), "[" * 200):
        with contextlib.suppress(UnicodeEncodeError):
            claims = event_claims(parse_event_log(runtime(f"domain operation {content}")))
            jcs.canonical({"submods": {"cpu0": {"tdx": {"uefi_event_logs": claims}}}})


def test_every_flipped_byte_of_a_log() -> None:
    """A flip is refused, changes a register, or is in text that no digest covers."""
    uncovered = record(1, 0x8000000A, b"\x04name", sha384(b"the blob").digest())
    data = log_of(record(1, 4, SEPARATOR), uncovered,
                  *(record(4, EV_EVENT_TAG, event) for event in launch_events(b"{}")))  # fmt: skip
    good = parse_event_log(data)
    silent = set()
    for at in range(len(data)):
        altered = bytearray(data)
        altered[at] ^= 0x01
        with contextlib.suppress(FormatError, LimitExceeded):
            log = parse_event_log(bytes(altered))
            if log.replay() == good.replay():
                silent.add(at)
                assert launched(log.runtime_events()) in (None, launched(good.runtime_events()))
    # Never measured by anybody: the specification record, event types, data without a digest.
    position, unmeasured = len(header()), set(range(len(header())))
    for event in good.events:
        unmeasured |= set(range(position + 4, position + 8))
        start = position + 12 + 2 + 48 + 4
        position = start + len(event.data)
        unmeasured |= set(range(start, position))
    assert silent <= unmeasured
    assert silent & set(range(position - 8, position))  # data of a covered event: text is gone
