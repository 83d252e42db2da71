"""Encrypted names and targets of links (spec-gocryptfs §3)."""

from __future__ import annotations

import base64
import binascii
import os
from dataclasses import dataclass
from hashlib import sha256

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cai.errors import FormatError, Tampered
from cai.model.gocryptfs.eme import BLOCK, Eme
from cai.model.gocryptfs.keys import CipherKeys
from cai.model.gocryptfs.layout import (
    IV_SIZE,
    LONG_PREFIX,
    MAX_LONG_NAME_FILE,
    NAME_MAX,
    OVERHEAD,
)
from cai.model.paths import MAX_PATH

_LINK_AAD = bytes(8)
ZERO_IV = bytes(16)
"""Directory IV of ``-deterministic-names``."""


@dataclass(frozen=True, slots=True)
class StoredName:
    """How a name is stored.

    Attributes:
        name: in the directory.
        long: content of the file ``name + ".name"`` of a long name; empty otherwise.
    """

    name: str
    long: str = ""


class NameCipher:
    """Encrypts names and targets under the keys of one directory.

    Args:
        keys: the directory's keys.
        long_name_max: longest encrypted name that is stored as such, characters.
    """

    def __init__(self, keys: CipherKeys, long_name_max: int = NAME_MAX) -> None:
        self._eme = Eme(keys.name)
        self._links = AESGCM(keys.content)
        self._long_name_max = long_name_max

    def encrypt(self, name: bytes, iv: bytes) -> StoredName:
        """Encrypt one name in the directory of this IV."""
        missing = BLOCK - len(name) % BLOCK
        text = _encode(self._eme.encrypt(iv, name + bytes([missing]) * missing))
        if len(text) <= self._long_name_max:
            return StoredName(text)
        return StoredName(long_name(text), text)

    def decrypt(self, text: str, iv: bytes, *, long: bool = False) -> bytes:
        """Decrypt one name.

        Args:
            text: the encrypted name, of a long one the content of its ``.name`` file.
            iv: of its directory.
            long: it is stored as a long name.

        Raises:
            FormatError: it is no encrypted name, or not one of this directory.
        """
        if len(text) > MAX_LONG_NAME_FILE or (len(text) > self._long_name_max) != long:
            raise FormatError(f"an encrypted name of {len(text)} characters is in the wrong place")
        padded = self._eme.decrypt(iv, _decode(text))
        count = padded[-1]
        if not 1 <= count <= BLOCK or count >= len(padded) or padded[-count:] != bytes(
            [count]
        ) * count:
            raise FormatError("a name does not decrypt: wrong padding")
        name = padded[:-count]
        if name in (b".", b"..") or len(name) > NAME_MAX or b"/" in name or b"\x00" in name:
            raise FormatError("a name decrypts to what no file system allows")
        return name

    def encrypt_target(self, target: bytes) -> str:
        """The stored text of a symbolic link; empty for an empty target."""
        if not target:
            return ""
        iv = os.urandom(IV_SIZE)
        return _encode(iv + self._links.encrypt(iv, target, _LINK_AAD))

    def decrypt_target(self, text: str) -> bytes:
        """The target of a stored link.

        Raises:
            Tampered: it does not verify.
            FormatError: it is no encrypted target.
        """
        if not text:
            return b""
        sealed = _decode(text)
        if not OVERHEAD < len(sealed) <= OVERHEAD + MAX_PATH:
            raise FormatError("an encrypted link has an impossible length")
        try:
            return self._links.decrypt(sealed[:IV_SIZE], sealed[IV_SIZE:], _LINK_AAD)
        except InvalidTag:
            raise Tampered("an encrypted link does not verify") from None


def long_name(text: str) -> str:
    """Name under which a long encrypted name is stored: a hash of it."""
    return LONG_PREFIX + _encode(sha256(text.encode("ascii")).digest())


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode("ascii").rstrip("=")


def _decode(text: str) -> bytes:
    """Base64 with the URL alphabet, without padding; one spelling only, as stock from 2.5.2 on."""
    try:
        data = base64.b64decode(
            text.encode("ascii") + b"=" * (-len(text) % 4), altchars=b"-_", validate=True
        )
    except (binascii.Error, UnicodeEncodeError) as error:
        raise FormatError("a stored name is not base64") from error
    if _encode(data) != text:
        raise FormatError("a stored name is not canonical base64")
    return data
