"""The broker's administrators: stored public keys with roles, a tenant and an end.

Each is a sealed row ``admin/<name>``. The key that came with the database is the administrator
``admin`` as long as the log says nothing else about that name, so it can be replaced or removed
like any other. The name is the person: two names never share a key.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from sqlalchemy import Connection, select

from cai import jcs
from cai.errors import FormatError, InputMissing, LimitExceeded, Refused
from kbs.admin.changes import Conflict, Role
from kbs.admin.rows import AdminRows
from kbs.admin.tokens import key_id, known_roles
from kbs.audit.log import Change
from kbs.core import Core
from kbs.database.tables import ADMIN

FIRST: Final = "admin"
"""Name of the administrator whose key came with the database."""

MAX_ADMINS = 256
"""Most stored administrators."""

MAX_RECORD = 4 * 1024
"""Longest record of an administrator, bytes."""

NAME: Final = re.compile(r"[a-z0-9][a-z0-9_.@-]{0,63}", re.ASCII)
"""Names of administrators; without ``:``, which stands in persons of identity providers."""

MAX_TIME: Final = 253_402_300_799
"""Latest end, Unix seconds: the end of the year 9999."""

_MEMBERS: Final = ("added_by", "expires", "key", "roles", "tenant")
_KEY_SIZE = 32


@dataclass(frozen=True, slots=True)
class Administrator:
    """Who asks.

    Attributes:
        name: the person; given by the key or the identity provider, never by a token's holder.
        roles: what they may do with this token.
        tenant: the one repository that they may change; ``""`` is the whole broker.
        key: checks their signatures under proposals; ``None`` when they cannot sign.
        credential: the stored row that vouches for them, as it was read; ``None`` where
            configuration does.
    """

    name: str
    roles: frozenset[Role]
    tenant: str = ""
    key: Ed25519PublicKey | None = None
    credential: Change | None = None

    @property
    def actor(self) -> dict[str, str]:
        """As audit leaves name them."""
        named = {"kind": "admin", "name": self.name, "roles": " ".join(sorted(self.roles))}
        return {**named, "tenant": self.tenant} if self.tenant else named

    def require(self, *roles: Role) -> None:
        """Refuse unless they have one of ``roles``, or ``admin``.

        Raises:
            Refused: they have none.
        """
        if not self.roles & {Role.ADMIN, *roles}:
            wanted = " or ".join(sorted({Role.ADMIN, *roles}))
            raise Refused(
                f"{self.name} has not the role {wanted}",
                hint="kbs admin list shows who may do what",
                code="admin-role",
            )

    def require_tenant(self, tenant: str) -> None:
        """Refuse what lies outside their tenant.

        Raises:
            Refused: it does.
        """
        if self.tenant and tenant != self.tenant:
            raise Refused(
                f"{self.name} administers {self.tenant!r} only",
                hint="ask an administrator of the whole broker",
                code="admin-tenant",
            )


@dataclass(frozen=True, slots=True)
class AdminRecord:
    """What is stored about an administrator.

    Attributes:
        key: checks their tokens and signatures.
        roles: what they may do.
        tenant: the one repository that they may change; ``""`` is the whole broker.
        expires: Unix seconds from which the key is worth nothing; 0 is never.
        added_by: the person who asked for it.
    """

    key: Ed25519PublicKey
    roles: frozenset[Role]
    tenant: str = ""
    expires: int = 0
    added_by: str = ""

    def encode(self) -> bytes:
        """Canonical JSON; the contents of an ``admin.set``."""
        return jcs.canonical(
            {
                "key": self.key.public_bytes_raw().hex(),
                "roles": sorted(self.roles),
                "tenant": self.tenant,
                "expires": self.expires,
                "added_by": self.added_by,
            }
        )

    @classmethod
    def parse(cls, data: bytes) -> AdminRecord:
        """Read what ``encode`` wrote.

        Raises:
            FormatError: another form, an unknown role, or no role.
        """
        value = jcs.parse_canonical(data, what="administrator", limit=MAX_RECORD)
        if not isinstance(value, dict) or sorted(value) != sorted(_MEMBERS):
            raise FormatError(f"administrator: expected the members {', '.join(_MEMBERS)}")
        roles, expires = value["roles"], value["expires"]
        if not isinstance(roles, list) or not all(isinstance(role, str) for role in roles):
            raise FormatError("administrator: roles must be a list of texts")
        unknown = sorted(set(roles) - set(Role))
        if not roles or unknown:
            raise FormatError(
                f"administrator: unknown role {unknown[0]!r}" if unknown
                else "administrator: at least one role is needed",
                hint=f"roles are {', '.join(Role)}",
            )  # fmt: skip
        if type(expires) is not int or not 0 <= expires <= MAX_TIME:
            raise FormatError("administrator: expires must be Unix seconds, or 0")
        for name in ("key", "tenant", "added_by"):
            if not isinstance(value[name], str):
                raise FormatError(f"administrator: {name} must be text")
        return cls(
            parse_key(value["key"]), known_roles(roles), value["tenant"], expires,
            value["added_by"],
        )  # fmt: skip

    def living(self, now: datetime) -> bool:
        """Whether it has not expired."""
        return not self.expires or now.timestamp() < self.expires


def parse_key(text: str) -> Ed25519PublicKey:
    """Read an Ed25519 public key of 64 lower-case hex digits.

    Raises:
        FormatError: it is none.
    """
    if len(text) != 2 * _KEY_SIZE or not set(text) <= set("0123456789abcdef"):
        raise FormatError("administrator: key must be 64 lower-case hex digits")
    return Ed25519PublicKey.from_public_bytes(bytes.fromhex(text))


class AdminStore:
    """Reads and writes administrators.

    Args:
        core: the broker's state.
    """

    def __init__(self, core: Core) -> None:
        self._core = core
        self._rows = AdminRows(ADMIN, core)

    def find(self, connection: Connection, name: str) -> Administrator | None:
        """A living administrator by name, with everything that they may do."""
        found = self.record(connection, name)
        if found is None or not found[0].living(self._core.clock()):
            return None
        record, change = found
        return Administrator(name, record.roles, record.tenant, record.key, change)

    def named_by_key(self, connection: Connection, identifier: str) -> str | None:
        """The name of the administrator with this key id."""
        name: str | None = connection.execute(
            select(ADMIN.c.path).where(ADMIN.c.key_id == identifier)
        ).scalar()
        if name is None and identifier == key_id(self._core.instance.admin_key):
            return FIRST
        return name

    def record(self, connection: Connection, name: str) -> tuple[AdminRecord, Change | None] | None:
        """A record and what vouches for it; ``None`` when there is none.

        Raises:
            Tampered: the stored row is not the one in the audit log.
        """
        row = self._rows.get(connection, name)
        if row is not None:
            return AdminRecord.parse(row.contents), row.change
        if name == FIRST and self._rows.newest(connection, FIRST) is None:
            key = self._core.instance.admin_key
            # Its credential is that the log says nothing: one day it may.
            return AdminRecord(key, frozenset({Role.ADMIN})), Change(f"{ADMIN.name}/{FIRST}", 0, "")
        return None

    def all(self, connection: Connection) -> dict[str, AdminRecord]:
        """Every record by name, expired ones too."""
        names = {FIRST, *self._rows.paths(connection)}
        found = {name: self.record(connection, name) for name in sorted(names)}
        return {name: item[0] for name, item in found.items() if item is not None}

    def put(self, connection: Connection, name: str, record: AdminRecord) -> Change:
        """Store a record; the caller logs the change.

        Raises:
            Conflict: another administrator has this key, or none would be left.
            LimitExceeded: there are ``MAX_ADMINS`` already.
        """
        others = self.all(connection)
        others.pop(name, None)
        if len(others) >= MAX_ADMINS:
            raise LimitExceeded(f"there are {MAX_ADMINS} administrators already")
        raw = record.key.public_bytes_raw()
        for other, known in others.items():
            if known.key.public_bytes_raw() == raw:
                raise Conflict(
                    f"{other} has this key already", hint="each person has a key of their own"
                )
        self._require_one({**others, name: record})
        return self._rows.put(connection, name, record.encode(), key_id=key_id(record.key))

    def remove(self, connection: Connection, name: str) -> Change:
        """Remove a record; the caller logs the tombstone.

        Raises:
            InputMissing: there is none.
            Conflict: nobody would be left who administers the whole broker.
        """
        others = self.all(connection)
        if others.pop(name, None) is None:
            raise InputMissing(f"there is no administrator {name[:64]!r}", hint="kbs admin list")
        self._require_one(others)
        return self._rows.remove(connection, name)

    def _require_one(self, records: dict[str, AdminRecord]) -> None:
        now = self._core.clock()
        if not any(
            Role.ADMIN in record.roles and not record.tenant and record.living(now)
            and not record.expires for record in records.values()
        ):  # fmt: skip
            raise Conflict(
                "nobody would be left who administers the whole broker without an end",
                hint="first add an administrator with the role admin and no --expires",
            )
