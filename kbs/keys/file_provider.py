"""The default provider: a key encryption key in a file of its own directory, 0400."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cai.errors import Tampered
from cai.secret import Secret
from kbs.keys.provider import KEY_SIZE, bind, unbind
from kbs.keys.sealing import create_kek, read_kek

SALT_SIZE: Final = 32
"""Bytes of salt in front of each wrapped key."""

_TAG_SIZE = 16
_NONCE = bytes(12)


def wrap_under(kek: Secret, key: Secret, context: bytes) -> bytes:
    """``salt (32) ‖ AES-256-GCM``: a key of HKDF from ``kek`` and the salt, so no nonce repeats."""
    salt = os.urandom(SALT_SIZE)
    return salt + AESGCM(_derived(kek, salt)).encrypt(_NONCE, bind(key, context), context)


def unwrap_under(kek: Secret, wrapped: bytes, context: bytes, *, provider: str) -> Secret:
    """The key inside ``wrap_under``'s bytes.

    Raises:
        Tampered: they do not authenticate.
    """
    salt, body = wrapped[:SALT_SIZE], wrapped[SALT_SIZE:]
    if len(body) < _TAG_SIZE:
        raise Tampered(f"a key wrapped by {provider} is too short")
    try:
        data = AESGCM(_derived(kek, salt)).decrypt(_NONCE, body, context)
    except InvalidTag as error:
        raise Tampered(
            f"a key wrapped by {provider} does not authenticate",
            hint="the database was edited, or the key encryption key is another's",
        ) from error
    return unbind(data, context, provider=provider)


class FileProvider:
    """Wraps under the key of a file.

    Args:
        kek: ``KEY_SIZE`` bytes.
    """

    def __init__(self, kek: Secret) -> None:
        self._kek = kek
        # Two files are two providers, so that a rotation from one to the other is possible.
        self.id = f"file:{_expand(kek, b'cai/kbs kek id').hex()[:16]}"

    @classmethod
    def open(cls, path: Path, *, create: bool = False) -> FileProvider:
        """Read the key file.

        Args:
            path: 64 hex digits, 0400.
            create: make it when it is missing; only for a new database or a rotation.

        Raises:
            InputMissing, StorageError, FormatError: it cannot be used.
        """
        return cls(create_kek(path) if create and not path.exists() else read_kek(path))

    def wrap(self, key: Secret, context: bytes) -> bytes:
        """See ``KeyProvider``."""
        return wrap_under(self._kek, key, context)

    def unwrap(self, wrapped: bytes, context: bytes) -> Secret:
        """See ``KeyProvider``."""
        return unwrap_under(self._kek, wrapped, context, provider=self.id)

    def close(self) -> None:
        """Nothing is held open."""


def _derived(kek: Secret, salt: bytes) -> bytes:
    return HKDF(hashes.SHA256(), KEY_SIZE, salt, b"cai/kbs key wrap v1").derive(kek.reveal())


def _expand(kek: Secret, info: bytes) -> bytes:
    return HKDF(hashes.SHA256(), KEY_SIZE, None, info).derive(kek.reveal())
