"""One key broker's own state: its id, realm, keys and where they lie.

First start creates, beside each other: the data directory (0700) with the database and
``admin.key`` (0600), and a directory of its own for the key encryption key (0400).
"""

from __future__ import annotations

import contextlib
import uuid
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from sqlalchemy import Connection, insert, select

from cai.errors import (
    FormatError,
    InputMissing,
    SettingError,
    StorageError,
    from_os_error,
)
from cai.secret import Secret, read_secret_file, write_secret_file
from kbs.audit.log import AuditLog, Change, Entry
from kbs.database.engine import Database
from kbs.database.opening import hold_creation, open_database
from kbs.database.settings import DatabaseSettings
from kbs.database.tables import AUDIT_HEAD, INSTANCE, SECRET
from kbs.keys.keyring import Keyring
from kbs.keys.rowkey import new_row_key, open_row_key, row_key_state, store_row_key
from kbs.keys.sealing import RowIdentity, Sealer, require_outside, row_hash
from kbs.keys.settings import KeySettings
from kbs.keys.signing import KeyName, SigningKeys
from kbs.names import Realm

ADMIN_KEY_NAME = "admin.key"
"""The administrator's private key in the data directory; it may be moved away."""

_ADMIN_KEY = "admin-key"


@dataclass(frozen=True)
class Instance:
    """An open key broker database with its keys.

    Attributes:
        id: random, 32 hex digits, made with the database.
        realm: fixed at creation.
        database: the open database.
        keyring: the providers of key encryption keys.
        sealer: opens its rows.
        signing: its own signing keys.
        admin_key: public key that administrators' tokens are checked with.
        token_key: signed attestation tokens when the database was opened; ``signing`` knows the
            current one.
    """

    id: str
    realm: Realm
    database: Database
    keyring: Keyring
    sealer: Sealer
    signing: SigningKeys
    admin_key: Ed25519PublicKey
    token_key: ec.EllipticCurvePrivateKey


def default_kek(data: Path) -> Path:
    """Where the key encryption key lies unless told otherwise: beside the data directory."""
    absolute = data.absolute()
    return absolute.with_name(absolute.name + "-kek") / "kek"


def open_instance(
    data: Path,
    kek_file: Path,
    realm: Realm,
    *,
    now: datetime,
    database: DatabaseSettings | None = None,
    keys: KeySettings | None = None,
) -> Instance:
    """Open the key broker's database, creating everything on first start.

    Of several programs that start at once on an empty database one creates the instance; the
    others find it.

    Args:
        data: directory of the administrator's first key and, with SQLite, of the database.
        kek_file: key encryption key.
        realm: which platforms it may release to.
        now: the time.
        database: where the database is; ``None`` is SQLite in ``data``.
        keys: the providers of key encryption keys; ``None`` is ``kek_file`` alone.

    Raises:
        SettingError: the key encryption key lies inside ``data``, the database is of the other
            realm, or its schema is an older one on PostgreSQL.
        WrongKey: the key encryption key is another database's.
        InputError, StorageError: something cannot be read or written.
    """
    require_outside(kek_file, data)
    private_directory(data)
    opened = open_database(data, database or DatabaseSettings())
    with contextlib.ExitStack() as undo:
        undo.callback(opened.close)
        with opened.read() as connection:
            found = _row(connection)
        if found is None:
            found = _create_once(opened, data, kek_file, keys or KeySettings(), realm, now=now)
        instance_id, found_realm = found
        if found_realm != realm.value:
            raise _other_realm(opened.where, found_realm)
        keyring = _keyring(keys or KeySettings(), kek_file, data, opened)
        undo.callback(keyring.close)
        instance = _open(opened, instance_id, realm, keyring)
        undo.pop_all()
    return instance


def read_admin_key(path: Path) -> Ed25519PrivateKey:
    """Read an administrator's private key (PEM, PKCS#8, Ed25519).

    Raises:
        InputMissing, StorageError: it cannot be read.
        FormatError: it is another kind of file or key.
    """
    data = read_secret_file(path, what="admin key").reveal()
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise FormatError(f"admin key {path}: not an unencrypted PEM private key") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise FormatError(f"admin key {path}: not an Ed25519 key")
    return key


def _row(connection: Connection) -> tuple[str, str] | None:
    row = connection.execute(select(INSTANCE.c.id, INSTANCE.c.realm)).one_or_none()
    return None if row is None else (row.id, row.realm)


def _create_once(
    database: Database, data: Path, kek_file: Path, keys: KeySettings, realm: Realm, *,
    now: datetime,
) -> tuple[str, str]:  # fmt: skip
    """Create the instance, unless another replica is first; only the one that does makes keys."""
    with database.write() as connection:
        hold_creation(connection)
        found = _row(connection)
        if found is not None:
            return found
        with contextlib.closing(keys.open(kek_file, data=data, create=True)) as keyring:
            return _create(connection, data, keyring, realm, now=now)


def _create(
    connection: Connection, data: Path, keyring: Keyring, realm: Realm, *, now: datetime
) -> tuple[str, str]:
    # A first start that was interrupted leaves key files behind; they are used again.
    admin = _first_admin(data)
    instance_id = uuid.uuid4().hex
    row_key, key = new_row_key(keyring, instance=instance_id, realm=realm.value)
    sealer = Sealer(key)
    created = now.strftime("%Y-%m-%dT%H:%M:%SZ")
    connection.execute(insert(INSTANCE).values(id=instance_id, realm=realm.value, created=created))
    connection.execute(insert(AUDIT_HEAD).values(id=1, size=0))
    sealed = sealer.seal(_identity(instance_id, realm, _ADMIN_KEY), admin.public_bytes_raw())
    connection.execute(insert(SECRET).values(path=_ADMIN_KEY, version=1, sealed=sealed))
    signing = SigningKeys(instance=instance_id, realm=realm.value, sealer=sealer)
    log, request = AuditLog(instance_id, realm.value), uuid.uuid4().hex
    system = {"kind": "system"}
    log.append(connection, Entry("instance.create", system, request, allowed=True), now)
    first = Change(f"{SECRET.name}/{_ADMIN_KEY}", 1, row_hash(sealed))
    made = (store_row_key(connection, row_key), *signing.create(connection, now=now), first)
    for change in made:
        entry = Entry(
            "key.create", system, request, allowed=True, subject=change.object, change=change
        )
        log.append(connection, entry, now)
    return instance_id, realm.value


def _first_admin(data: Path) -> Ed25519PublicKey:
    admin_file = data / ADMIN_KEY_NAME
    if not admin_file.exists():
        pem = Ed25519PrivateKey.generate().private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        write_secret_file(admin_file, Secret(pem), what="admin key")
    return read_admin_key(admin_file).public_key()


def _keyring(keys: KeySettings, kek_file: Path, data: Path, database: Database) -> Keyring:
    try:
        return keys.open(kek_file, data=data, create=False)
    except InputMissing as error:
        if database.is_shared and error.hint is not None:
            error.hint = "copy it from the replica that made the database"
        raise


def _open(database: Database, instance_id: str, realm: Realm, keyring: Keyring) -> Instance:
    with database.read() as connection:
        state = row_key_state(connection)
    sealer = Sealer(open_row_key(state, keyring, instance=instance_id, realm=realm.value))
    signing = SigningKeys(instance=instance_id, realm=realm.value, sealer=sealer)
    with database.read() as connection:
        admin = _secret(connection, sealer, instance_id, realm, _ADMIN_KEY)
        token_key = signing.current(connection, KeyName.TOKEN).es256
    return Instance(
        instance_id, realm, database, keyring, sealer, signing,
        Ed25519PublicKey.from_public_bytes(admin), token_key,
    )  # fmt: skip


def _secret(
    connection: Connection, sealer: Sealer, instance_id: str, realm: Realm, path: str
) -> bytes:
    sealed = connection.execute(select(SECRET.c.sealed).where(SECRET.c.path == path)).scalar()
    if sealed is None:
        raise InputMissing(f"the database has no {path}", hint="restore it from a backup")
    return sealer.open(_identity(instance_id, realm, path), sealed)


def _identity(instance_id: str, realm: Realm, path: str) -> RowIdentity:
    return RowIdentity(instance_id, realm.value, SECRET.name, path, 1)


def _other_realm(path: str, found: str) -> SettingError:
    if found == Realm.SIMULATED.value:
        return SettingError(
            f"{path} is a database of the simulated realm",
            hint="it opens only with --unsafe-simulated-root; use another --data for production",
        )
    return SettingError(
        f"{path} is a production database; --unsafe-simulated-root is refused",
        hint="use another --data directory for the simulated realm",
    )


def private_directory(path: Path) -> None:
    """Make a directory that is ours alone, or find it so.

    Raises:
        InputError, StorageError: it cannot be made, or others may enter it.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = path.stat().st_mode
    except FileExistsError as error:
        raise InputMissing(f"{path} is not a directory", hint="choose another --data") from error
    except OSError as error:
        raise from_os_error(error, f"create data directory {path}") from error
    if mode & 0o077:
        raise StorageError(
            f"the data directory {path} is open to others", hint=f"chmod 0700 {path}"
        )
