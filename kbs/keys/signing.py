"""The broker's own signing keys: sealed rows, rotated with overlap, held against the audit log.

A key's versions are never rewritten; the one before is retired by the creation of the next, and
stays usable for verification for an overlap, so that nothing signed a moment ago stops verifying.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from hashlib import sha256
from typing import Any, Final

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import Connection, Row, func, insert, select

from cai import jcs
from cai.errors import FormatError, InputMissing, Tampered
from kbs.audit.log import Change, newest_change
from kbs.database.tables import SIGNING_KEY
from kbs.keys.certificates import issue_chain
from kbs.keys.sealing import RowIdentity, Sealer, row_hash
from kbs.names import Realm

MAX_RECORD: Final = 16 * 1024
"""Largest sealed key record, bytes."""

ID_SIZE: Final = 16
"""Bytes of a key's id: the start of SHA-256 over its SubjectPublicKeyInfo."""


class KeyName(StrEnum):
    """What a key signs; the value is its name in commands, rows and the audit log."""

    TOKEN = "token"  # noqa: S105 - a name
    APPRAISAL = "appraisal"
    TICKET = "ticket"
    CHECKPOINT = "checkpoint"

    @property
    def is_es256(self) -> bool:
        """Whether it is a P-256 key with a certificate chain; else Ed25519."""
        return self in (KeyName.TOKEN, KeyName.APPRAISAL)


OVERLAP_SECONDS: Final = {
    KeyName.TOKEN: 3600,
    KeyName.APPRAISAL: 24 * 3600,
    KeyName.TICKET: 24 * 3600,
    # Checkpoints are verified years later.
    KeyName.CHECKPOINT: None,
}
"""How long a retired key still verifies, seconds; ``None`` is for ever. Longer than anything that
the key signs lives."""


@dataclass(frozen=True, slots=True)
class SigningKey:
    """One version of a key.

    Attributes:
        name: what it signs.
        id: names the public key, 32 hex digits.
        private: the key itself.
        created: when it was made.
        retired: when its successor was made; ``None`` for the current one.
        chain: leaf and authority, DER; empty for Ed25519.
    """

    name: KeyName
    id: str
    private: ec.EllipticCurvePrivateKey | Ed25519PrivateKey
    created: datetime
    retired: datetime | None
    chain: tuple[bytes, ...] = ()

    @property
    def es256(self) -> ec.EllipticCurvePrivateKey:
        """The key, of a name that is ES256."""
        if not isinstance(self.private, ec.EllipticCurvePrivateKey):
            raise FormatError(f"signing key {self.name.value} is not an EC key")
        return self.private

    @property
    def ed25519(self) -> Ed25519PrivateKey:
        """The key, of a name that is Ed25519."""
        if not isinstance(self.private, Ed25519PrivateKey):
            raise FormatError(f"signing key {self.name.value} is not an Ed25519 key")
        return self.private


def object_name(name: KeyName) -> str:
    """What the audit log calls a key."""
    return f"secret/{name.value}-key"


def parse_key_name(text: str) -> KeyName:
    """The key that a person names.

    Raises:
        InputMissing: there is none.
    """
    try:
        return KeyName(text)
    except ValueError as error:
        raise InputMissing(
            f"there is no signing key {text[:64]!r}",
            hint=f"known are: {', '.join(name.value for name in KeyName)}",
        ) from error


class SigningKeys:
    """The signing keys of one database.

    Args:
        instance: its id.
        realm: its realm; the certificates of the simulated one say so.
        sealer: opens its rows.
    """

    def __init__(self, *, instance: str, realm: str, sealer: Sealer) -> None:
        self._instance = instance
        self._realm = realm
        self._sealer = sealer
        self._opened: dict[tuple[str, int, int, str], SigningKey] = {}

    def current(self, connection: Connection, name: KeyName) -> SigningKey:
        """The key that signs now.

        Raises:
            InputMissing: it was never made.
            Tampered: the newest row is not the one in the audit log.
        """
        return self._keys(connection, name)[0]

    def living(
        self, connection: Connection, name: KeyName, now: datetime
    ) -> tuple[SigningKey, ...]:
        """The keys whose signatures are good now, the current one first."""
        overlap = OVERLAP_SECONDS[name]
        return tuple(
            key
            for key in self._keys(connection, name)
            if key.retired is None
            or overlap is None
            or (now - key.retired).total_seconds() <= overlap
        )

    def create(self, connection: Connection, *, now: datetime) -> tuple[Change, ...]:
        """Make every key of a new database; the caller logs each change."""
        return tuple(self.rotate(connection, name, now=now) for name in KeyName)

    def rotate(self, connection: Connection, name: KeyName, *, now: datetime) -> Change:
        """Make the next version of a key; the caller logs the change."""
        newest = connection.execute(
            select(func.max(SIGNING_KEY.c.version)).where(SIGNING_KEY.c.name == name.value)
        ).scalar()
        version, created = (newest or 0) + 1, int(now.timestamp())
        chain: tuple[bytes, ...] = ()
        private: ec.EllipticCurvePrivateKey | Ed25519PrivateKey
        if name.is_es256:
            private = ec.generate_private_key(ec.SECP256R1())
            chain = issue_chain(
                private.public_key(), name=name.value, instance=self._instance,
                simulated=self._realm == Realm.SIMULATED.value, now=now,
            )  # fmt: skip
        else:
            private = Ed25519PrivateKey.generate()
        record = jcs.canonical(
            {
                "created": created,
                "private": private.private_bytes(
                    serialization.Encoding.DER,
                    serialization.PrivateFormat.PKCS8,
                    serialization.NoEncryption(),
                ).hex(),
                "chain": [item.hex() for item in chain],
            }
        )
        sealed = self._sealer.seal(self._identity(name, version), record)
        connection.execute(
            insert(SIGNING_KEY).values(
                name=name.value, version=version, created=created, sealed=sealed
            )
        )
        return Change(object_name(name), version, row_hash(sealed))

    def _keys(self, connection: Connection, name: KeyName) -> list[SigningKey]:
        """Every version, the newest first."""
        rows = connection.execute(
            select(SIGNING_KEY)
            .where(SIGNING_KEY.c.name == name.value)
            .order_by(SIGNING_KEY.c.version.desc())
        ).all()
        if not rows:
            raise InputMissing(
                f"the database has no signing key {name.value}", hint="restore it from a backup"
            )
        found = Change(object_name(name), rows[0].version, row_hash(rows[0].sealed))
        if newest_change(connection, found.object) != found:
            raise Tampered(
                f"{found.object}: the stored row is not the one in the audit log",
                hint="the database was edited; restore it from a backup",
            )
        keys: list[SigningKey] = []
        for row in rows:
            keys.append(self._open(name, row, retired=keys[-1].created if keys else None))
        return keys

    def _open(self, name: KeyName, row: Row[Any], *, retired: datetime | None) -> SigningKey:
        # Opening is repeated for each token otherwise; whatever is in clear is part of the key.
        place = (name.value, row.version, row.created, row_hash(row.sealed))
        opened = self._opened.get(place)
        if opened is None:
            opened = self._opened[place] = self._unsealed(name, row)
        return replace(opened, retired=retired)

    def _unsealed(self, name: KeyName, row: Row[Any]) -> SigningKey:
        record = jcs.parse_canonical(
            self._sealer.open(self._identity(name, row.version), row.sealed),
            what="signing key", limit=MAX_RECORD,
        )  # fmt: skip
        if record["created"] != row.created:
            raise Tampered(f"{object_name(name)}: the time of its row was changed")
        private = serialization.load_der_private_key(
            bytes.fromhex(record["private"]), password=None
        )
        if not isinstance(private, ec.EllipticCurvePrivateKey | Ed25519PrivateKey):
            raise FormatError(f"signing key {name.value} is of another kind")
        spki = private.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        return SigningKey(
            name, sha256(spki).digest()[:ID_SIZE].hex(), private,
            datetime.fromtimestamp(row.created, UTC), None,
            tuple(bytes.fromhex(item) for item in record["chain"]),
        )  # fmt: skip

    def _identity(self, name: KeyName, version: int) -> RowIdentity:
        return RowIdentity(self._instance, self._realm, SIGNING_KEY.name, name.value, version)
