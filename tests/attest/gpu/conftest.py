"""A simulated NVIDIA for tests that sign what no vendor would."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

if TYPE_CHECKING:
    from cai.attest.sim.nvidia import Foundry

MADE = datetime(2026, 3, 1, tzinfo=UTC)


@pytest.fixture(scope="session")
def made() -> datetime:
    return MADE


@pytest.fixture(scope="session")
def now() -> datetime:
    return MADE + timedelta(hours=6)


@pytest.fixture(scope="session")
def foundry() -> Foundry:
    from cai.attest.sim.nvidia import create_foundry

    return create_foundry(now=MADE)


@pytest.fixture(scope="session")
def rim_root(foundry: Foundry) -> bytes:
    return foundry.rim_root.certificate.public_bytes(Encoding.DER)


@pytest.fixture(scope="session")
def device_root(foundry: Foundry) -> bytes:
    return foundry.root.certificate.public_bytes(Encoding.DER)


@pytest.fixture(scope="session")
def driver_rim(foundry: Foundry) -> bytes:
    from cai.attest.sim.nvidia import CHIPS
    from cai.attest.sim.rim import driver_rim

    return driver_rim(foundry, CHIPS["HOPPER"])


SignXml = Callable[[str], bytes]


@pytest.fixture
def sign_content(foundry: Foundry, monkeypatch: pytest.MonkeyPatch) -> SignXml:
    """Any content, properly signed by the simulated vendor."""
    from lxml import etree

    from cai.attest.sim import rim
    from cai.attest.sim.nvidia import CHIPS

    def sign(content: str) -> bytes:
        with monkeypatch.context() as patch:
            patch.setattr(rim, "_document", lambda *_: etree.fromstring(content))
            return rim.make_rim(foundry, CHIPS["HOPPER"], "1", {})

    return sign
