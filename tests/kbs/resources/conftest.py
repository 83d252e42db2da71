"""Fixtures: a broker with several key providers, and a way to edit its database."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing

import pytest

from tests.kbs.world import Site

Edit = Callable[..., None]


@pytest.fixture
def edit(site: Site) -> Edit:
    """Runs statements behind the broker's back."""

    def run(*statements: str) -> None:
        with closing(sqlite3.connect(site.settings.data / "kbs.sqlite")) as connection, connection:
            for statement in statements:
                connection.execute(statement)

    return run
