"""A key encryption key that is derived from a passphrase, so that no file holds it."""

from __future__ import annotations

import os
import threading
from typing import Final

from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from cai.errors import FormatError, Tampered
from cai.secret import Secret
from kbs.keys.file_provider import unwrap_under, wrap_under
from kbs.keys.provider import KEY_SIZE
from kbs.keys.secret_input import SecretInput

LEAST_PASSPHRASE: Final = 16
"""Shortest passphrase, bytes: whoever has a copy of the database may guess as long as they like."""

SCRYPT_N: Final = 2**17
"""scrypt's cost: 128 MiB of memory and a few tenths of a second for each guess."""

SCRYPT_R, SCRYPT_P = 8, 1
SALT_SIZE: Final = 16
MAX_SALTS: Final = 64
"""Most salts whose keys are kept; a database has one, and one more for each rotation under way."""


class PassphraseProvider:
    """Wraps under scrypt of a passphrase; ``salt (16) ‖ wrapped`` is stored.

    Args:
        name: as the configuration calls it; part of the id, since nothing else names the key.
        passphrase: where it comes from; read when it is first needed.
    """

    def __init__(self, name: str, passphrase: SecretInput) -> None:
        self.id = f"passphrase:{name}"
        self._input = passphrase
        self._lock = threading.Lock()
        self._keys: dict[bytes, Secret] = {}
        self._salt: bytes | None = None

    def wrap(self, key: Secret, context: bytes) -> bytes:
        """See ``KeyProvider``."""
        # The salt of what was opened before is used on, so that opening costs one derivation.
        salt = self._salt or os.urandom(SALT_SIZE)
        return salt + wrap_under(self._key(salt), key, context)

    def unwrap(self, wrapped: bytes, context: bytes) -> Secret:
        """See ``KeyProvider``."""
        salt, body = wrapped[:SALT_SIZE], wrapped[SALT_SIZE:]
        if len(salt) < SALT_SIZE:
            raise Tampered(f"a key wrapped by {self.id} is too short")
        return unwrap_under(self._key(salt), body, context, provider=self.id)

    def close(self) -> None:
        """Forget the derived keys."""
        self._keys.clear()

    def _key(self, salt: bytes) -> Secret:
        with self._lock:
            if salt not in self._keys:
                if len(self._keys) >= MAX_SALTS:
                    self._keys.clear()
                self._keys[salt] = self._derived(salt)
                self._salt = self._salt or salt
            return self._keys[salt]

    def _derived(self, salt: bytes) -> Secret:
        passphrase = self._input.read()
        if len(passphrase) < LEAST_PASSPHRASE:
            raise FormatError(
                f"the {self._input.what} has {len(passphrase)} bytes, at least"
                f" {LEAST_PASSPHRASE} are needed",
                hint="whoever copies the database can try passphrases without being seen",
            )
        scrypt = Scrypt(salt, KEY_SIZE, SCRYPT_N, SCRYPT_R, SCRYPT_P)
        return Secret(scrypt.derive(passphrase.reveal()))
