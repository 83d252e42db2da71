"""The manifest: the one document that says what a sealed model holds (docs/spec-format.md §5)."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from cai import jcs
from cai.errors import FormatError, LimitExceeded
from cai.model.gocryptfs import entries as cipher_entries
from cai.model.gocryptfs.entries import CipherTree
from cai.model.layout import (
    FORMAT,
    INLINE_SIZE,
    MAX_ENTRIES,
    MAX_MANIFEST,
    MAX_OBJECT_SIZE,
    MIN_MANIFEST,
    OBJECT_NAME,
)
from cai.model.members import Members
from cai.model.object import Shape
from cai.model.paths import MAX_PATH, check_links, parent, path_fault
from cai.model.tree import Entry, EntryType

ROOT_DOMAIN = b"cai/1 root\x00"
MAX_NAME = 256
MAX_LICENCE = 1024 * 1024
MAX_PROVENANCE, MAX_PROVENANCE_NAME, MAX_PROVENANCE_VALUE = 64, 64, 4096
MAX_MODE = 0o777
_CREATED = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", re.ASCII)
_MAX_BASE64 = -(-INLINE_SIZE // 3) * 4


@dataclass(frozen=True, slots=True)
class Inline:
    """Content of a small file, kept in the manifest itself."""

    content: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a larger file is stored.

    Attributes:
        name: of the object, 32 hex digits.
        key: its 32-byte key.
        digest: its ``object_digest``, hex.
        shape: its plaintext length, which may exceed the file's, and its chunking.
    """

    name: str
    key: bytes = field(repr=False)
    digest: str
    shape: Shape


Storage = Inline | Stored


@dataclass(frozen=True, slots=True)
class Licence:
    """Terms under which the model may be used.

    Attributes:
        name: SPDX identifier or another name.
        terms: acknowledgement that a user must give.
        text: the full text.
    """

    name: str = ""
    terms: str = ""
    text: str = ""


@dataclass(frozen=True, slots=True)
class Manifest:
    """A parsed manifest; ``encode`` gives back the very bytes it was parsed from.

    Attributes:
        model_id: 64 hex digits.
        revision: from 1.
        previous: model root of the revision before, or empty.
        content_root: 64 hex digits, the owner's claim.
        name: free text.
        created: ``YYYY-MM-DDTHH:MM:SSZ``.
        allow: flags, sorted.
        licence: terms of use.
        provenance: where it comes from.
        entries: by path, parents before children.
        storage: by path, for every file of the native format.
        cipher: what pins the cipher directory of method gocryptfs, or ``None``.
    """

    model_id: str
    revision: int
    previous: str
    content_root: str
    name: str
    created: str
    allow: tuple[str, ...]
    licence: Licence
    provenance: Mapping[str, str]
    entries: Mapping[str, Entry]
    storage: Mapping[str, Storage] = field(repr=False)
    cipher: CipherTree | None = field(default=None, repr=False)

    def encode(self) -> bytes:
        """The canonical bytes."""
        licence = self.licence
        return jcs.canonical(
            {
                "cai": FORMAT,
                "model_id": self.model_id,
                "revision": self.revision,
                "previous": self.previous,
                "content_root": self.content_root,
                "name": self.name,
                "created": self.created,
                "allow": list(self.allow),
                "licence": {"name": licence.name, "terms": licence.terms, "text": licence.text},
                "provenance": dict(self.provenance),
                **self._entries(),
            }
        )

    def _entries(self) -> dict[str, Any]:
        if self.cipher is not None:
            return cipher_entries.encode_entries(self.entries, self.cipher)
        return {
            "entries": [
                _encode_entry(entry, self.storage.get(path))
                for path, entry in self.entries.items()
            ]
        }

    @classmethod
    def parse(cls, data: bytes) -> Manifest:
        """Parse canonical bytes; every rule of §5 but the content root's is checked.

        Raises:
            FormatError, LimitExceeded: a rule is broken.
        """
        value = jcs.parse_canonical(data, what="manifest", limit=MAX_MANIFEST)
        members = Members(value, where="manifest")
        members.constant("cai", FORMAT)
        created = members.text("created", most=20)
        if not _CREATED.fullmatch(created):
            raise members.wrong("created", "YYYY-MM-DDTHH:MM:SSZ")
        entries: dict[str, Entry]
        storage: dict[str, Storage] = {}
        cipher = None
        if members.has(cipher_entries.MEMBER):
            entries, cipher = cipher_entries.parse_entries(members)
        else:
            entries, storage = _parse_entries(members.list("entries", most=MAX_ENTRIES))
        manifest = cls(
            model_id=members.hex("model_id", 32),
            revision=members.integer("revision", least=1),
            previous=members.hex("previous", 32, empty=True),
            content_root=members.hex("content_root", 32),
            name=members.text("name", most=MAX_NAME),
            created=created,
            allow=members.flags("allow"),
            licence=_parse_licence(members.object("licence")),
            provenance=_parse_provenance(members.raw("provenance")),
            entries=entries,
            storage=storage,
            cipher=cipher,
        )
        members.finish()
        return manifest

    @property
    def stored(self) -> dict[str, Stored]:
        """The stored files by path."""
        return {path: item for path, item in self.storage.items() if isinstance(item, Stored)}


def model_root(canonical: bytes) -> str:
    """The model's identity: hash of its canonical manifest, hex (§5.4)."""
    return sha256(ROOT_DOMAIN + canonical).hexdigest()


def pad(canonical: bytes) -> bytes:
    """The manifest as it is encrypted: zero bytes up to a power of two, 1 MiB at least (§5.1).

    Raises:
        LimitExceeded: it does not fit into ``MAX_MANIFEST``.
    """
    size = max(MIN_MANIFEST, 1 << (len(canonical) - 1).bit_length())
    if size > MAX_MANIFEST:
        raise LimitExceeded(
            f"the manifest has {len(canonical)} bytes, at most {MAX_MANIFEST} are allowed",
            hint="seal fewer files, or pack the small ones",
        )
    return canonical.ljust(size, b"\x00")


def unpad(padded: bytes) -> bytes:
    """The canonical manifest of its padded form.

    Raises:
        FormatError: not padded exactly as ``pad`` does.
    """
    canonical = padded.rstrip(b"\x00")
    if not canonical or pad(canonical) != padded:
        raise FormatError("manifest: padded in another way than the format says")
    return canonical


def _encode_entry(entry: Entry, storage: Storage | None) -> dict[str, Any]:
    body: dict[str, Any] = {"path": entry.path, "type": entry.type.value}
    if entry.type is EntryType.SYMLINK:
        return body | {"target": entry.target}
    body["mode"] = entry.mode
    if entry.type is EntryType.DIRECTORY:
        return body
    body |= {"size": entry.size, "sha256": entry.sha256}
    if isinstance(storage, Inline):
        return body | {"inline": base64.b64encode(storage.content).decode("ascii")}
    if not isinstance(storage, Stored):
        raise FormatError(f"manifest: file {entry.path!r} is stored nowhere")
    return body | {
        "object": storage.name,
        "object_key": storage.key.hex(),
        "object_digest": storage.digest,
        "object_size": storage.shape.size,
        "chunk": storage.shape.chunk,
    }


def _parse_entries(values: list[Any]) -> tuple[dict[str, Entry], dict[str, Storage]]:
    entries: dict[str, Entry] = {}
    storage: dict[str, Storage] = {}
    objects: set[str] = set()
    before = b""
    for number, value in enumerate(values):
        entry, stored = _parse_entry(Members(value, where=f"manifest entry {number}"))
        name = entry.path.encode("utf-8")
        if name <= before:
            raise FormatError(f"manifest: {entry.path!r} is out of order or there twice")
        before = name
        above = parent(entry.path)
        if above and (above not in entries or entries[above].type is not EntryType.DIRECTORY):
            raise FormatError(f"manifest: the parent of {entry.path!r} is not a directory")
        entries[entry.path] = entry
        if stored is not None:
            storage[entry.path] = stored
        if isinstance(stored, Stored):
            if stored.name in objects:
                raise FormatError(f"manifest: object {stored.name} is used twice")
            objects.add(stored.name)
    check_links({p: e.target for p, e in entries.items() if e.type is EntryType.SYMLINK})
    return entries, storage


def _parse_entry(members: Members) -> tuple[Entry, Storage | None]:
    path = members.text("path", most=MAX_PATH)
    fault = path_fault(path)
    if fault:
        raise FormatError(f"{members.where}: path {path!r} is {fault}")
    kind = members.raw("type")
    storage: Storage | None = None
    if kind == EntryType.SYMLINK.value:
        target = members.text("target", most=MAX_PATH)
        entry = Entry(path, EntryType.SYMLINK, len(target.encode("utf-8")), MAX_MODE, target)
    elif kind == EntryType.DIRECTORY.value:
        mode = members.integer("mode", least=0, most=MAX_MODE)
        entry = Entry(path, EntryType.DIRECTORY, 0, mode)
    elif kind == EntryType.FILE.value:
        entry = Entry(
            path,
            EntryType.FILE,
            members.integer("size", least=0, most=MAX_OBJECT_SIZE),
            members.integer("mode", least=0, most=MAX_MODE),
            sha256=members.hex("sha256", 32),
        )
        storage = _parse_storage(members, entry.size)
    else:
        raise members.wrong("type", "'file', 'dir' or 'symlink'")
    members.finish()
    return entry, storage


def _parse_storage(members: Members, size: int) -> Storage:
    if members.has("inline"):
        encoded = members.text("inline", most=_MAX_BASE64)
        try:
            content = base64.b64decode(encoded.encode("ascii"), validate=True)
        except (binascii.Error, UnicodeEncodeError) as error:
            raise members.wrong("inline", "base64") from error
        # Equal only for the one canonical spelling: leftover bits zero, padding present.
        if base64.b64encode(content).decode("ascii") != encoded or len(content) > INLINE_SIZE:
            raise members.wrong("inline", f"canonical base64 of at most {INLINE_SIZE} bytes")
        if len(content) != size:
            raise members.wrong("inline", f"{size} bytes of content")
        return Inline(content)
    name = members.text("object", most=32)
    if not OBJECT_NAME.fullmatch(name):
        raise members.wrong("object", "32 lower-case hex digits")
    object_size = members.integer("object_size", least=max(1, size), most=MAX_OBJECT_SIZE)
    return Stored(
        name,
        bytes.fromhex(members.hex("object_key", 32)),
        members.hex("object_digest", 32),
        Shape.read(members, object_size),
    )


def _parse_licence(members: Members) -> Licence:
    licence = Licence(
        members.text("name", most=MAX_LICENCE),
        members.text("terms", most=MAX_LICENCE),
        members.text("text", most=MAX_LICENCE),
    )
    members.finish()
    return licence


def _parse_provenance(value: Any) -> dict[str, str]:
    members = Members(value, where="manifest.provenance")
    if len(value) > MAX_PROVENANCE:
        raise FormatError(f"{members.where}: more than {MAX_PROVENANCE} members")
    if any(len(name.encode("utf-8", "surrogatepass")) > MAX_PROVENANCE_NAME for name in value):
        raise FormatError(f"{members.where}: a name is longer than {MAX_PROVENANCE_NAME} bytes")
    return {name: members.text(name, most=MAX_PROVENANCE_VALUE) for name in value}
