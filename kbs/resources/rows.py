"""One version of a resource as it is stored: its identity, its bytes and what names them.

``sealed`` is ``commitment (32) ‖ salt (32) ‖ AES-256-GCM`` under a data key of its own, which the
key provider wrapped (``wrapped``). Everything that stands beside it in clear is in the identity,
which is the additional data of both encryptions; the row hash in the audit log covers identity and
sealed bytes, but not the wrapped key, so a rotation of the provider's key leaves it as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import sha256
from typing import Any

from sqlalchemy import Row

from cai import jcs
from cai.errors import CaiError
from kbs.database.tables import RESOURCE
from kbs.keys.provider import WrappedKey
from kbs.keys.sealing import RowIdentity

_DIGITS = 64


class LeaseRule(StrEnum):
    """Whether a resource is given away only by lease."""

    REQUIRED = "required"
    OPTIONAL = "optional"


@dataclass(frozen=True, slots=True)
class ResourceIdentity(RowIdentity):
    """Who a sealed version is, with everything that is in clear beside it.

    Attributes:
        model: model id of a release record, 64 hex digits; empty for other contents.
        lease: whether it is given away only by lease.
        size: bytes of its contents.
        created: Unix seconds.
    """

    model: str = ""
    lease: LeaseRule = LeaseRule.OPTIONAL
    size: int = 0
    created: int = 0

    def encode(self) -> bytes:
        """The additional data: canonical JSON of all members."""
        return jcs.canonical(
            {
                "instance": self.instance,
                "realm": self.realm,
                "table": self.table,
                "path": self.path,
                "version": self.version,
                "owner": self.owner,
                "model": self.model,
                "lease": self.lease.value,
                "size": self.size,
                "created": self.created,
            }
        )


@dataclass(frozen=True, slots=True)
class StoredVersion:
    """A row of the table, or one that is about to be.

    Attributes:
        identity: who it is.
        wrapped: its data key.
        sealed: its contents.
    """

    identity: ResourceIdentity
    wrapped: WrappedKey
    sealed: bytes = field(repr=False)

    @property
    def row_hash(self) -> str:
        """What the audit log knows of it: SHA-256 of identity and sealed bytes, hex."""
        return sha256(self.identity.encode() + b"\x00" + self.sealed).hexdigest()

    @property
    def columns(self) -> dict[str, Any]:
        """As the table holds it."""
        identity = self.identity
        return {
            "path": identity.path,
            "version": identity.version,
            "owner": identity.owner,
            "model": identity.model,
            "lease": identity.lease.value,
            "size": identity.size,
            "created": identity.created,
            "provider": self.wrapped.provider,
            "wrapped": self.wrapped.blob,
            "sealed": self.sealed,
        }


def version_of(row: Row[Any], *, instance: str, realm: str) -> StoredVersion | None:
    """The version in a row; ``None`` when a column holds what is never written there."""
    try:
        lease = LeaseRule(row.lease)
    except ValueError:
        return None
    identity = ResourceIdentity(
        instance, realm, RESOURCE.name, row.path, row.version, row.owner, row.model, lease,
        row.size, row.created,
    )  # fmt: skip
    return StoredVersion(identity, WrappedKey(row.provider, bytes(row.wrapped)), bytes(row.sealed))


@dataclass(frozen=True, slots=True)
class RecordMarks:
    """What the broker reads from contents that are a release record; it verifies nothing there.

    Attributes:
        owner: the owner's key, 64 hex digits, or empty.
        model: the model id, 64 hex digits, or empty.
    """

    owner: str
    model: str


def record_marks(contents: bytes) -> RecordMarks | None:
    """The marks of a release record: canonical JSON with a member ``cai-key``; else ``None``."""
    if not contents.startswith(b"{"):
        return None
    try:
        value = jcs.parse_canonical(contents, what="resource", limit=len(contents))
    except CaiError:
        return None
    if not isinstance(value, dict) or "cai-key" not in value:
        return None
    return RecordMarks(_digits(value.get("owner_key")), _digits(value.get("model_id")))


def _digits(value: object) -> str:
    plain = isinstance(value, str) and len(value) == _DIGITS
    return str(value) if plain and set(str(value)) <= set("0123456789abcdef") else ""
