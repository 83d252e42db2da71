"""What there is: resources and their versions, for administration. Never contents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, func, select

from cai.errors import InputMissing
from kbs.audit.leaf import parse_leaf
from kbs.audit.log import logged_change, newest_change
from kbs.database.tables import AUDIT, RESOURCE
from kbs.resources.rows import version_of
from kbs.resources.store import ResourceStore, object_name

MAX_LISTED: Final = 1000
"""Most resources in one answer; a listing goes on after the last path of the one before."""


@dataclass(frozen=True, slots=True)
class Version:
    """One stored version.

    Attributes:
        version: from 1.
        size: bytes of its contents.
        created: Unix seconds.
        lease: ``required`` or ``optional``.
        owner: the owner's key of a release record, else empty.
        model: its model id, else empty.
        provider: id of the provider that wraps its data key.
        intact: whether the row is the one in the audit log.
        by: who stored it.
    """

    version: int
    size: int
    created: int
    lease: str
    owner: str
    model: str
    provider: str
    intact: bool
    by: str = ""

    def to_json(self) -> dict[str, Any]:
        """As the admin listener tells it."""
        return {
            "version": self.version, "size": self.size, "created": self.created,
            "lease": self.lease, "owner": self.owner, "model": self.model,
            "provider": self.provider, "intact": self.intact, "by": self.by,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Summary:
    """One resource.

    Attributes:
        path: ``repository/type/tag``.
        newest: its newest stored version, whether or not it is deleted.
        deleted: when it was deleted, as the audit log says; empty while it lives.
        stored: how many versions are stored.
    """

    path: str
    newest: Version
    deleted: str
    stored: int

    def to_json(self) -> dict[str, Any]:
        """As the admin listener tells it; the first three members are the fork's."""
        repository, kind, tag = self.path.split("/")
        return {
            "repository_name": repository, "resource_type": kind, "resource_tag": tag,
            "deleted": self.deleted, "versions": self.stored, **self.newest.to_json(),
        }  # fmt: skip


def list_resources(
    connection: Connection, store: ResourceStore, *, prefix: str = "", after: str = "",
    limit: int = MAX_LISTED,
) -> list[Summary]:
    """Resources in the order of their paths, deleted ones too.

    Args:
        connection: of a reading transaction.
        store: of the same database.
        prefix: ``""`` for all, ``repo`` or ``repo/type``.
        after: go on after this path.
        limit: most that are listed.
    """
    table = RESOURCE
    query = select(
        table.c.path, func.max(table.c.version).label("newest"), func.count().label("stored")
    ).where(table.c.path > after)
    if prefix:
        start = prefix + "/"
        query = query.where(func.substr(table.c.path, 1, len(start)) == start)
    query = query.group_by(table.c.path).order_by(table.c.path).limit(min(limit, MAX_LISTED))
    found = []
    for row in connection.execute(query).all():
        newest = newest_change(connection, object_name(row.path))
        deleted = ""
        if newest is not None and not newest.row_hash:
            deleted = _leaf(connection, row.path, newest.version).get("time", "")
        (version,) = _versions(connection, store, row.path, row.newest)
        found.append(Summary(row.path, version, deleted, row.stored))
    return found


def resource_info(connection: Connection, store: ResourceStore, path: str) -> dict[str, Any]:
    """One resource with every stored version, the newest first.

    Raises:
        InputMissing: there is none, not even a deleted one.
    """
    elsewhere = store.external(path)
    if elsewhere is not None:
        return {
            "path": path, "external": elsewhere.source.id, "prefix": elsewhere.prefix,
            "lease": elsewhere.lease, "deleted": "", "versions": [],
        }  # fmt: skip
    versions = _versions(connection, store, path, None)
    newest = newest_change(connection, object_name(path))
    if not versions and (newest is None or not newest.row_hash):
        raise InputMissing(f"there is no resource {path}", hint="kbs resource list")
    deleted = ""
    if newest is not None and not newest.row_hash:
        deleted = _leaf(connection, path, newest.version).get("time", "")
    living = newest.version if newest is not None and newest.row_hash else None
    return {
        "path": path,
        "living": living,
        "deleted": deleted,
        "intact": living is None or any(item.version == living for item in versions),
        "versions": [item.to_json() for item in versions],
    }


def _versions(
    connection: Connection, store: ResourceStore, path: str, only: int | None
) -> list[Version]:
    query = select(RESOURCE).where(RESOURCE.c.path == path).order_by(RESOURCE.c.version.desc())
    if only is not None:
        query = query.where(RESOURCE.c.version == only)
    found = []
    for row in connection.execute(query).all():
        stored = version_of(row, instance=store.instance, realm=store.realm)
        logged = logged_change(connection, object_name(path), row.version)
        intact = (
            stored is not None and logged is not None and stored.row_hash == logged.row_hash
        )
        actor = _leaf(connection, path, row.version).get("actor", {})
        found.append(
            Version(
                row.version, row.size, row.created, row.lease, row.owner, row.model,
                row.provider, intact, str(actor.get("name", actor.get("kind", ""))),
            )
        )
    return found


def _leaf(connection: Connection, path: str, version: int) -> dict[str, Any]:
    leaf = connection.execute(
        select(AUDIT.c.leaf)
        .where(AUDIT.c.object == object_name(path), AUDIT.c.version == version)
        .order_by(AUDIT.c.seq.desc())
        .limit(1)
    ).scalar()
    return {} if leaf is None else parse_leaf(leaf)
