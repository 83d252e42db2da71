"""Layer 1 as a whole: verdict, facts, marks and residual risks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cai.attest.anchors import TrustAnchors, simulated_anchors, vendor_anchors
from cai.attest.evidence import Evidence
from cai.attest.facts import Facts
from cai.attest.gpu.verify import RISK_RIM
from cai.attest.tdx.collateral import CollateralStore, load_collateral
from cai.attest.verdict import Outcome, Verdict
from cai.attest.verify import RISK_SIMULATED, verify_evidence
from cai.errors import EvidenceRefused

if TYPE_CHECKING:
    from cai.attest.sim import SimulatedPlatform

BINDING = bytes(reversed(range(64)))
NONCE = b"\x09" * 32


@dataclass(frozen=True)
class Desk:
    """Good evidence with everything that verifies it."""

    evidence: Evidence
    anchors: TrustAnchors
    collateral: CollateralStore

    def verify(
        self, evidence: Evidence | None = None, *, report_data: bytes = BINDING,
        nonce: bytes | None = NONCE, anchors: TrustAnchors | None = None,
    ) -> tuple[Verdict, Facts | None]:
        verdict, facts = verify_evidence(
            evidence or self.evidence, subject="guest", report_data=report_data, gpu_nonce=nonce,
            anchors=anchors or self.anchors, collateral=self.collateral, now=datetime.now(UTC),
        )
        assert (facts is not None) == verdict.passed
        return verdict, facts


@pytest.fixture(scope="module")
def desk(platform: SimulatedPlatform, platform_dir: Path) -> Desk:
    from cai.attest.sim import GuestSettings

    quote = platform.guest(GuestSettings()).quote(BINDING)
    return Desk(
        Evidence(quote, platform.devices(2).collect(NONCE)),
        simulated_anchors(platform_dir / "anchors"),
        load_collateral(platform_dir / "anchors" / "collateral"),
    )


def names(verdict: Verdict) -> set[str]:
    return {item.name for item in verdict.failures}


def test_good_evidence(desk: Desk) -> None:
    verdict, facts = desk.verify()
    assert facts is not None
    assert verdict.simulated
    assert facts.simulated
    assert verdict.residual_risks[0] == RISK_SIMULATED
    assert RISK_RIM in verdict.residual_risks
    assert verdict.hardware["tcb_status"] == "UpToDate"
    assert facts.gpu_digest == desk.evidence.gpu_digest.hex()
    assert verdict.hardware["gpu.1"].endswith(facts.devices[1].ueid)
    assert (facts.launch_digest, facts.guest) == ("", {})
    assert verdict.require() is verdict


def test_check_names_are_stable_and_unique(desk: Desk) -> None:
    verdict, _ = desk.verify()
    found = [item.name for item in verdict.checks]
    device = ["report", "chain", "nonce", "nvdec", "versions", "signature", "fwid", "arch",
              "rim", "ocsp"]  # fmt: skip
    assert found == [
        "tdx.tee_type", "tdx.framing", "tdx.report_data", "tdx.debug", "tdx.attributes",
        "tdx.service_td", "tdx.root", "tdx.collateral", "tdx.genuine", "tdx.parse_agreement",
        "tdx.second_engine", "tdx.event_log", "gpu.devices", *(f"gpu.0.{name}" for name in device),
        *(f"gpu.1.{name}" for name in device), "gpu.distinct", "gpu.mode", "gpu.topology",
    ]


def test_what_is_not_checked_is_said(desk: Desk) -> None:
    verdict, _ = desk.verify()
    not_asked = {item.name for item in verdict.checks if item.outcome is Outcome.NOT_ASKED}
    assert {"gpu.0.rim", "gpu.1.ocsp", "gpu.topology", "tdx.event_log"} <= not_asked


def test_without_devices(desk: Desk) -> None:
    verdict, facts = desk.verify(replace(desk.evidence, devices=()), nonce=None)
    assert facts is not None
    assert facts.devices == ()
    assert RISK_RIM not in verdict.residual_risks
    outcomes = {item.name: item.outcome for item in verdict.checks}
    assert outcomes["gpu.devices"] is Outcome.NOT_ASKED


def test_the_simulator_never_verifies_under_vendor_roots(desk: Desk) -> None:
    verdict, facts = desk.verify(anchors=vendor_anchors())
    assert facts is None
    assert not verdict.simulated
    assert names(verdict) == {"tdx.root", "tdx.genuine", "gpu.0.chain", "gpu.1.chain"}


def test_half_a_simulator_does_not_verify(desk: Desk) -> None:
    vendor = vendor_anchors()
    for mixed in (
        replace(desk.anchors, tdx_root=vendor.tdx_root),
        replace(desk.anchors, gpu_root=vendor.gpu_root),
    ):
        verdict, facts = desk.verify(anchors=mixed)
        assert facts is None
        assert verdict.failures


def test_a_refusal_names_every_reason(desk: Desk, platform: SimulatedPlatform) -> None:
    from cai.attest.sim import GuestSettings

    quote = platform.guest(GuestSettings(debug=True)).quote(bytes(64))
    verdict, _ = desk.verify(replace(desk.evidence, quote=quote), nonce=bytes(32))
    assert names(verdict) == {
        "tdx.report_data", "tdx.debug", "tdx.genuine", "gpu.0.nonce", "gpu.1.nonce"
    }
    with pytest.raises(EvidenceRefused, match=r"tdx\.debug: the host can read") as caught:
        verdict.require()
    assert caught.value.verdict is verdict


def test_garbage(desk: Desk) -> None:
    device = desk.evidence.devices[0]
    for garbage in (b"", b"\x00", b"\xff" * 100, b"-----BEGIN CERTIFICATE-----\n"):
        broken = replace(device, report=garbage, chain=garbage)
        verdict, facts = desk.verify(Evidence(garbage, (broken,)))
        assert facts is None
        assert {"tdx.framing", "gpu.0.report", "gpu.0.chain"} <= names(verdict)


def test_a_refusal_names_the_machine(desk: Desk) -> None:
    good, _ = desk.verify()
    refused, facts = desk.verify(report_data=bytes(64))
    assert facts is None
    assert names(refused) == {"tdx.report_data"}
    for name in ("fmspc", "ppid", "tcb_date", "advisories", "collateral_age"):
        assert refused.hardware[name] == good.hardware[name]
    altered = replace(desk.evidence, quote=desk.evidence.quote[:300] + b"\xff" * 8
                      + desk.evidence.quote[308:])  # fmt: skip
    forged, _ = desk.verify(altered)
    assert forged.hardware == {}
