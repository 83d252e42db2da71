"""Report data and statements against the known answers of docs/spec-statement.md."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cai import jcs
from cai.attest.statement import (
    ChannelStatement,
    GpuFacts,
    Purpose,
    ReleaseStatement,
    ServedModel,
    gpu_evidence_digest,
    report_data,
    stock_report_data,
)
from cai.errors import CaiError, FormatError

SPEC = Path(__file__).resolve().parents[2] / "docs" / "spec-statement.md"

STATEMENT = ChannelStatement(
    launch_digest="ab" * 48,
    service_id="demo",
    owner_key="cd" * 32,
    models=(ServedModel("01" * 32, "02" * 32, ("remote_code",)),),
    gpu=GpuFacts("03" * 32, "04" * 32, 7),
    guest_facts={"profile": "operated"},
    ticket_digest="",
    dialects=("cai/1",),
    boot_id="05" * 16,
    epoch=3,
    session_root="06" * 32,
    session_size=2,
)


def test_report_data_known_answer() -> None:
    data = report_data(b"{}", Purpose.CHANNEL)
    assert data[48:] == bytes.fromhex("4341492d4348414e4e454c2d56310000")
    assert data[:48].hex() == (
        "72c92ce85a008ece9fb46da225677bf89314bde913032be7a6410fbf5d019bc5"
        "62a01bf718e762f3cc89e360a2783d45"
    )
    assert data[:48].hex() in SPEC.read_text()


def test_gpu_digest_known_answers_are_the_documented_ones() -> None:
    for devices in ([], [(b"\x01", b"\x02\x03")]):
        assert f"`{gpu_evidence_digest(devices).hex()}`" in SPEC.read_text()


def test_gpu_digest_keeps_parts_apart() -> None:
    assert gpu_evidence_digest([(b"ab", b"c")]) != gpu_evidence_digest([(b"a", b"bc")])
    assert gpu_evidence_digest([(b"a", b"b")]) != gpu_evidence_digest([(b"a", b""), (b"b", b"")])


@given(st.binary(max_size=48), st.binary(max_size=64), st.sampled_from(Purpose))
def test_a_stock_digest_never_equals_a_statement(
    digest: bytes, statement: bytes, purpose: Purpose
) -> None:
    assert stock_report_data(digest)[48:] == bytes(16)
    assert report_data(statement, purpose)[48:] != bytes(16)


def test_raw_callers_get_at_most_48_bytes() -> None:
    with pytest.raises(FormatError):
        stock_report_data(bytes(49))


def test_purposes_do_not_share_a_tag() -> None:
    assert len({purpose.tag for purpose in Purpose}) == len(Purpose)
    assert all(len(purpose.tag) == 16 for purpose in Purpose)


def test_channel_statement_round_trip() -> None:
    assert ChannelStatement.decode(STATEMENT.encode()) == STATEMENT


def test_channel_statement_known_answer() -> None:
    """These bytes are signed by quotes; any change of them is a change of the wire."""
    assert STATEMENT.encode() == (
        b'{"boot_id":"05050505050505050505050505050505","dialects":["cai/1"],"epoch":3,'
        b'"gpu":{"age_s":7,"digest":"' + b"03" * 32 + b'","nonce":"' + b"04" * 32 + b'"},'
        b'"guest_facts":{"profile":"operated"},"launch_digest":"' + b"ab" * 48 + b'",'
        b'"models":[{"allow":["remote_code"],"content_root":"' + b"02" * 32 + b'","root":"'
        + b"01" * 32 + b'"}],"owner_key":"' + b"cd" * 32 + b'","purpose":"channel",'
        b'"service_id":"demo","session_root":"' + b"06" * 32 + b'","session_size":2,'
        b'"ticket_digest":""}'
    )


MEMBERS = sorted(jcs.parse(STATEMENT.encode(), what="statement", limit=10_000))


@pytest.mark.parametrize("member", MEMBERS)
def test_every_member_is_required(member: str) -> None:
    value = jcs.parse(STATEMENT.encode(), what="statement", limit=10_000)
    del value[member]
    with pytest.raises(CaiError, match=r"missing|must|expected"):
        ChannelStatement.decode(jcs.canonical(value))


@pytest.mark.parametrize(
    ("member", "wrong"),
    [
        ("purpose", "release"),
        ("launch_digest", "ab" * 47),
        ("launch_digest", "AB" * 48),
        ("owner_key", "zz" * 32),
        ("models", [{"root": "01" * 32}]),
        ("models", {"root": "01" * 32}),
        ("gpu", {"digest": "03" * 32, "nonce": "04" * 32, "age_s": -1}),
        ("guest_facts", {"count": 1}),
        ("epoch", True),
        ("session_size", 0),
        ("session_size", 4097),
        ("session_root", ""),
        ("unknown", "member"),
    ],
)
def test_malformed_members_are_refused(member: str, wrong: object) -> None:
    value = jcs.parse(STATEMENT.encode(), what="statement", limit=10_000)
    value[member] = wrong
    with pytest.raises(CaiError):
        ChannelStatement.decode(jcs.canonical(value))


def test_another_spelling_of_the_same_statement_is_refused() -> None:
    with pytest.raises(FormatError, match="canonical"):
        ChannelStatement.decode(STATEMENT.encode().replace(b'"epoch":3', b'"epoch": 3'))


@given(st.binary(max_size=300))
def test_garbage_never_leaks_a_builtin_exception(data: bytes) -> None:
    with pytest.raises(CaiError):
        ChannelStatement.decode(data)


def test_release_statement_round_trip_and_strictness() -> None:
    statement = ReleaseStatement("ab" * 48, {"profile": "sealed"}, "0.1.0")
    assert ReleaseStatement.from_json(statement.to_json()) == statement
    for change in ({"purpose": "channel"}, {"extra": "x"}, {"launch_digest": ""}):
        with pytest.raises(CaiError):
            ReleaseStatement.from_json({**statement.to_json(), **change})
    assert replace(statement, agent_version="0.2.0") != statement


def test_the_documented_members_are_the_encoded_ones() -> None:
    section = SPEC.read_text().split("## 5. Channel statement")[1].split("### 5.1")[0]
    assert sorted(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == MEMBERS
