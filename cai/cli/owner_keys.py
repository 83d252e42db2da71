"""Ed25519 keys of owners and administrators as PEM files."""

from __future__ import annotations

from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from cai.errors import FormatError
from cai.secret import Secret, read_secret_file


def read_private_key(path: Path, *, what: str) -> Ed25519PrivateKey:
    """Read a PEM file (PKCS#8) with an Ed25519 private key.

    Raises:
        InputMissing, StorageError: it cannot be read.
        FormatError: it holds something else.
    """
    data = read_secret_file(path, what=what).reveal()
    try:
        key = load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise FormatError(f"{what} {path} is not an unencrypted Ed25519 private key in PEM")
    return key


def private_pem(key: Ed25519PrivateKey) -> Secret:
    """The key as a PEM file (PKCS#8, unencrypted)."""
    return Secret(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
