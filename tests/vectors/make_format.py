"""Known-answer vectors of the sealed format: ``python tests/vectors/make_format.py`` writes them.

Everything random is fixed here, so the files in ``format/`` are the exact bytes that version 1
stands for. Large contents are given by a rule, large files by their SHA-256.
"""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cai.model import Lease, Licence, ReleaseRecord, SealOptions, open_model, seal
from cai.model.content import content_root, leaf_data
from cai.model.derive import file_key
from cai.model.lanes import Lanes
from cai.model.object import OBJECT_HEADER_SIZE, Shape
from cai.model.padding import padded_size
from cai.model.record import public_key_hex
from cai.model.signature import sign_root
from cai.model.tree import Entry, EntryType
from cai.model.writer import write_object
from cai.secret import Secret

HERE = Path(__file__).resolve().parent / "format"
KEK = bytes(range(32))
OWNER = bytes(range(64, 96))
CREATED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
TREE: list[dict[str, Any]] = [
    {"path": "config.json", "type": "file", "mode": 0o644, "text": '{"hidden_size":8}'},
    {"path": "empty", "type": "file", "mode": 0o600, "text": ""},
    {"path": "näher", "type": "dir", "mode": 0o755},
    {"path": "näher/link", "type": "symlink", "target": "../config.json"},
    {"path": "näher/weights", "type": "file", "mode": 0o444, "length": 600_001},
    {"path": "small", "type": "file", "mode": 0o644, "length": 65_536},
    {"path": "stored", "type": "file", "mode": 0o644, "length": 65_537},
]


def content(length: int) -> bytes:
    """The rule for large contents: byte i is (i * i + i // 251) mod 256."""
    return bytes((i * i + i // 251) & 0xFF for i in range(length))


class Draws:
    """Fixed stand-in for random bytes: draw n is cut from SHA-256("cai vector" ‖ u32(n))."""

    def __init__(self) -> None:
        self.drawn: list[str] = []

    def __call__(self, size: int) -> bytes:
        number = len(self.drawn).to_bytes(4, "big")
        value = sha256(b"cai vector" + number).digest()[:size]
        self.drawn.append(value.hex())
        return value


def write_tree(root: Path) -> None:
    """Write the tree of the vectors."""
    for item in TREE:
        path = root / item["path"]
        if item["type"] == "dir":
            path.mkdir()
        elif item["type"] == "symlink":
            path.symlink_to(item["target"])
            continue
        elif "text" in item:
            path.write_text(item["text"])
        else:
            path.write_bytes(content(item["length"]))
        path.chmod(item["mode"])


def seal_tree(work: Path) -> tuple[Path, list[str]]:
    """Seal the tree with fixed randomness; gives the sealed directory and the draws."""
    source, out, draws = work / "tree", work / "sealed", Draws()
    source.mkdir()
    write_tree(source)
    options = SealOptions(
        name="vector", licence=Licence("Apache-2.0", "be kind", "full text"), revision=3,
        previous="ab" * 32, provenance={"source": "tests", "tool": "vectors"}, created=CREATED,
        allow=("remote-code",), chunk=65_536, unsafe_entropy=draws,
    )
    seal(source, out, Secret(KEK), options=options)
    return out, draws.drawn


def sealed_vector(work: Path) -> dict[str, Any]:
    """The whole sealed model."""
    out, drawn = seal_tree(work)
    files = sorted(path for path in out.rglob("*") if path.is_file())
    with open_model(out, Secret(KEK)) as model:
        return {
            "kek": KEK.hex(), "tree": TREE, "chunk": 65_536, "draws": drawn,
            "content_rule": "byte i is (i * i + i // 251) mod 256",
            "cai.json": (out / "cai.json").read_text(),
            "index.cai": (out / "index.cai").read_text(),
            "manifest": model.manifest.encode().decode(),
            "model_root": model.root, "content_root": model.content_root,
            "sha256": {
                str(path.relative_to(out)): sha256(path.read_bytes()).hexdigest() for path in files
            },
        }


def object_vectors(work: Path) -> dict[str, Any]:
    """Single objects round the borders of chunks."""
    vectors = []
    with Lanes(2) as lanes:
        for number, (size, chunk) in enumerate(
            [(1, 65_536), (65_535, 65_536), (65_536, 65_536), (65_537, 65_536), (300_000, 262_144)]
        ):
            key, salt = bytes([number] * 32), bytes([0x80 + number] * 32)
            plain, shape = content(size), Shape(size, chunk)

            def read(offset: int, view: memoryview, plain: bytes = plain) -> None:
                view[:] = plain[offset : offset + len(view)]

            path = work / f"object-{number}"
            digest, stored = write_object(
                path, shape, key, salt, lanes, read=read, done=lambda _offset, _plain: None
            )
            data = path.read_bytes()
            tags = data[OBJECT_HEADER_SIZE : OBJECT_HEADER_SIZE + 16 * shape.chunks]
            vectors.append({
                "object_key": key.hex(), "salt": salt.hex(), "size": size, "chunk": chunk,
                "header_start": data[:64].hex(), "tags": tags.hex(),
                "file_key": file_key(key, data[:OBJECT_HEADER_SIZE]).hex(),
                "ciphertext_start": data[shape.head : shape.head + 32].hex(),
                "object_digest": digest, "sha256": sha256(data).hexdigest(),
                "blake3": list(stored.pieces),
            })  # fmt: skip
    return {"content_rule": "byte i is (i * i + i // 251) mod 256", "objects": vectors}


def record_vector() -> dict[str, Any]:
    """A signed release record."""
    owner = Ed25519PrivateKey.from_private_bytes(OWNER)
    record = ReleaseRecord(
        kek=Secret(KEK), model_id="11" * 32, manifest_root="22" * 32, min_revision=3,
        index_sha256="33" * 32, owner_key=public_key_hex(owner), allow=("pickle",),
        lease=Lease(600, 60),
    )
    return {"owner_private_key": OWNER.hex(), "record": record.sign(owner).decode()}


def signature_vector() -> dict[str, Any]:
    """The owner's signature over a model root."""
    owner = Ed25519PrivateKey.from_private_bytes(OWNER)
    return {
        "owner_private_key": OWNER.hex(), "model_root": "44" * 32,
        "manifest.sig": sign_root("44" * 32, owner).decode(),
    }


def padding_vector() -> dict[str, Any]:
    """Sizes and what they are padded to."""
    sizes = [65_537, 100_000, 2**20, 2**20 + 1, 5_368_709_121, 2**40 - 1, 2**40]
    return {"sizes": [[size, padded_size(size)] for size in sizes]}


def content_vector() -> dict[str, Any]:
    """Content roots of no, one and several entries."""
    digest = sha256(b"x").hexdigest()
    entries = [
        Entry("a", EntryType.DIRECTORY, 0, 0o755),
        Entry("a/b", EntryType.FILE, 1, 0o644, sha256=digest),
        Entry("é", EntryType.SYMLINK, 3, 0o777, target="a/b"),
    ]
    return {
        "leaves": [leaf_data(entry).hex() for entry in entries],
        "roots": [content_root(entries[:count]) for count in range(len(entries) + 1)],
    }


def failure_vectors() -> dict[str, Any]:
    """Edits of the sealed model, each with the error and the stored file that it must name.

    ``WEIGHTS`` is the object of näher/weights, ``STORED`` the one of stored.
    """
    head = 4096 + 4096

    def flip(name: str, file: str, offset: int, bit: int = 0, error: str = "tampered") -> Any:
        return {"name": name, "edit": "flip", "file": file, "offset": offset, "bit": bit,
                "error": error, "names": file}  # fmt: skip

    def edit(name: str, kind: str, file: str, error: str = "tampered", **more: Any) -> Any:
        return {"name": name, "edit": kind, "file": file, "error": error, "names": file, **more}

    return {"failures": [
        flip("header-not-json", "cai.json", 0, error="format"),
        edit("header-not-canonical", "append", "cai.json", "format", data="0a"),
        edit("header-member-unknown", "set", "cai.json", "format", member=["extra"], value=1),
        edit("header-other-version", "set", "cai.json", "format", member=["cai"], value=2),
        edit("header-other-revision", "set", "cai.json", member=["revision"], value=4),
        edit("header-other-model", "set", "cai.json", "wrong-key", member=["model_id"],
             value="cd" * 32),
        edit("header-other-kek-commitment", "set", "cai.json", "wrong-key",
             member=["dek", "kek_commitment"], value="00" * 32),
        edit("header-wrapped-dek", "set", "cai.json", member=["dek", "wrapped"], value="00" * 48),
        edit("header-commitment", "set", "cai.json", member=["commitment"], value="00" * 32),
        edit("header-mac", "set", "cai.json", member=["mac"], value="00" * 32),
        edit("header-index", "set", "cai.json", member=["index", "sha256"], value="00" * 32),
        edit("header-missing", "remove", "cai.json", "input"),
        flip("manifest-magic", "manifest.cai", 0),
        flip("manifest-salt", "manifest.cai", 16),
        flip("manifest-header-padding", "manifest.cai", 4095),
        flip("manifest-tag", "manifest.cai", 4096),
        flip("manifest-first-byte", "manifest.cai", head),
        flip("manifest-last-byte", "manifest.cai", head + 2**20 - 1, 7),
        edit("manifest-truncated", "truncate", "manifest.cai", size=head + 2**20 - 1),
        edit("manifest-extended", "append", "manifest.cai", data="00"),
        edit("manifest-missing", "remove", "manifest.cai"),
        flip("object-length-field", "WEIGHTS", 55),
        flip("object-chunk-field", "WEIGHTS", 12),
        flip("object-flags-field", "WEIGHTS", 13),
        flip("object-tag-of-last-chunk", "WEIGHTS", 4096 + 16 * 9),
        flip("object-table-padding", "WEIGHTS", 8191),
        flip("object-first-chunk", "WEIGHTS", head),
        flip("object-last-chunk", "WEIGHTS", head + 600_000),
        edit("object-chunks-swapped", "swap", "WEIGHTS", a=head, b=head + 65_536, size=65_536),
        edit("object-chunks-and-tags-swapped", "swap", "WEIGHTS", a=head, b=head + 65_536,
             size=65_536, then={"a": 4096, "b": 4112, "size": 16}),
        edit("object-truncated-at-chunk", "truncate", "WEIGHTS", size=head + 9 * 65_536),
        edit("object-extended", "append", "WEIGHTS", data="00"),
        edit("object-emptied", "truncate", "WEIGHTS", size=0),
        edit("object-of-another-file", "copy", "WEIGHTS", source="STORED"),
        edit("object-missing", "remove", "STORED"),
        edit("object-is-a-link", "link", "STORED"),
        edit("object-additional", "create", "objects/" + "0" * 32),
        edit("file-additional", "create", "note.txt"),
        flip("index-byte", "index.cai", 40),
        edit("index-missing", "remove", "index.cai"),
        edit("index-not-canonical", "append", "index.cai", data="20"),
    ]}  # fmt: skip


def manifest_failures() -> dict[str, Any]:
    """Manifests that break a rule of §5, as the plaintext that a reader must refuse."""
    entry = {"path": "f", "type": "file", "mode": 420, "size": 1, "inline": "eA==",
             "sha256": sha256(b"x").hexdigest()}  # fmt: skip
    stored = {"path": "f", "type": "file", "mode": 420, "size": 1, "sha256": "0" * 64,
              "object": "0" * 32, "object_key": "0" * 64, "object_digest": "0" * 64,
              "object_size": 65_536, "chunk": 65_536}  # fmt: skip
    folder = {"path": "d", "type": "dir", "mode": 493}

    def link(path: str, target: str) -> dict[str, Any]:
        return {"path": path, "type": "symlink", "target": target}

    trees: dict[str, list[Any]] = {
        "path-absolute": [entry | {"path": "/etc/passwd"}],
        "path-dotdot": [folder, entry | {"path": "d/../x"}],
        "path-dot": [entry | {"path": "."}],
        "path-empty": [entry | {"path": ""}],
        "path-empty-part": [folder, entry | {"path": "d//x"}],
        "path-zero-byte": [entry | {"path": "a\0b"}],
        "path-part-too-long": [entry | {"path": "a" * 256}],
        "path-twice": [entry, entry],
        "path-out-of-order": [entry, folder],
        "parent-missing": [entry | {"path": "d/f"}],
        "parent-is-a-file": [entry, entry | {"path": "f/x"}],
        "parent-is-a-link": [link("d", "e"), entry | {"path": "d/x"}, folder | {"path": "e"}],
        "link-absolute": [link("l", "/etc")],
        "link-up": [link("l", "..")],
        "link-up-and-over": [folder, link("d/l", "../../x")],
        "link-through-a-link": [folder, folder | {"path": "d/e"}, link("d/e/l", "../../s/.."),
                                link("s", "."), ],
        "link-circle": [link("a", "b"), link("b", "a")],
        "link-empty": [link("l", "")],
        "link-with-mode": [link("l", "x") | {"mode": 511}],
        "type-unknown": [folder | {"type": "fifo"}],
        "mode-setuid": [entry | {"mode": 0o4755}],
        "mode-boolean": [entry | {"mode": True}],
        "size-negative": [entry | {"size": -1}],
        "inline-other-length": [entry | {"size": 2}],
        "inline-not-canonical-base64": [entry | {"inline": "eB=="}],
        "inline-without-padding": [entry | {"inline": "eA"}],
        "inline-too-long": [entry | {"size": 65_537,
                                     "inline": base64.b64encode(bytes(65_537)).decode()}],
        "inline-and-object": [entry | stored],
        "digest-upper-case": [entry | {"sha256": "A" * 64}],
        "digest-short": [entry | {"sha256": "a" * 62}],
        "object-name-path": [stored | {"object": "../" + "0" * 29}],
        "object-used-twice": [stored, stored | {"path": "g"}],
        "object-smaller-than-file": [stored | {"size": 65_537}],
        "object-of-no-bytes": [stored | {"size": 0, "object_size": 0}],
        "chunk-not-a-power": [stored | {"chunk": 65_537}],
        "chunk-too-small": [stored | {"chunk": 32_768}],
        "chunk-too-large": [stored | {"chunk": 2**23}],
        "chunks-too-many": [stored | {"object_size": 2**38 + 1}],
        "entry-member-unknown": [entry | {"owner": "root"}],
        "entry-member-missing": [{"path": "f", "type": "file"}],
    }  # fmt: skip
    base = {"cai": 1, "model_id": "11" * 32, "revision": 1, "previous": "",
            "content_root": "22" * 32, "name": "", "created": "2026-01-02T03:04:05Z",
            "allow": [], "licence": {"name": "", "terms": "", "text": ""}, "provenance": {},
            "entries": []}  # fmt: skip
    wholes: dict[str, dict[str, Any]] = {
        "version-2": base | {"cai": 2},
        "member-unknown": base | {"extra": 0},
        "created-with-offset": base | {"created": "2026-01-02T03:04:05+00:00"},
        "revision-zero": base | {"revision": 0},
        "allow-unsorted": base | {"allow": ["b", "a"]},
        "allow-twice": base | {"allow": ["a", "a"]},
        "allow-upper-case": base | {"allow": ["Pickle"]},
        "provenance-number": base | {"provenance": {"a": 1}},
        "licence-member-missing": base | {"licence": {"name": ""}},
        "name-too-long": base | {"name": "x" * 257},
    }
    wholes |= {f"entry-{name}": base | {"entries": entries} for name, entries in trees.items()}
    return {"valid": base | {"entries": [folder, entry]}, "invalid": wholes}


def build(work: Path) -> dict[str, dict[str, Any]]:
    """Every vector file by name."""
    makers: dict[str, Callable[[], dict[str, Any]]] = {
        "object.json": lambda: object_vectors(work),
        "sealed.json": lambda: sealed_vector(work),
        "record.json": record_vector,
        "content.json": content_vector,
        "signature.json": signature_vector,
        "padding.json": padding_vector,
        "failures.json": failure_vectors,
        "manifests.json": manifest_failures,
    }
    return {name: make() for name, make in makers.items()}


def encoded(value: dict[str, Any]) -> str:
    """A vector file's text."""
    return json.dumps(value, indent=1, ensure_ascii=True, sort_keys=True) + "\n"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        for file_name, vector in build(Path(directory)).items():
            (HERE / file_name).write_text(encoded(vector))
