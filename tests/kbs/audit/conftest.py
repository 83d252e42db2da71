"""A broker with a row in every table that its log vouches for."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from kbs.admin.changes import Role
from kbs.admin.people import AdminRecord
from kbs.admin.rows import AdminRows
from kbs.audit.log import Change, Entry
from kbs.database.tables import PROPOSAL, REFERENCE
from kbs.keys.signing import KeyName
from kbs.release.lease import Lease, LeaseStore
from kbs.rows import VersionedRows
from kbs.server.service import ServeSettings, open_broker
from tests.kbs.world import Clock, Site, Visitor

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from cai.attest.sim import SimulatedPlatform


def change(site: Site, make: Callable[[Connection], Change], action: str = "test.set") -> None:
    """Make a change as any room does: the row and its leaf in one transaction."""
    core = site.broker.core
    with core.database.decide() as connection:
        entry = Entry(action, {"kind": "system"}, "00" * 16, allowed=True, change=make(connection))
        core.audit.append(connection, entry, core.clock())


def fill(site: Site) -> None:
    """At least two rows in every table, and checkpoints between them."""
    core = site.broker.core
    core.checkpoints.interval = 0
    core.checkpoints.latest()
    assert site.admin("POST", "resource/models/minilm/key", b"second").status_code == 200
    assert site.admin("POST", "resource/models/other/key", b"another").status_code == 200
    assert site.admin("POST", "resource/models/gone/key", b"gone").status_code == 200
    assert site.admin("DELETE", "resource/models/gone/key").status_code == 200
    core.checkpoints.latest()
    for name in ("jo", "mo"):
        key = Ed25519PrivateKey.generate().public_key()
        record = AdminRecord(key, frozenset({Role.AUDITOR}), "", 0, "admin")
        answer = site.admin("POST", f"admin/{name}", record.encode())
        assert answer.status_code == 200, answer.text
    for digit in "ab":
        answer = site.admin("POST", f"block/launch/{digit * 96}", {"reason": "stolen"})
        assert answer.status_code == 200, answer.text
    instance = core.instance
    references = VersionedRows(
        REFERENCE, instance=instance.id, realm=instance.realm.value, sealer=instance.sealer
    )
    proposals = AdminRows(PROPOSAL, core)
    for text in (b"one", b"two"):
        change(site, lambda connection, text=text: references.put(connection, "values/", text))
        change(
            site,
            lambda connection, text=text: proposals.put(connection, text.hex() * 4, text),
        )
        lease = Lease(
            "", 0, "models/minilm/key", 1, "ab" * 32, "cd" * 32, (), 0,
            int(core.clock().timestamp()), 900, 300,
        )  # fmt: skip
        change(
            site,
            lambda connection, lease=lease: LeaseStore.of(core).grant(
                connection, lease, renews="", now=core.clock()
            )[1],
        )
    for name in KeyName:
        change(
            site,
            lambda connection, name=name: core.signing.rotate(connection, name, now=core.clock()),
        )
    core.checkpoints.latest()
    core.count_failure("session")
    core.checkpoints.latest()


@pytest.fixture(scope="module")
def filled(
    tmp_path_factory: pytest.TempPathFactory, platform_dir: Path, platform: SimulatedPlatform
) -> Iterator[tuple[Site, Path]]:
    """A broker with rows everywhere, a guest that attested, checkpoints; and a copy of all that."""
    place = tmp_path_factory.mktemp("filled")
    settings, clock = settings_in(place, platform_dir), Clock()
    site = Site(open_broker(settings, clock=clock), settings, clock)
    visitor = Visitor(platform)
    site.allow(visitor)
    _, cookie = visitor.attested(site)
    site.get(cookie)
    fill(site)
    copy_database(settings.data / "kbs.sqlite", place / "copy.sqlite")
    yield site, place / "copy.sqlite"
    site.broker.close()


@pytest.fixture
def full(filled: tuple[Site, Path]) -> Site:
    """The filled broker, with its database as it was at first."""
    site, copy = filled
    copy_database(copy, site.settings.data / "kbs.sqlite")
    return site


def copy_database(source: Path, target: Path) -> None:
    """Every page, through the database's own lock."""
    with closing(sqlite3.connect(source)) as there, closing(sqlite3.connect(target)) as here:
        there.backup(here)


def settings_in(place: Path, platform_dir: Path) -> ServeSettings:
    return ServeSettings(
        place / "kbs-data", "127.0.0.1:0", "127.0.0.1:0",
        unsafe_simulated_root=platform_dir / "anchors",
    )
