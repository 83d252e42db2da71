"""Sealing of database rows, so that a stolen or edited database gives no key away.

A row is ``salt (32 bytes) ‖ AES-256-GCM(ciphertext ‖ tag)``. Its key is HKDF-SHA-256 of the key
encryption key with that salt, so no two rows share a key and the all-zero nonce is used once with
each. The additional data is the canonical JSON of who the row is: instance, realm, table, path,
version, owner (decisions §6); a row moved, copied to another database or realm, or relabelled does
not open.

The key encryption key lives in a file of its own directory, never in the data directory that
backups copy.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cai import jcs
from cai.errors import FormatError, SettingError, StorageError, Tampered, from_os_error
from cai.secret import Secret, read_secret_file, write_secret_file

KEK_SIZE = 32
"""Bytes of the key encryption key."""

SALT_SIZE = 32
"""Bytes of salt in front of each sealed row."""

_TAG_SIZE = 16
_NONCE = bytes(12)
_INFO = b"cai/kbs row v1"


@dataclass(frozen=True, slots=True)
class RowIdentity:
    """Who a sealed row is.

    Attributes:
        instance: random id of the database, hex.
        realm: ``production`` or ``simulated``.
        table: database table.
        path: key of the row in its table.
        version: counts the row's contents, from 1.
        owner: who may change it; empty while there is one administrator.
    """

    instance: str
    realm: str
    table: str
    path: str
    version: int
    owner: str = ""

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
            }
        )


class Sealer:
    """Seals and opens rows under one key encryption key."""

    def __init__(self, kek: Secret) -> None:
        if len(kek) != KEK_SIZE:
            raise FormatError(f"the key encryption key must have {KEK_SIZE} bytes")
        self._kek = kek

    def seal(self, identity: RowIdentity, plaintext: bytes) -> bytes:
        """The row's stored bytes."""
        salt = os.urandom(SALT_SIZE)
        return salt + AESGCM(self._key(salt)).encrypt(_NONCE, plaintext, identity.encode())

    def open(self, identity: RowIdentity, sealed: bytes) -> bytes:
        """The row's contents.

        Raises:
            Tampered: the bytes are not the ones that were sealed as this row.
        """
        if len(sealed) < SALT_SIZE + _TAG_SIZE:
            raise Tampered(f"database row {identity.table} {identity.path}: too short")
        salt, body = sealed[:SALT_SIZE], sealed[SALT_SIZE:]
        try:
            return AESGCM(self._key(salt)).decrypt(_NONCE, body, identity.encode())
        except InvalidTag as error:
            raise Tampered(
                f"database row {identity.table} {identity.path} does not authenticate",
                hint="the database was edited, or belongs to another key encryption key",
            ) from error

    def _key(self, salt: bytes) -> bytes:
        return HKDF(hashes.SHA256(), KEK_SIZE, salt, _INFO).derive(self._kek.reveal())


def row_hash(sealed: bytes) -> str:
    """SHA-256 of a row's stored bytes, hex, as audit rows name it."""
    return sha256(sealed).hexdigest()


def require_outside(kek_file: Path, data: Path) -> None:
    """Refuse a key encryption key that lies in the data directory.

    Raises:
        SettingError: it does; a copy of the directory would then hold lock and key.
    """
    if kek_file.resolve().is_relative_to(data.resolve()):
        raise SettingError(
            f"the key encryption key {kek_file} lies inside the data directory {data}",
            hint="give --kek a file in a directory of its own",
        )


def create_kek(kek_file: Path) -> Secret:
    """Write a new key encryption key, readable by its owner only (0400).

    Raises:
        StorageError: it exists already or cannot be written.
    """
    try:
        kek_file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise from_os_error(error, f"create {kek_file.parent}") from error
    kek = os.urandom(KEK_SIZE)
    text = Secret(kek.hex().encode("ascii") + b"\n")
    write_secret_file(kek_file, text, what="key encryption key", mode=0o400)
    return Secret(kek)


def read_kek(kek_file: Path) -> Secret:
    """Read the key encryption key: 64 lower-case hex digits, optional final newline.

    Raises:
        InputMissing, StorageError: it cannot be read, or others than its owner can read it.
        FormatError: it has another form.
    """
    text = read_secret_file(kek_file, what="key encryption key").reveal().removesuffix(b"\n")
    if kek_file.stat().st_mode & 0o077:
        raise StorageError(
            f"the key encryption key {kek_file} is readable by others",
            hint=f"chmod 0400 {kek_file}",
        )
    if len(text) != 2 * KEK_SIZE or not set(text) <= set(b"0123456789abcdef"):
        raise FormatError(f"key encryption key {kek_file}: expected 64 lower-case hex digits")
    return Secret(bytes.fromhex(text.decode("ascii")))
