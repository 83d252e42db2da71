"""Retention: destroying old versions and deleted resources once their time is over.

A version's time begins when the next one replaced it, or when the resource was deleted. Which
versions are gone for good is said in the audit log (object ``purged/<path>``), so that a row which
somebody removed behind the broker's back is not taken for one that was purged.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Final

from sqlalchemy import Connection, select

from kbs.audit.leaf import Entry, parse_leaf, time_of
from kbs.audit.log import newest_change
from kbs.database.tables import AUDIT, RESOURCE
from kbs.resources.settings import ResourceSettings
from kbs.resources.store import object_name

if TYPE_CHECKING:
    from kbs.core import Core

ACTION: Final = "resource.purge"
"""Action of the audit leaves."""


def due(
    connection: Connection, settings: ResourceSettings, now: datetime, *, path: str = ""
) -> list[tuple[str, int]]:
    """Resources with versions whose time is over: path and the newest version to destroy.

    Args:
        connection: of any transaction.
        settings: how long what stays.
        now: the time.
        path: look at this resource only; empty looks at all.
    """
    limit = int((now - timedelta(days=settings.keep_days)).timestamp())
    query = select(RESOURCE.c.path, RESOURCE.c.version, RESOURCE.c.created)
    if path:
        query = query.where(RESOURCE.c.path == path)
    versions: dict[str, list[tuple[int, int]]] = {}
    query = query.order_by(RESOURCE.c.path, RESOURCE.c.version.desc())
    for row in connection.execute(query):
        versions.setdefault(row.path, []).append((row.version, row.created))
    found = []
    for name, stored in versions.items():
        replaced = _deleted_at(connection, name)
        kept = 0 if replaced is not None else settings.keep_versions
        for place, (version, created) in enumerate(stored):
            if place >= kept and replaced is not None and replaced < limit:
                found.append((name, version))
                break
            replaced = created
    return found


def sweep(core: Core, *, actor: Mapping[str, str] | None = None, request: str = "") -> int:
    """Destroy everything whose time is over, one transaction and one audit leaf per resource.

    Args:
        core: the broker's state.
        actor: who asked; nobody did when retention runs by itself.
        request: id of the request, if it was one.

    Returns:
        How many resources lost versions.
    """
    now = core.clock()
    with core.database.read() as connection:
        found = due(connection, core.resources.settings, now)
    purged = 0
    for path, _ in found:
        with core.database.decide() as connection:
            # Read again: it may have been restored, or purged by another replica.
            again = due(connection, core.resources.settings, now, path=path)
            if not again:
                continue
            change = core.resources.purge(connection, path, again[0][1])
            entry = Entry(
                ACTION, actor or {"kind": "system"}, request or uuid.uuid4().hex, allowed=True,
                subject=path, change=change, details={"reason": "retention"},
            )  # fmt: skip
            core.audit.append(connection, entry, core.clock())
            purged += 1
    return purged


def _deleted_at(connection: Connection, path: str) -> int | None:
    newest = newest_change(connection, object_name(path))
    if newest is None or newest.row_hash:
        return None
    leaf = connection.execute(
        select(AUDIT.c.leaf)
        .where(AUDIT.c.object == object_name(path), AUDIT.c.version == newest.version)
        .order_by(AUDIT.c.seq.desc())
        .limit(1)
    ).scalar_one()
    return int(time_of(parse_leaf(leaf)).timestamp())
