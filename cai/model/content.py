"""The content root: a name for a tree's plain content, whoever sealed it (spec-format §5.5).

It survives resealing and can be computed for a plain tree, so a client can pin published weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from cai import merkle
from cai.model.paths import name_bytes
from cai.model.tree import Entry, EntryType

_TYPE_BYTES = {EntryType.FILE: b"f", EntryType.DIRECTORY: b"d", EntryType.SYMLINK: b"l"}


def leaf_data(entry: Entry) -> bytes:
    """Leaf of one entry: ``type ‖ u64 size ‖ digest32 ‖ path`` (spec-format §5.5)."""
    if entry.type is EntryType.FILE:
        digest = bytes.fromhex(entry.sha256)
    elif entry.type is EntryType.SYMLINK:
        digest = sha256(name_bytes(entry.target)).digest()
    else:
        digest = bytes(32)
    size = entry.size.to_bytes(8, "big")
    return _TYPE_BYTES[entry.type] + size + digest + name_bytes(entry.path)


def content_root(entries: Iterable[Entry]) -> str:
    """Content root over entries in any order, 64 hex digits."""
    ordered = sorted(entries, key=lambda entry: name_bytes(entry.path))
    return merkle.root([merkle.leaf_hash(leaf_data(entry)) for entry in ordered]).hex()


def content_root_of_tree(directory: Path) -> str:
    """Content root of a plain directory, 64 hex digits; reads every file once.

    Raises:
        InputError, StorageError: as sealing that directory would.
    """
    from cai.model.source import hashed_entries

    return content_root(hashed_entries(directory))
