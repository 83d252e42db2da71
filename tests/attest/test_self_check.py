"""A guest's evidence about itself, and the GPUs that are opened only after they verified."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cai.attest.anchors import simulated_anchors, vendor_anchors
from cai.attest.evidence_file import decode_evidence, verify_file
from cai.attest.gpu.collect import ConfidentialMode, NvidiaDevices
from cai.attest.gpu.ocsp_store import load_ocsp
from cai.attest.gpu.rim_store import load_rims
from cai.attest.policy import VerificationPolicy, policy_for
from cai.attest.self_check import VerifyingWith, admit_devices, collect_own, judge_own
from cai.attest.tdx.collateral import CollateralStore, load_collateral
from cai.errors import EvidenceRefused, Refused
from tests.attest.gpu.driver import Recorded

if TYPE_CHECKING:
    from cai.attest.sim import SimulatedPlatform

NOW = datetime.now(UTC)


@pytest.fixture(scope="module")
def using(platform_dir: Path) -> VerifyingWith:
    anchors = platform_dir / "anchors"
    return VerifyingWith(
        simulated_anchors(anchors), load_collateral(anchors / "collateral"),
        load_rims(anchors / "rims"), load_ocsp(anchors / "ocsp"),
    )  # fmt: skip


def test_own_evidence_verifies(platform: SimulatedPlatform, using: VerifyingWith) -> None:
    from cai.attest.sim import GuestSettings

    guest = platform.guest(GuestSettings())
    file = collect_own(guest, platform.devices(2))
    verdict, facts = judge_own(file, using, now=NOW)
    assert verdict.failures == ()
    assert facts is not None
    assert len(facts.devices) == 2
    assert judge_own(collect_own(guest, None), using, now=NOW)[1] is not None
    assert decode_evidence(file.encode(), where="x") == file


def test_each_challenge_is_another(platform: SimulatedPlatform) -> None:
    from cai.attest.sim import GuestSettings

    guest = platform.guest(GuestSettings())
    first, second = (collect_own(guest, platform.devices(1)) for _ in range(2))
    assert first.report_data != second.report_data
    assert first.gpu_nonce != second.gpu_nonce
    assert (first.report_data or b"")[48:] == bytes(16), "never a statement's"


def test_devices_are_bound(platform: SimulatedPlatform, using: VerifyingWith) -> None:
    from cai.attest.sim import GuestSettings

    guest, nonce = platform.guest(GuestSettings()), b"\x01" * 32
    alone = collect_own(guest, None, nonce=nonce)
    together = collect_own(guest, platform.devices(1), nonce=nonce)
    assert alone.report_data != together.report_data


def test_without_collateral_nothing_is_decided(
    platform: SimulatedPlatform, using: VerifyingWith
) -> None:
    from cai.attest.evidence_file import undecided
    from cai.attest.sim import GuestSettings

    file = collect_own(platform.guest(GuestSettings()), None)
    bare = VerifyingWith(using.anchors, CollateralStore.empty())
    verdict, facts = judge_own(file, bare, now=NOW)
    assert facts is None
    assert [item.name for item in undecided(verdict)] == ["tdx.collateral"]


class Simulated(Recorded):
    """A driver whose GPUs answer as the simulated ones do."""

    def __init__(self, platform: SimulatedPlatform) -> None:
        super().__init__()
        self.platform = platform

    def report(self, place: int, nonce: bytes) -> bytes:
        return self.platform.devices(1).collect(nonce)[place].report

    def certificates(self, place: int) -> bytes:
        return self.platform.devices(1).collect(bytes(32))[place].chain


def test_gpus_are_opened_after_they_verified(
    platform: SimulatedPlatform, using: VerifyingWith
) -> None:
    driver = Simulated(platform)
    verdict = admit_devices(NvidiaDevices(driver), anchors=using.anchors, now=NOW, rims=using.rims)
    assert verdict.passed
    assert verdict.simulated
    assert driver.is_ready


def test_gpus_that_do_not_verify_stay_closed(
    platform: SimulatedPlatform, using: VerifyingWith
) -> None:
    driver = Simulated(platform)
    with pytest.raises(EvidenceRefused):
        admit_devices(NvidiaDevices(driver), anchors=vendor_anchors(), now=NOW)
    driver.reports = []
    with pytest.raises(EvidenceRefused):
        admit_devices(NvidiaDevices(driver), anchors=using.anchors, now=NOW)
    driver.reports = [b"x"]
    for state in (ConfidentialMode(0, 0, 0), ConfidentialMode(1, 1, 0)):
        driver.state = state
        with pytest.raises(Refused):
            admit_devices(NvidiaDevices(driver), anchors=using.anchors, now=NOW)
    assert not driver.is_ready


def test_what_was_launched_is_bound_by_a_statement(
    platform: SimulatedPlatform, using: VerifyingWith
) -> None:
    """`cai attest --launch -o`, then `cai verify` under the policy that `reference` writes."""
    from cai.attest.sim import GuestSettings

    guest = platform.guest(GuestSettings())
    file = collect_own(guest, platform.devices(1), launch_digest="ab" * 48)
    found, facts = judge_own(file, using, now=NOW)
    assert found.passed
    assert facts is not None
    written = policy_for(facts, profile="operated", launch_digest="ab" * 48)
    for digest, passed in (("ab" * 48, True), ("ac" * 48, False)):
        policy = VerificationPolicy.parse(
            written.replace(b"ab" * 48, digest.encode()), where="policy.toml"
        )
        verdict, _ = verify_file(
            decode_evidence(file.encode(), where="x"), subject="x", expected_report_data=None,
            policy=policy, anchors=using.anchors, collateral=using.collateral, now=NOW,
            rims=using.rims, ocsp=using.ocsp,
        )  # fmt: skip
        assert verdict.passed is passed
        assert {item.name for item in verdict.failures} == (
            set() if passed else {"guest.launch_digest"}
        )
