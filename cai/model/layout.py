"""Names, sizes and limits of the sealed format (docs/spec-format.md §1, §10), in one place."""

from __future__ import annotations

import re

FORMAT = 1
"""Version of the format: member ``cai`` of ``cai.json`` and of the manifest."""

SUITE = "AES-256-GCM/HKDF-SHA256"
"""The one suite of version 1 (spec-format, notation)."""

METHOD = "cai"
"""Member ``method`` of ``cai.json``: the native format."""

GOCRYPTFS = "gocryptfs"
"""Member ``method`` of ``cai.json`` beside a gocryptfs directory (docs/spec-gocryptfs.md)."""

HEADER_FILE = "cai.json"
MANIFEST_FILE = "manifest.cai"
INDEX_FILE = "index.cai"
SIGNATURE_FILE = "manifest.sig"
OBJECTS_DIR = "objects"
DATA_DIR = "data"
"""The cipher directory of method gocryptfs."""

KEY_SIZE = 32
"""Bytes of a KEK, a DEK and an object key."""

TAG_SIZE = 16
"""Bytes of a GCM tag."""

OBJECT_HEADER_SIZE = 4096
"""Bytes of an object's header; the tag table is padded to multiples of it as well."""

MIN_CHUNK_LOG2, MAX_CHUNK_LOG2 = 16, 22
"""Chunk sizes are powers of two from 64 KiB to 4 MiB."""

DEFAULT_CHUNK = 256 * 1024
"""Chunk size that a writer uses unless told otherwise, bytes."""

MAX_OBJECT_SIZE = 2**40
"""Largest plaintext of one object, bytes."""

MAX_CHUNKS = 2**22
"""Most chunks in one object; its tag table is then 64 MiB."""

MAX_HEADER_FILE = 64 * 1024
"""Largest ``cai.json`` that is read, bytes."""

MIN_MANIFEST, MAX_MANIFEST = 2**20, 2**26
"""Smallest and largest padded manifest, bytes."""

MAX_INDEX_FILE = 64 * 1024 * 1024
"""Largest ``index.cai`` that is read, bytes."""

MAX_ENTRIES = 100_000
"""Most entries of a tree."""

INLINE_SIZE = 64 * 1024
"""Largest file that is kept in the manifest, bytes."""

INLINE_TOTAL = 8 * 1024 * 1024
"""Most inline bytes that a writer puts into one manifest."""

PIECE = 4 * 1024 * 1024
"""Stored bytes under one BLAKE3 digest of the index."""

OBJECT_NAME = re.compile(r"[0-9a-f]{32}")
"""Name of a stored object: 16 random bytes in hex."""


def chunk_log2(chunk: int) -> int | None:
    """Base-two logarithm of an allowed chunk size, or ``None`` when it is not allowed."""
    log2 = chunk.bit_length() - 1
    allowed = MIN_CHUNK_LOG2 <= log2 <= MAX_CHUNK_LOG2 and chunk == 1 << log2
    return log2 if allowed else None


def head_size(size: int, chunk: int) -> int:
    """Bytes of an object in front of its ciphertext: header and padded tag table (§3.2)."""
    tags = -(-size // chunk) * TAG_SIZE
    return OBJECT_HEADER_SIZE * (1 + -(-tags // OBJECT_HEADER_SIZE))
