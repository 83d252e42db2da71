"""Makes ``gocryptfs.json``: known answers for a second implementation of docs/spec-gocryptfs.md.

    python tests/vectors/make_gocryptfs.py > tests/vectors/gocryptfs.json

Keys, IVs and contents are fixed; stock gocryptfs reads names, links and blocks made so.
"""

from __future__ import annotations

import base64
import json
import sys
from hashlib import sha256
from typing import Any
from unittest import mock

from cai.model.content import content_root
from cai.model.gocryptfs.blocks import BlockCipher, encode_header, tag_digest
from cai.model.gocryptfs.entries import CipherTree, FileTags
from cai.model.gocryptfs.keys import CipherKeys
from cai.model.gocryptfs.layout import GROUP_STORED, stored_size
from cai.model.gocryptfs.model import StoredTree
from cai.model.gocryptfs.names import NameCipher
from cai.model.manifest import Licence, Manifest, model_root
from cai.model.tree import Entry, EntryType

MASTER_KEY = bytes(range(32))
IVS = {"": bytes(range(16, 32)), "sub": bytes(range(32, 48))}
FILE_ID = bytes(range(48, 64))
SIZE = 256 * 4096 + 5
"""One whole group, and one block of five bytes in the next."""

LONG = "l" * 176
BYTES = "b\udcff"


def plaintext(size: int) -> bytes:
    """Byte i is i mod 251."""
    return (bytes(range(251)) * (size // 251 + 1))[:size]


def counted(start: int) -> Any:
    """Random bytes that are not: IV n is the 16-byte big-endian number ``start + n``."""
    taken = start

    def draw(size: int) -> bytes:
        nonlocal taken
        count, taken = size // 16, taken + size // 16
        return b"".join(n.to_bytes(16, "big") for n in range(taken - count, taken))

    return draw


def sealed_file(keys: CipherKeys) -> tuple[bytes, bytes]:
    """The stored bytes of the file, and its tag digests."""
    cipher, plain = BlockCipher(keys), memoryview(plaintext(SIZE))
    stored, digests = encode_header(FILE_ID), b""
    with mock.patch("os.urandom", counted(1)):
        for group, part in enumerate((plain[: 1 << 20], plain[1 << 20 :])):
            room = memoryview(bytearray(GROUP_STORED))
            blocks = cipher.encrypt(FILE_ID, group * 256, part, room)
            digests += tag_digest(blocks)
            stored += blocks
    return stored, digests


def make() -> dict[str, Any]:
    """Every known answer."""
    keys = CipherKeys.of(MASTER_KEY)
    names = NameCipher(keys)
    stored, groups = sealed_file(keys)
    digest = sha256(plaintext(SIZE)).hexdigest()
    entries = {
        entry.path: entry
        for entry in (
            Entry(BYTES, EntryType.SYMLINK, 5, 0o777, "sub/w"),
            Entry("empty", EntryType.FILE, 0, 0o600, sha256=sha256(b"").hexdigest()),
            Entry("sub", EntryType.DIRECTORY, 0, 0o755),
            Entry(f"sub/{LONG}", EntryType.SYMLINK, 1, 0o777, "w"),
            Entry("sub/w", EntryType.FILE, SIZE, 0o644, sha256=digest),
        )
    }
    tree = CipherTree(IVS, {"empty": FileTags(b"", b""), "sub/w": FileTags(FILE_ID, groups)})
    manifest = Manifest(
        "ab" * 32, 1, "", content_root(entries.values()), "vector", "2026-01-01T00:00:00Z", (),
        Licence(), {"tool": "vector"}, entries, {}, tree,
    )
    canonical = manifest.encode()
    assert Manifest.parse(canonical).encode() == canonical
    with mock.patch("os.urandom", counted(1000)):
        link = names.encrypt_target(b"sub/w")
    places = StoredTree(names, IVS)
    return {
        "master_key": MASTER_KEY.hex(), "content_key": keys.content.hex(),
        "name_key": keys.name.hex(), "kek": keys.kek.reveal().hex(),
        "stored": {
            base64.b64encode(path.encode("utf-8", "surrogateescape")).decode(): places.path(path)
            for path in entries
        },
        "long_name": {"path": f"sub/{LONG}", "name_file": places.name(f"sub/{LONG}").long},
        "link": {"target": "sub/w", "iv": (1000).to_bytes(16, "big").hex(), "text": link},
        "file": {
            "path": "sub/w", "plaintext": "byte i is i mod 251", "size": SIZE,
            "ivs": "IV of block n is the 16-byte big-endian number n + 1",
            "file_id": FILE_ID.hex(), "stored_size": stored_size(SIZE),
            "stored_sha256": sha256(stored).hexdigest(), "groups": groups.hex(),
        },
        "manifest": canonical.decode(), "model_root": model_root(canonical),
        "content_root": manifest.content_root,
    }


if __name__ == "__main__":
    json.dump(make(), sys.stdout, indent=1, sort_keys=True)
    sys.stdout.write("\n")
