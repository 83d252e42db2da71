"""A simulated platform for the tests of evidence and of channels."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from cai.attest.sim import SimulatedPlatform


@pytest.fixture(scope="session")
def platform_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a fresh simulated platform: ``anchors/`` and ``platform/``."""
    from cai.attest.sim import SimulatedPlatform

    directory = tmp_path_factory.mktemp("simulated")
    SimulatedPlatform.create(directory, now=datetime.now(UTC))
    return directory


@pytest.fixture(scope="session")
def platform(platform_dir: Path) -> SimulatedPlatform:
    """The platform itself."""
    from cai.attest.sim import SimulatedPlatform

    return SimulatedPlatform.load(platform_dir / "platform")
