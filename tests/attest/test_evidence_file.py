"""Evidence in files: three forms are read, and a statement counts once the quote binds it."""

from __future__ import annotations

import base64
import contextlib
import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cai.attest.anchors import simulated_anchors
from cai.attest.evidence import DeviceEvidence, Evidence
from cai.attest.evidence_file import (
    MAX_EVIDENCE_FILE,
    RISK_FRESHNESS,
    EvidenceFile,
    decode_evidence,
    undecided,
    verify_file,
)
from cai.attest.facts import Facts
from cai.attest.policy import VerificationPolicy
from cai.attest.statement import ChannelStatement, GpuFacts, Purpose, report_data
from cai.attest.tdx.collateral import CollateralStore, load_collateral
from cai.attest.verdict import Verdict, check
from cai.errors import CaiError, LimitExceeded

if TYPE_CHECKING:
    from cai.attest.sim import SimulatedPlatform

POLICY = VerificationPolicy.parse(
    b"""
version = 1
profile = "operated"
[tdx]
unsafe_any_mr_td = true
unsafe_any_rtmr0 = true
unsafe_any_rtmr1 = true
unsafe_any_rtmr2 = true
unsafe_any_rtmr3 = true
unsafe_any_xfam = true
[gpu]
count = 1
unsafe_without_rim = true
unsafe_without_ocsp = true
[guest]
launch_digest = ["%s"]
"""
    % (b"ab" * 48),
    where="policy.toml",
)
FACTS = {"profile": "operated", "launched_by": "agent", "cc_feature": "on", "devtools": "off",
         "count": "1"}  # fmt: skip
NONCE = bytes(32)
DEVICE = DeviceEvidence("HOPPER", "GPU-1", b"report", b"chain")
FILE = EvidenceFile(Evidence(b"\x04\x00quote", (DEVICE,), b"log"), b"{}", bytes(64), NONCE)


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def test_round_trip() -> None:
    assert decode_evidence(FILE.encode(), where="file") == FILE
    bare = EvidenceFile(Evidence(b"quote"))
    assert decode_evidence(bare.encode(), where="file") == bare
    spaced = json.dumps(json.loads(FILE.encode()), indent=2).encode()
    assert decode_evidence(spaced, where="file") == FILE


def test_other_forms() -> None:
    assert decode_evidence(b"\x04\x00", where="file") == EvidenceFile(Evidence(b"\x04\x00"))
    for log in (None, b64(b"log")):
        text = json.dumps({"quote": b64(b"quote"), "cc_eventlog": log}).encode()
        found = decode_evidence(text, where="file").evidence
        assert found == Evidence(b"quote", event_log=None if log is None else b"log")


@pytest.mark.parametrize(
    "change",
    [
        {"cai-evidence": 2}, {"cai-evidence": "1"}, {"quote": None}, {"quote": "?"}, {"quote": 1},
        {"devices": {}}, {"devices": [{}]}, {"devices": [1]}, {"devices": [[]]},
        {"devices": [{"arch": "H", "uuid": "u", "report": "?", "chain": ""}]},
        {"devices": [{"arch": "H", "uuid": "u", "report": "", "chain": "", "more": 1}]},
        {"event_log": 1}, {"statement": 1}, {"statement": "\ud800"}, {"report_data": "00"},
        {"report_data": "AA" * 64}, {"gpu_nonce": "00" * 31}, {"more": 1},
    ],
)  # fmt: skip
def test_malformed_files(change: dict[str, Any]) -> None:
    value = {**json.loads(FILE.encode()), **change}
    with pytest.raises(CaiError):
        decode_evidence(json.dumps(value).encode(), where="file")


def test_limits() -> None:
    with pytest.raises(LimitExceeded):
        decode_evidence(bytes(MAX_EVIDENCE_FILE + 1), where="file")
    many = replace(FILE, evidence=replace(FILE.evidence, devices=(DEVICE,) * 17))
    with pytest.raises(CaiError, match="at most 16"):
        decode_evidence(many.encode(), where="file")


@given(st.binary(max_size=100), st.booleans())
def test_arbitrary_bytes_leak_nothing(data: bytes, opened: bool) -> None:
    with contextlib.suppress(CaiError):
        decode_evidence(b"{" + data if opened else data, where="file")


@pytest.fixture(scope="module")
def world(platform: SimulatedPlatform, platform_dir: Path) -> dict[str, Any]:
    return {
        "policy": POLICY, "anchors": simulated_anchors(platform_dir / "anchors"),
        "collateral": load_collateral(platform_dir / "anchors" / "collateral"),
        "now": datetime.now(UTC), "subject": "file", "expected_report_data": None,
    }  # fmt: skip


@pytest.fixture(scope="module")
def bound(platform: SimulatedPlatform) -> EvidenceFile:
    """A guest whose quote binds a channel statement."""
    from cai.attest.sim import GuestSettings

    devices = platform.devices(1).collect(NONCE)
    digest = Evidence(b"", devices).gpu_digest.hex()
    statement = ChannelStatement(
        launch_digest="ab" * 48, service_id="model", owner_key="", models=(),
        gpu=GpuFacts(digest, NONCE.hex(), 1), guest_facts=FACTS, ticket_digest="",
        dialects=("cai/1",), boot_id="00" * 16, epoch=0, session_root="00" * 32, session_size=1,
    ).encode()  # fmt: skip
    guest = platform.guest(GuestSettings())
    quote = guest.quote(report_data(statement, Purpose.CHANNEL))
    return EvidenceFile(Evidence(quote, devices, guest.event_log()), statement)


def verified(
    file: EvidenceFile, world: dict[str, Any], **changes: Any
) -> tuple[Verdict, Facts | None]:
    verdict, facts = verify_file(file, **{**world, **changes})
    assert (facts is not None) == verdict.passed
    return verdict, facts


def failed(file: EvidenceFile, world: dict[str, Any], **changes: Any) -> set[str]:
    return {item.name for item in verified(file, world, **changes)[0].failures}


def test_a_bound_statement_gives_facts(bound: EvidenceFile, world: dict[str, Any]) -> None:
    verdict, facts = verified(bound, world)
    assert facts is not None, verdict.failures
    assert (facts.launch_digest, facts.guest) == ("ab" * 48, FACTS)
    assert RISK_FRESHNESS in verdict.residual_risks
    assert bound.statement is not None
    known = report_data(bound.statement, Purpose.CHANNEL)
    verdict, _ = verified(bound, world, expected_report_data=known)
    assert verdict.passed
    assert RISK_FRESHNESS not in verdict.residual_risks


def test_a_statement_that_is_not_bound_is_refused(
    bound: EvidenceFile, world: dict[str, Any], platform: SimulatedPlatform
) -> None:
    assert bound.statement is not None
    other = replace(bound, statement=bound.statement.replace(b'"off"', b'"on"'))
    assert failed(other, world) == {"tdx.report_data"}
    for text in (b"{}", b"[]", b"", b" " + bound.statement):
        assert failed(replace(bound, statement=text), world) == {"evidence.statement"}
    none = replace(bound, evidence=replace(bound.evidence, devices=()))
    assert failed(none, world) == {"evidence.gpu_digest"}
    assert failed(bound, world, expected_report_data=bytes(64)) >= {"evidence.report_data"}
    without = replace(bound, statement=None, gpu_nonce=NONCE)
    missing = failed(without, world)
    assert missing >= {"guest.launch_digest", "guest.profile"}
    assert failed(replace(without, report_data=bytes(64)), world) == {"tdx.report_data"}
    assert failed(replace(without, gpu_nonce=None), world) == {"gpu.0.nonce"}


def test_what_cannot_be_decided(bound: EvidenceFile, world: dict[str, Any]) -> None:
    verdict, _ = verified(bound, world, collateral=CollateralStore.empty())
    assert [item.name for item in undecided(verdict)] == ["tdx.collateral"]
    worse = verdict.extended([check("tdx.debug", passed=False)])
    assert undecided(worse) == ()
    assert undecided(verified(bound, world)[0]) == ()
    expired, _ = verified(bound, world, now=datetime(2060, 1, 1, tzinfo=UTC))
    assert expired.failures
    assert undecided(expired) == ()
