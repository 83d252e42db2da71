"""One simulated quote with everything that verifies it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cai.attest.anchors import TrustAnchors, simulated_anchors
from cai.attest.tdx.collateral import CollateralStore, load_collateral
from cai.attest.tdx.verify import TdxResult, verify_quote
from cai.attest.verdict import Outcome

if TYPE_CHECKING:
    from cai.attest.sim import SimulatedPlatform

REPORT_DATA = bytes(range(64))


@dataclass(frozen=True)
class Stage:
    """A good quote, and what it is verified with."""

    quote: bytes
    report_data: bytes
    anchors: TrustAnchors
    collateral: CollateralStore
    now: datetime

    def verify(self, quote: bytes | None = None, **changes: object) -> TdxResult:
        arguments: dict[str, object] = {
            "report_data": self.report_data,
            "root": self.anchors.tdx_root,
            "collateral": self.collateral,
            "now": self.now,
            **changes,
        }
        return verify_quote(self.quote if quote is None else quote, **arguments)  # type: ignore[arg-type]

    def failures(self, quote: bytes | None = None, **changes: object) -> set[str]:
        result = self.verify(quote, **changes)
        failed = {item.name for item in result.checks if item.outcome is Outcome.FAIL}
        assert (result.facts is None) == bool(failed), "facts if and only if every check passed"
        return failed


@pytest.fixture(scope="session")
def stage(platform: SimulatedPlatform, platform_dir: Path) -> Stage:
    from cai.attest.sim import GuestSettings

    return Stage(
        quote=platform.guest(GuestSettings()).quote(REPORT_DATA),
        report_data=REPORT_DATA,
        anchors=simulated_anchors(platform_dir / "anchors"),
        collateral=load_collateral(platform_dir / "anchors" / "collateral"),
        now=datetime.now(UTC),
    )
