"""The resource store: every version of each resource, each under a data key of its own.

Reading is in two steps. ``sealed`` finds the stored version and holds it against the audit log; it
is cheap and belongs into the transaction that decides. ``open`` unwraps its data key, which may ask
a hardware module or a service over the network, and belongs outside. Writing is the other way
round: ``prepare`` seals before the transaction, ``put`` stores in it, and raises ``Stale`` when the
world has moved on in between.

The audit log decides what exists: a row that is not the one in the log, or that is gone, is
``Tampered``; a tombstone there means deleted, whatever the table says.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, delete, func, insert, select

from cai.errors import (
    CaiError,
    FormatError,
    InputMissing,
    LimitExceeded,
    Refused,
    Tampered,
    Undecided,
)
from cai.secret import Secret
from kbs.audit.log import Change, logged_change, newest_change
from kbs.database.engine import Database
from kbs.database.tables import RESOURCE
from kbs.keys.keyring import Keyring
from kbs.keys.provider import (
    COMMITMENT_SIZE,
    KEY_SIZE,
    commitment,
    require_commitment,
)
from kbs.keys.rowkey import row_key_state
from kbs.keys.sealing import Sealer
from kbs.names import ResourceName
from kbs.resources.external import ExternalPrefix
from kbs.resources.rows import (
    LeaseRule,
    ResourceIdentity,
    StoredVersion,
    record_marks,
    version_of,
)
from kbs.resources.settings import ResourceSettings


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


class ResourceStore:
    """The resources of one database.

    Args:
        database: for the read phase of ``prepare``.
        keyring: wraps and unwraps data keys.
        instance: id of the database.
        realm: its realm.
        clock: the time.
        settings: limits, retention and what lives elsewhere.
    """

    def __init__(
        self,
        database: Database,
        keyring: Keyring,
        *,
        instance: str,
        realm: str,
        clock: Callable[[], datetime],
        settings: ResourceSettings,
    ) -> None:
        self._database = database
        self._keyring = keyring
        self.instance = instance
        self.realm = realm
        self._clock = clock
        self.settings = settings

    # Reading.

    def sealed(
        self, connection: Connection, path: str, version: int | None = None
    ) -> SealedResource | None:
        """A resource as stored, held against the audit log; cheap, in any transaction.

        Args:
            connection: of the transaction.
            path: ``repository/type/tag``.
            version: one that may be older, or of a deleted resource: for administration, never for
                a release; ``None`` is the newest, if it is not deleted.

        Returns:
            ``None`` when there is none, or it is deleted.

        Raises:
            Tampered: the stored row is not the one in the audit log, or is gone.
        """
        elsewhere = self.external(path)
        if elsewhere is not None:
            lease = LeaseRule.REQUIRED if elsewhere.lease == "required" else LeaseRule.OPTIONAL
            return SealedResource(path, 0, "", "", lease, None, elsewhere)
        logged = newest_change(connection, object_name(path))
        if version is not None:
            logged = logged_change(connection, object_name(path), version)
        elif self._newest_version(connection, path) > (logged.version if logged else 0):
            raise _tampered(path, "has a version that the audit log does not have")
        if logged is None or not logged.row_hash:
            return None
        row = connection.execute(
            select(RESOURCE).where(RESOURCE.c.path == path, RESOURCE.c.version == logged.version)
        ).one_or_none()
        if row is None:
            if version is not None and version <= purged_to(connection, path):
                return None
            raise _tampered(path, "is gone, the audit log has it")
        return _as_sealed(self._checked(row, logged))

    def open(self, sealed: SealedResource) -> Resource:
        """The contents; slow, outside any transaction.

        Raises:
            Unavailable: the key provider, or the place where it lives, does not answer now.
            Tampered: the row does not open as what it says it is.
            InputMissing: the place where it lives has none.
        """
        if sealed.external is not None:
            return _read_elsewhere(sealed, sealed.external, self.settings.max_bytes)
        if sealed.stored is None:
            raise CaiError("a resource without a row")
        return Resource(
            self._contents(sealed.stored), sealed.version, sealed.lease, sealed.owner, sealed.model
        )

    def get(self, connection: Connection, path: str) -> Resource | None:
        """The newest version, opened inside the transaction; for callers that do not wait."""
        sealed = self.sealed(connection, path)
        return None if sealed is None else self.open(sealed)

    def external(self, path: str) -> ExternalPrefix | None:
        """Where a resource lives when not here: the longest prefix that covers it."""
        covering = [item for item in self.settings.external if item.covers(path)]
        return max(covering, key=lambda item: len(item.prefix), default=None)

    def close(self) -> None:
        """Close every place where resources live elsewhere."""
        for item in self.settings.external:
            item.source.close()

    # Writing.

    def prepare(self, path: str, contents: bytes, *, lease: LeaseRule | None = None) -> Prepared:
        """Seal the next version under a fresh data key; slow, outside any transaction.

        Args:
            path: ``repository/type/tag``.
            contents: its bytes.
            lease: whether it is given away only by lease; ``None`` requires one for a release
                record, and where the version before required one.

        Raises:
            FormatError, LimitExceeded: a bad name, or empty or too large.
            Refused: it lives elsewhere.
            Unavailable: the key provider does not answer now.
        """
        self.require_storable(path, len(contents))
        with self._database.read() as connection:
            logged = newest_change(connection, object_name(path))
            keys = row_key_state(connection)
            before = self.sealed(connection, path) if lease is None else None
        marks = record_marks(contents)
        if lease is None:
            strict = marks is not None or (before and before.lease is LeaseRule.REQUIRED)
            lease = LeaseRule.REQUIRED if strict else LeaseRule.OPTIONAL
        identity = ResourceIdentity(
            self.instance, self.realm, RESOURCE.name, path,
            1 if logged is None else logged.version + 1,
            "" if marks is None else marks.owner, "" if marks is None else marks.model,
            lease, len(contents), int(self._clock().timestamp()),
        )  # fmt: skip
        key, context = Secret(os.urandom(KEY_SIZE)), identity.encode()
        wrapped = self._keyring.wrap(keys.wrapped.provider, key, context)
        sealed = commitment(key, context) + Sealer(key).seal(identity, contents)
        return Prepared(StoredVersion(identity, wrapped, sealed), keys.generation)

    def put(self, connection: Connection, prepared: Prepared) -> Change:
        """Store a prepared version in a deciding transaction, which must log the change.

        Raises:
            Stale: prepare it again.
            LimitExceeded: there are too many resources.
            Tampered: the table has a version that the audit log does not have.
        """
        identity = prepared.stored.identity
        logged = newest_change(connection, object_name(identity.path))
        if identity.version != (1 if logged is None else logged.version + 1):
            raise Stale(f"resource {identity.path} got another version meanwhile")
        if row_key_state(connection).generation != prepared.generation:
            raise Stale("the keys were rotated meanwhile")
        if self._newest_version(connection, identity.path) >= identity.version:
            raise _tampered(identity.path, "has a version that the audit log does not have")
        if logged is None and self._count(connection) >= self.settings.max_resources:
            raise LimitExceeded(
                f"there are {self.settings.max_resources} resources already",
                hint="purge deleted ones, or raise max_resources",
            )
        connection.execute(insert(RESOURCE).values(**prepared.stored.columns))
        return Change(object_name(identity.path), identity.version, prepared.stored.row_hash)

    def delete(self, connection: Connection, path: str) -> Change:
        """Delete a resource, so that it can be restored; the caller logs the change.

        Raises:
            InputMissing: there is none.
        """
        if self.external(path) is not None:
            raise _elsewhere(path)
        logged = newest_change(connection, object_name(path))
        if logged is None or not logged.row_hash:
            raise InputMissing(f"there is no resource {path}", hint="kbs resource list")
        return Change(object_name(path), logged.version + 1, "")

    def prepare_restore(self, path: str, version: int | None = None) -> Prepared:
        """Seal an earlier version again as the next one; slow, outside any transaction.

        Args:
            path: ``repository/type/tag``.
            version: the version to bring back; ``None`` is the newest of a deleted resource.

        Raises:
            InputMissing: there is none, or it was purged.
            Refused: the resource is not deleted and no version was named.
            Tampered: the row is not the one in the audit log.
        """
        with self._database.read() as connection:
            if version is None:
                logged = newest_change(connection, object_name(path))
                if logged is not None and logged.row_hash:
                    raise Refused(
                        f"resource {path} is not deleted", hint="name the version to bring back"
                    )
                version = self._newest_version(connection, path)
            found = self.sealed(connection, path, version) if version else None
        return self._again(path, found, None)

    def prepare_again(self, path: str, version: int, *, lease: LeaseRule) -> Prepared:
        """Seal a version again as the next one with another lease rule; slow.

        Raises:
            InputMissing: there is no such version.
            Tampered: the row is not the one in the audit log.
        """
        with self._database.read() as connection:
            found = self.sealed(connection, path, version)
        return self._again(path, found, lease)

    def newest_purgeable(self, connection: Connection, path: str) -> int:
        """The newest version that may be destroyed: of a living resource, the one before.

        Raises:
            InputMissing: there is no such resource.
        """
        logged = newest_change(connection, object_name(path))
        if logged is None:
            raise InputMissing(f"there is no resource {path}", hint="kbs resource list")
        return logged.version - 1

    def purge(self, connection: Connection, path: str, upto: int) -> Change:
        """Destroy every version up to ``upto`` for good; the caller logs the change.

        Args:
            connection: of a deciding transaction.
            path: ``repository/type/tag``.
            upto: the newest version to destroy; never the living one.

        Raises:
            InputMissing: there is nothing to destroy.
            Refused: that would destroy the living version.
        """
        logged = newest_change(connection, object_name(path))
        living = logged.version if logged is not None and logged.row_hash else None
        if living is not None and upto >= living:
            raise Refused(
                f"version {living} of resource {path} is in use", hint="delete the resource first"
            )
        gone = connection.execute(
            delete(RESOURCE).where(RESOURCE.c.path == path, RESOURCE.c.version <= upto)
        )
        if not gone.rowcount:
            raise InputMissing(f"resource {path} has no version up to {upto} to purge")
        return Change(purge_name(path), upto, "")

    def _again(self, path: str, found: SealedResource | None, lease: LeaseRule | None) -> Prepared:
        if found is not None and found.external is not None:
            raise _elsewhere(path)
        if found is None or found.stored is None:
            raise InputMissing(
                f"resource {path} has no such version", hint="kbs resource versions URI"
            )
        return self.prepare(path, self._contents(found.stored), lease=lease or found.lease)

    def require_storable(self, path: str, size: int) -> None:
        """Refuse a name or size that is not stored.

        Raises:
            FormatError, LimitExceeded: a bad name, or empty or too large.
            Refused: it lives elsewhere.
        """
        ResourceName.parse(path)
        if self.external(path) is not None:
            raise _elsewhere(path)
        if not size:
            raise FormatError("a resource must not be empty")
        if size > self.settings.max_bytes:
            raise LimitExceeded(
                f"resource of {size} bytes, at most {self.settings.max_bytes} are stored"
            )

    def _contents(self, stored: StoredVersion) -> bytes:
        identity, context = stored.identity, stored.identity.encode()
        key = self._keyring.unwrap(stored.wrapped, context)
        sealed = stored.sealed
        require_commitment(
            key, context, sealed[:COMMITMENT_SIZE], provider=stored.wrapped.provider
        )
        return Sealer(key).open(identity, sealed[COMMITMENT_SIZE:])

    def _checked(self, row: Row[Any], logged: Change) -> StoredVersion:
        stored = version_of(row, instance=self.instance, realm=self.realm)
        if stored is None or stored.row_hash != logged.row_hash:
            raise _tampered(row.path, "is not the one in the audit log")
        return stored

    def _newest_version(self, connection: Connection, path: str) -> int:
        found = connection.execute(
            select(func.max(RESOURCE.c.version)).where(RESOURCE.c.path == path)
        ).scalar()
        return int(found or 0)

    def _count(self, connection: Connection) -> int:
        counted = select(func.count(RESOURCE.c.path.distinct()))
        return int(connection.execute(counted).scalar_one())


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


def _as_sealed(stored: StoredVersion) -> SealedResource:
    identity = stored.identity
    return SealedResource(
        identity.path, identity.version, identity.owner, identity.model, identity.lease, stored
    )


def _read_elsewhere(sealed: SealedResource, where: ExternalPrefix, limit: int) -> Resource:
    secret = where.source.read(ResourceName.parse(sealed.path))
    if secret is None:
        raise InputMissing(f"{where.source.id} has no secret for {sealed.path}")
    if not secret.contents or len(secret.contents) > limit:
        raise LimitExceeded(
            f"{where.source.id}: the secret for {sealed.path} has {len(secret.contents)} bytes"
        )
    marks = record_marks(secret.contents)
    lease = sealed.lease
    if not where.lease and marks is not None:
        lease = LeaseRule.REQUIRED
    return Resource(
        secret.contents, sealed.version, lease, "" if marks is None else marks.owner,
        "" if marks is None else marks.model, f"{where.source.id} {secret.version}".strip(),
    )  # fmt: skip


def _elsewhere(path: str) -> Refused:
    return Refused(
        f"resource {path} lives elsewhere and is only read here", hint="change it at its source"
    )


def _tampered(path: str, what: str) -> Tampered:
    return Tampered(
        f"{object_name(path)}: the row {what}",
        hint="the database was edited; restore it from a backup",
    )
