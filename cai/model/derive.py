"""Key derivation of the sealed format: every label in one place (docs/spec-format.md §2)."""

from __future__ import annotations

import hmac
from hashlib import sha256

KEK_COMMIT = b"cai/1 kek commit"
WRAP = b"cai/1 wrap"
COMMIT = b"cai/1 commit"
HEADER = b"cai/1 header"
MANIFEST = b"cai/1 manifest"
FILE = b"cai/1 file"


def extract(salt: bytes, key: bytes) -> bytes:
    """HKDF-Extract with SHA-256 (RFC 5869 §2.2): 32 bytes."""
    return hmac.digest(salt, key, sha256)


def expand(prk: bytes, info: bytes) -> bytes:
    """HKDF-Expand with SHA-256 to 32 bytes, which is its first block (RFC 5869 §2.3)."""
    return hmac.digest(prk, info + b"\x01", sha256)


def file_key(object_key: bytes, header: bytes) -> bytes:
    """Key of one object's chunks: an edited header gives another key (§2)."""
    return expand(object_key, FILE + sha256(header).digest())
