"""Fixtures: a simulated platform, a key broker without sockets, a guest that visits it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kbs.server.service import ServeSettings, open_broker
from tests.kbs.postgres import Absent, Cluster
from tests.kbs.world import Clock, Site, Visitor

if TYPE_CHECKING:
    from cai.attest.sim import SimulatedPlatform


@pytest.fixture(scope="session")
def platform_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from cai.attest.sim import SimulatedPlatform

    directory = tmp_path_factory.mktemp("simulated")
    SimulatedPlatform.create(directory, now=datetime.now(UTC))
    return directory


@pytest.fixture(scope="session")
def platform(platform_dir: Path) -> SimulatedPlatform:
    from cai.attest.sim import SimulatedPlatform

    return SimulatedPlatform.load(platform_dir / "platform")


@pytest.fixture(scope="session")
def postgres() -> Iterator[Cluster]:
    """A private PostgreSQL server; ``postgres.settings(postgres.create())`` is a database."""
    try:
        cluster = Cluster.start()
    except Absent as error:
        pytest.skip(f"PostgreSQL: {error}")
    yield cluster
    cluster.stop()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def site(tmp_path: Path, platform_dir: Path, clock: Clock) -> Iterator[Site]:
    settings = ServeSettings(
        tmp_path / "kbs-data", "127.0.0.1:0", "127.0.0.1:0",
        unsafe_simulated_root=platform_dir / "anchors",
    )
    broker = open_broker(settings, clock=clock)
    yield Site(broker, settings, clock)
    broker.close()


@pytest.fixture
def other_site(tmp_path: Path, site: Site, clock: Clock) -> Iterator[Site]:
    settings = replace(site.settings, data=tmp_path / "other-data")
    broker = open_broker(settings, clock=clock)
    yield Site(broker, settings, clock)
    broker.close()


@pytest.fixture
def visitor(platform: SimulatedPlatform) -> Visitor:
    return Visitor(platform)


@pytest.fixture
def allowed(site: Site, visitor: Visitor) -> Site:
    """The site with a resource and policies that allow ``visitor``."""
    site.allow(visitor)
    return site
