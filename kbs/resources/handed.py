"""What passes between the resource store and its callers: found, opened, prepared, too late."""

from __future__ import annotations

from dataclasses import dataclass, field

from sqlalchemy import Connection

from cai.errors import Undecided
from kbs.audit.log import newest_change
from kbs.database.tables import RESOURCE
from kbs.resources.external import ExternalPrefix
from kbs.resources.rows import LeaseRule, StoredVersion


class Stale(Undecided):
    """What was prepared no longer fits: another version came first, or the keys were rotated.

    Preparing again helps; nothing was stored.
    """

    code = "outdated"


@dataclass(frozen=True, slots=True)
class SealedResource:
    """A resource that exists, not yet opened.

    Attributes:
        path: ``repository/type/tag``.
        version: from 1; 0 for one that lives elsewhere.
        owner: the owner's key of a release record, 64 hex digits, else empty.
        model: its model id, 64 hex digits, else empty.
        lease: whether it is given away only by lease. For one that lives elsewhere what the
            setting says; the opened ``Resource`` says the rest.
        stored: the row; ``None`` for one that lives elsewhere.
        external: where it lives, when not here.
    """

    path: str
    version: int
    owner: str
    model: str
    lease: LeaseRule
    stored: StoredVersion | None
    external: ExternalPrefix | None = None


@dataclass(frozen=True, slots=True)
class Resource:
    """An opened resource.

    Attributes:
        contents: its bytes.
        version: from 1; 0 for one that lives elsewhere.
        lease: whether it may be given away only by lease; to be asked again after opening.
        owner: see ``SealedResource``.
        model: see ``SealedResource``.
        source: where it lives and in which version there; empty when here.
    """

    contents: bytes = field(repr=False)
    version: int
    lease: LeaseRule
    owner: str
    model: str = ""
    source: str = ""


@dataclass(frozen=True, slots=True)
class Prepared:
    """The next version of a resource, sealed, not yet stored.

    Attributes:
        stored: the row to be.
        generation: of the key provider's rotation that its data key belongs to.
    """

    stored: StoredVersion
    generation: int


def object_name(path: str) -> str:
    """What the audit log calls a resource."""
    return f"{RESOURCE.name}/{path}"


def purge_name(path: str) -> str:
    """What the audit log calls the purged versions of a resource."""
    return f"purged/{path}"


def purged_to(connection: Connection, path: str) -> int:
    """The newest version of a resource that was destroyed for good; 0 when none was."""
    logged = newest_change(connection, purge_name(path))
    return 0 if logged is None else logged.version
