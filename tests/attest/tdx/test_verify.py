"""Hard checks of a quote, on simulated evidence; most cases must be refused."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from cai.attest.anchors import vendor_anchors
from cai.attest.tdx.collateral import CollateralStore
from cai.attest.tdx.engine import disagreements
from cai.attest.tdx.quote import parse_quote
from cai.attest.tdx.verify import verify_quote
from cai.attest.verdict import Outcome

if TYPE_CHECKING:
    from pathlib import Path

    from cai.attest.sim import SimulatedPlatform
    from tests.attest.tdx.conftest import Stage

ATTRIBUTES_AT = 168
REPORT_DATA_AT = 568


def flipped(data: bytes, at: int, mask: int = 1) -> bytes:
    return data[:at] + bytes((data[at] ^ mask,)) + data[at + 1 :]


def test_a_good_quote_gives_facts(stage: Stage) -> None:
    result = stage.verify()
    assert result.facts is not None
    facts = result.facts
    assert all(item.outcome is not Outcome.FAIL for item in result.checks)
    assert facts.body["report_data"] == stage.report_data.hex()
    assert facts.header == {
        "version": "0400", "att_key_type": "0200", "tee_type": "81000000", "reserved": "00000000",
        "vendor_id": "939a7233f79c4ca9940a0db3957f0607", "user_data": facts.header["user_data"],
    }
    assert (facts.tcb_status, facts.advisory_ids, facts.debug) == ("UpToDate", (), False)
    assert facts.fmspc == b"SIMUL\x00".hex()
    assert len(bytes.fromhex(facts.ppid)) == 16
    assert facts.eval_data_number == 19
    assert facts.pck_flags == {
        "dynamic_platform": "true", "cached_keys": "true", "smt_enabled": "true"
    }


def test_padding_is_not_part_of_the_quote(stage: Stage) -> None:
    assert stage.failures(stage.quote + bytes(2000)) == set()
    assert stage.failures(stage.quote.rstrip(b"\x00")) == set()
    assert stage.failures(stage.quote + b"\x01") == {"tdx.framing"}


def test_other_report_data(stage: Stage) -> None:
    for expected in (bytes(64), stage.report_data[:48] + bytes(16), stage.report_data[:63], b""):
        assert stage.failures(report_data=expected) == {"tdx.report_data"}


def test_debug_guest_fails_twice(stage: Stage, platform: SimulatedPlatform) -> None:
    from cai.attest.sim import GuestSettings

    quote = platform.guest(GuestSettings(debug=True)).quote(stage.report_data)
    assert stage.failures(quote) == {"tdx.debug", "tdx.genuine"}


def test_cleared_debug_bit_breaks_the_signature(
    stage: Stage, platform: SimulatedPlatform
) -> None:
    from cai.attest.sim import GuestSettings

    quote = platform.guest(GuestSettings(debug=True)).quote(stage.report_data)
    assert stage.failures(flipped(quote, ATTRIBUTES_AT)) == {"tdx.genuine"}


@pytest.mark.parametrize(
    ("byte", "mask", "reason"),
    [
        (3, 0x10, "SEPT_VE_DISABLE"),
        (3, 0x20, "migrated"),
        (0, 0x02, "unknown"),
        (2, 0x02, "unknown"),
        (7, 0x40, "unknown"),
    ],
)
def test_attributes_that_no_policy_lets_in(
    stage: Stage, byte: int, mask: int, reason: str
) -> None:
    result = stage.verify(flipped(stage.quote, ATTRIBUTES_AT + byte, mask))
    found = {item.name: item for item in result.checks}
    assert found["tdx.attributes"].outcome is Outcome.FAIL
    assert reason in str(found["tdx.attributes"].reason)
    assert result.facts is None


def test_genuine_signature_over_bad_attributes_is_still_refused(
    stage: Stage, platform: SimulatedPlatform
) -> None:
    from cai.attest.sim import GuestSettings

    migratable = {"td_attributes": (1 << 28 | 1 << 29).to_bytes(8, "little")}
    quote = platform.guest(GuestSettings(fields=migratable)).quote(stage.report_data)
    assert stage.failures(quote) == {"tdx.attributes", "tdx.genuine"}


def test_vendor_roots_refuse_the_simulator(stage: Stage) -> None:
    failed = stage.failures(root=vendor_anchors().tdx_root)
    assert failed == {"tdx.root", "tdx.genuine"}


def test_another_simulator_is_refused(stage: Stage, tmp_path: Path) -> None:
    from cai.attest.sim import GuestSettings, SimulatedPlatform
    from cai.attest.tdx.collateral import load_collateral

    other = SimulatedPlatform.create(tmp_path, now=stage.now)
    quote = other.guest(GuestSettings()).quote(stage.report_data)
    assert stage.failures(quote) == {"tdx.root", "tdx.genuine"}
    theirs = load_collateral(other.anchors / "collateral")
    assert stage.failures(collateral=theirs) == {"tdx.genuine"}


def test_no_collateral(stage: Stage) -> None:
    result = stage.verify(collateral=CollateralStore.empty())
    found = {item.name: item for item in result.checks}
    assert found["tdx.collateral"].outcome is Outcome.FAIL
    assert found["tdx.genuine"].outcome is Outcome.NOT_ASKED
    assert result.facts is None


@pytest.mark.parametrize("days", [-1, 31, 400])
def test_collateral_out_of_its_window(stage: Stage, days: int) -> None:
    failed = stage.failures(now=stage.now + timedelta(days=days))
    assert failed == {"tdx.collateral", "tdx.genuine"}


def test_certificates_out_of_their_window(stage: Stage) -> None:
    assert "tdx.genuine" in stage.failures(now=stage.now + timedelta(days=5000))


def test_collateral_of_another_signer(stage: Stage, platform: SimulatedPlatform) -> None:
    """Correct names and windows, but the TCB information is signed by the PCK key."""
    import json

    from cai.attest.sim import intel
    from cai.attest.tdx.collateral import parse_collateral

    forged = replace(platform.processor, tcb_signing=platform.processor.pck)
    members = intel.collateral(forged, now=stage.now)
    members["tcb_info_issuer_chain"] = intel.collateral(platform.processor, now=stage.now)[
        "tcb_info_issuer_chain"
    ]
    item = parse_collateral(json.dumps(members).encode(), where="forged")
    assert item is not None
    assert stage.failures(collateral=CollateralStore([item])) == {"tdx.genuine"}


def test_an_unreadable_quote_leaves_nothing_unsaid(stage: Stage) -> None:
    for data in (b"", b"\x04\x00", bytes(100), b"\xff" * 6000, bytes(20_000)):
        result = stage.verify(data)
        names = {item.name for item in result.checks}
        assert {"tdx.framing", "tdx.report_data", "tdx.debug", "tdx.genuine"} <= names
        assert result.facts is None
        assert any(item.outcome is Outcome.FAIL for item in result.checks)


def test_an_sgx_quote_is_named_as_one(stage: Stage) -> None:
    sgx = b"\x03\x00\x02\x00" + bytes(44) + bytes(384)
    assert stage.failures(sgx) == {"tdx.tee_type", "tdx.framing"}


def test_replayed_body_under_another_signature(
    stage: Stage, platform: SimulatedPlatform
) -> None:
    from cai.attest.sim import GuestSettings

    other = platform.guest(GuestSettings(image="other")).quote(stage.report_data)
    spliced = other[:632] + stage.quote[632:]
    assert stage.failures(spliced) == {"tdx.genuine"}


def test_parser_and_engine_must_agree(stage: Stage) -> None:
    """A differential between the two parsers is found whichever field it is in."""
    import dcap_qvl

    seconds = int(stage.now.timestamp())
    found = stage.collateral.find(b"SIMUL\x00".hex(), "platform")
    assert found is not None
    import json

    claims: dict[str, Any] = json.loads(
        dcap_qvl.QuoteVerifier(stage.anchors.tdx_root)
        .verify_with_policy(
            stage.quote, dcap_qvl.QuoteCollateralV3.from_json(found.text), seconds,
            dcap_qvl.QuotePolicy.claims_only(seconds),
        )
        .to_json()
    )
    parsed = parse_quote(stage.quote)
    assert disagreements(parsed, claims) == []
    for name in parsed.body:
        body = {**parsed.body, name: flipped(parsed.body[name], 0)}
        assert disagreements(replace(parsed, body=body), claims) == [f"body.{name}"]
    assert disagreements(replace(parsed, qe_report=bytes(384)), claims) == ["qe_report.report_data"]
    header = replace(parsed.header, version=5)
    assert disagreements(replace(parsed, header=header), claims) == ["header.version"]
    assert len(disagreements(parsed, {})) >= len(parsed.body)


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
def test_every_flipped_byte_is_refused(stage: Stage) -> None:
    """No byte of a quote is free (spec-evidence §3)."""
    for at in range(len(stage.quote)):
        altered = flipped(stage.quote, at, 1 << at % 8)
        result = verify_quote(
            altered, report_data=stage.report_data, root=stage.anchors.tdx_root,
            collateral=stage.collateral, now=stage.now,
        )
        assert result.facts is None, f"flip at {at} was accepted"
