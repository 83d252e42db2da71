"""The strict parser of GPU reports."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cai.attest.gpu.report import MAX_REPORT, Report, parse_report
from cai.errors import FormatError, LimitExceeded

NONCE = bytes(range(32))
HEAD = bytes((0x11, 0xE0, 0x01, 0xFF))


def block(index: int, *, specification: int = 1, size: int = 51, inner: int = 48) -> bytes:
    return (
        bytes((index, specification)) + size.to_bytes(2, "little") + b"\x01"
        + inner.to_bytes(2, "little") + bytes((index,)) * 48
    )  # fmt: skip


def field(kind: int, value: bytes, *, size: int | None = None) -> bytes:
    length = len(value) if size is None else size
    return kind.to_bytes(2, "little") + length.to_bytes(2, "little") + value


GOOD_OPAQUE = field(3, b"580.95.05\x00") + field(6, bytes.fromhex("007400961a000000"))


def report(
    *, head: bytes = HEAD, response: bytes = b"\x11\x60\x00\x00", blocks: bytes | None = None,
    count: int | None = None, record_extra: int = 0, opaque: bytes = GOOD_OPAQUE,
    opaque_extra: int = 0, after: bytes = b"",
) -> bytes:
    record = block(1) + block(2) if blocks is None else blocks
    counted = len(record) // 55 if count is None else count
    return (
        head + NONCE + b"\x00" + response + bytes((counted,))
        + (len(record) + record_extra).to_bytes(3, "little") + record + b"r" * 32
        + (len(opaque) + opaque_extra).to_bytes(2, "little") + opaque + b"s" * 96 + after
    )  # fmt: skip


def test_every_field_has_its_place() -> None:
    opaque = GOOD_OPAQUE + field(20, b"f" * 48) + field(36, b"\x02\x00") + field(11, b"\xaa")
    parsed = parse_report(report(opaque=opaque))
    assert parsed.nonce == NONCE
    assert parsed.measurements == {1: b"\x01" * 48, 2: b"\x02" * 48}
    assert parsed.driver_version == "580.95.05"
    assert parsed.vbios_version == "96.00.74.00.1A"
    assert parsed.fwid == b"f" * 48
    assert parsed.feature_flag == 2
    assert parsed.nvdec0_status == 0xAA
    assert parsed.signature == b"s" * 96
    assert parsed.signed + parsed.signature == report(opaque=opaque)


def test_a_switch_spells_its_vbios_version() -> None:
    parsed = parse_report(report(opaque=field(6, b"96.10.55.00.01\x00")))
    assert parsed.vbios_version == "96.10.55.00.01"


def test_absent_fields_are_absent() -> None:
    parsed = parse_report(report(opaque=b""))
    assert (parsed.driver_version, parsed.vbios_version) == ("", "")
    assert (parsed.fwid, parsed.feature_flag, parsed.nvdec0_status) == (None, None, None)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "does not start"),
        (report(head=b"\x12\xe0\x01\xff"), "does not start"),
        (report(head=b"\x11\xe0\x00\xff"), "does not start"),
        (report(head=b"\x11\xe0\x01\x01"), "does not start"),
        (report()[:40], "MEASUREMENTS response"),
        (report(response=b"\x12\x60\x00\x00"), "MEASUREMENTS response"),
        (report(response=b"\x11\x61\x00\x00"), "MEASUREMENTS response"),
        (report(count=3), "3 blocks"),
        (report(count=1), "1 blocks"),
        (report(count=0, blocks=b""), "not numbered"),
        (report(record_extra=2**23), "ends inside measurements"),
        (report(blocks=block(1) + block(1)), "stands twice"),
        (report(blocks=block(1) + block(3)), "not numbered"),
        (report(blocks=block(0) + block(1)), "not numbered"),
        (report(blocks=block(1, specification=2)), "DMTF"),
        (report(blocks=block(1, size=50)), "DMTF"),
        (report(blocks=block(1, inner=32)), "DMTF"),
        (report()[:-1], "ends inside signature"),
        (report(after=b"\x00"), "after the signature"),
        (report(opaque_extra=1), "ends inside"),
        (report(opaque_extra=2**15), "ends inside opaque data"),
        (report(opaque=b"\x03\x00"), "opaque field head"),
        (report(opaque=field(3, b"1", size=2)), "opaque field 3"),
        (report(opaque=field(3, b"1") + field(3, b"1")), "stands twice"),
        (report(opaque=field(3, b"\x1b[31m")), "printable"),
        (report(opaque=field(3, b"1 2")), "printable"),
        (report(opaque=field(3, b"\xff")), "printable"),
        (report(opaque=field(3, b"1" * 65)), "longer"),
        (report(opaque=field(6, b"1234567")), "VBIOS"),
        (report(opaque=field(6, b"96.10.55.00")), "VBIOS"),
        (report(opaque=field(20, b"f" * 47)), "FWID"),
        (report(opaque=field(36, b"\x00")), "feature flag"),
        (report(opaque=field(11, b"\xaa\x00")), "NVDEC0"),
    ],
)
def test_refused(data: bytes, text: str) -> None:
    with pytest.raises(FormatError, match=text):
        parse_report(data)


def test_a_report_has_a_limit() -> None:
    with pytest.raises(LimitExceeded):
        parse_report(report(after=bytes(MAX_REPORT)))


def outcome(data: bytes) -> Report | None:
    try:
        return parse_report(data)
    except (FormatError, LimitExceeded):
        return None


@given(st.binary(max_size=600))
def test_arbitrary_bytes_leak_nothing(data: bytes) -> None:
    assert outcome(data) is None
    assert outcome(HEAD + NONCE + b"\x00\x11\x60" + data) is None or len(data) > 100


@given(st.integers(0, len(report()) - 1), st.binary(min_size=1, max_size=9), st.booleans())
def test_altered_reports_leak_nothing(at: int, patch: bytes, cut: bool) -> None:
    data = report()
    outcome(data[:at] + patch + (b"" if cut else data[at + len(patch) :]))
