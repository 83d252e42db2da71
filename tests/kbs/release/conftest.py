"""Fixtures: a site that gives a release record, by lease only."""

from __future__ import annotations

import pytest

from tests.kbs.release.guests import record
from tests.kbs.world import URI, Site, Visitor


@pytest.fixture
def leasing(site: Site, visitor: Visitor) -> Site:
    """The site with policies that allow ``visitor``, and a record to lease."""
    # Tests do not wait for the second between two checkpoints.
    site.broker.core.checkpoints.interval = 0.0
    site.allow(visitor)
    assert site.admin("POST", f"resource/{URI}", record()).status_code == 200
    return site
