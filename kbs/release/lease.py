"""Leases as the broker keeps them: who holds which resource until when (docs/spec-lease.md §3).

A renewal is a whole attestation again, so a lease gives no right that its guest would not get
without it. The row is for people: who runs what, and whom does a revocation reach.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Row, delete, insert, select

from cai import jcs
from cai.errors import FormatError, PolicyDenied, Tampered
from kbs.audit.log import Change, newest_change
from kbs.database.tables import LEASE
from kbs.keys.sealing import RowIdentity, Sealer, row_hash
from kbs.release.revocation import BlockKind, Target

if TYPE_CHECKING:
    from kbs.core import Core

KEEP_S = 3600
"""How long an ended lease is still listed, seconds."""

MAX_LISTED = 1000
"""Most leases in one answer."""

MAX_RECORD = 64 * 1024
"""Largest stored lease that is read back, bytes."""


@dataclass(frozen=True, slots=True)
class Lease:
    """One lease at its newest renewal.

    Attributes:
        id: random, 32 hex digits; a renewal keeps it.
        renewals: how often it was renewed.
        resource: path of the resource.
        version: of the resource.
        session: reference of the session that asked last.
        platform: ``platform_id`` of the guest, hex.
        targets: everything that a block could name to end it.
        begun: when it was granted first, Unix seconds.
        issued: when it was granted or renewed last, Unix seconds.
        ttl_s: seconds from then in which new requests start.
        drain_s: seconds more for running ones.
    """

    id: str
    renewals: int
    resource: str
    version: int
    session: str
    platform: str
    targets: tuple[Target, ...]
    begun: int
    issued: int
    ttl_s: int
    drain_s: int

    @property
    def expires(self) -> int:
        """From when nothing new may start, Unix seconds."""
        return self.issued + self.ttl_s

    @property
    def ends(self) -> int:
        """When the last running request ends, Unix seconds."""
        return self.expires + self.drain_s

    @property
    def object(self) -> str:
        """What the audit log calls it."""
        return f"{LEASE.name}/{self.id}"

    def to_json(self) -> dict[str, Any]:
        """The stored form; also what the admin listener shows."""
        return {
            "id": self.id,
            "renewals": self.renewals,
            "resource": self.resource,
            "version": self.version,
            "session": self.session,
            "platform": self.platform,
            "targets": [[target.kind.value, target.value] for target in self.targets],
            "begun": self.begun,
            "issued": self.issued,
            "ttl_s": self.ttl_s,
            "drain_s": self.drain_s,
        }

    @classmethod
    def from_json(cls, value: Any) -> Lease:
        """Read ``to_json``'s form.

        Raises:
            FormatError: another form.
        """
        try:
            members = dict(value)
            named = tuple(Target(BlockKind(kind), text) for kind, text in members.pop("targets"))
            return cls(targets=named, **members)
        except (TypeError, ValueError, KeyError) as error:
            raise FormatError("lease: a member is missing or of another form") from error


class LeaseStore:
    """The leases of one database."""

    def __init__(self, *, instance: str, realm: str, sealer: Sealer) -> None:
        self._instance = instance
        self._realm = realm
        self._sealer = sealer

    @classmethod
    def of(cls, core: Core) -> LeaseStore:
        """The store of this broker."""
        instance = core.instance
        return cls(instance=instance.id, realm=instance.realm.value, sealer=instance.sealer)

    def grant(
        self, connection: Connection, wanted: Lease, *, renews: str, now: datetime
    ) -> tuple[Lease, Change]:
        """Store a new lease or the renewal of one, in the transaction that logs it.

        Args:
            connection: that transaction.
            wanted: the lease as of now; its id and its beginning are set here.
            renews: id of the lease that goes on, or empty. One that has ended begins anew.
            now: the broker's clock.

        Returns:
            The lease as stored, and the change to log.

        Raises:
            PolicyDenied: the lease is another guest's, or of another resource.
            Tampered: the stored lease is not the one in the audit log.
        """
        seconds = int(now.timestamp())
        connection.execute(delete(LEASE).where(LEASE.c.ends <= seconds - KEEP_S))
        known = self._find(connection, renews) if renews else None
        if known is None or known.ends <= seconds:
            lease = replace(wanted, id=os.urandom(16).hex(), renewals=0, begun=wanted.issued)
        elif (known.resource, known.platform) != (wanted.resource, wanted.platform):
            raise PolicyDenied(
                "the lease to renew is of another resource or another platform",
                hint="ask for a lease of your own",
                code="lease-foreign",
            )
        else:
            lease = replace(
                wanted, id=known.id, renewals=known.renewals + 1, begun=known.begun
            )
        return lease, self._put(connection, lease)

    def listed(self, connection: Connection) -> list[Lease]:
        """The leases, those that end last first; ended ones stay for ``KEEP_S``.

        Raises:
            Tampered: a row is not the one in the audit log.
        """
        rows = connection.execute(select(LEASE).order_by(LEASE.c.ends.desc()).limit(MAX_LISTED))
        return [self._open(connection, row) for row in rows.all()]

    def reached(
        self, connection: Connection, target: Target, *, now: datetime
    ) -> list[Lease]:
        """The living leases that a block of ``target`` reaches.

        Raises:
            Tampered: a row is not the one in the audit log.
        """
        living = connection.execute(select(LEASE).where(LEASE.c.ends > int(now.timestamp())))
        opened = [self._open(connection, row) for row in living.all()]
        return [lease for lease in opened if target in lease.targets]

    def _find(self, connection: Connection, lease_id: str) -> Lease | None:
        row = connection.execute(select(LEASE).where(LEASE.c.id == lease_id)).one_or_none()
        return None if row is None else self._open(connection, row)

    def _put(self, connection: Connection, lease: Lease) -> Change:
        version = lease.renewals + 1
        sealed = self._sealer.seal(
            self._identity(lease.id, version), jcs.canonical(lease.to_json())
        )
        connection.execute(delete(LEASE).where(LEASE.c.id == lease.id))
        connection.execute(
            insert(LEASE).values(id=lease.id, version=version, ends=lease.ends, sealed=sealed)
        )
        return Change(lease.object, version, row_hash(sealed))

    def _open(self, connection: Connection, row: Row[Any]) -> Lease:
        name = f"{LEASE.name}/{row.id}"
        if newest_change(connection, name) != Change(name, row.version, row_hash(row.sealed)):
            raise Tampered(f"{name}: the stored row is not the one in the audit log")
        record = self._sealer.open(self._identity(row.id, row.version), row.sealed)
        lease = Lease.from_json(
            jcs.parse_canonical(record, what="lease", limit=MAX_RECORD)
        )
        if (lease.id, lease.ends) != (row.id, row.ends):
            raise Tampered(f"{name}: its end was changed")
        return lease

    def _identity(self, lease_id: str, version: int) -> RowIdentity:
        return RowIdentity(self._instance, self._realm, LEASE.name, lease_id, version)
