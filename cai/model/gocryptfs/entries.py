"""Entries of a manifest beside a cipher directory (docs/spec-gocryptfs.md §6).

They pin what gocryptfs leaves open: the IV of every directory, and of every file its id and the IVs
and tags of all of its blocks.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cai.errors import FormatError
from cai.model.gocryptfs.layout import DIGEST_SIZE, DIRIV_SIZE, FILE_ID_SIZE, MAX_FILE, groups_in
from cai.model.layout import MAX_ENTRIES
from cai.model.members import Members
from cai.model.paths import MAX_PATH, check_links, name_bytes, parent, path_fault
from cai.model.tree import Entry, EntryType

MEMBER = "gocryptfs"
"""The manifest's member that marks its entries as those of this method."""

MAX_MODE = 0o777
_MAX_BASE64_PATH = -(-MAX_PATH // 3) * 4


@dataclass(frozen=True, slots=True)
class FileTags:
    """What pins the stored bytes of one file.

    Attributes:
        file_id: 16 bytes; none of an empty file.
        groups: tag digests, 32 bytes for each group of 256 blocks.
    """

    file_id: bytes
    groups: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class CipherTree:
    """What the manifest knows of the cipher directory.

    Attributes:
        ivs: IV by path of directory; ``""`` is the root.
        files: by path of file.
    """

    ivs: Mapping[str, bytes]
    files: Mapping[str, FileTags]


def encode_entries(entries: Mapping[str, Entry], tree: CipherTree) -> dict[str, Any]:
    """The manifest's members ``entries`` and ``gocryptfs``."""
    return {
        MEMBER: {"iv": tree.ivs[""].hex()},
        "entries": [_encode(entry, tree) for entry in entries.values()],
    }


def parse_entries(members: Members) -> tuple[dict[str, Entry], CipherTree]:
    """Read both members.

    Raises:
        FormatError: a rule of §6 is broken.
    """
    top = members.object(MEMBER)
    ivs = {"": _iv(top)}
    top.finish()
    files: dict[str, FileTags] = {}
    entries: dict[str, Entry] = {}
    before = b""
    for number, value in enumerate(members.list("entries", most=MAX_ENTRIES)):
        item = Members(value, where=f"manifest entry {number}")
        entry = _parse(item, ivs, files)
        item.finish()
        name = name_bytes(entry.path)
        if name <= before:
            raise FormatError(f"manifest: {entry.path!r} is out of order or there twice")
        before = name
        above = parent(entry.path)
        if above and (above not in entries or entries[above].type is not EntryType.DIRECTORY):
            raise FormatError(f"manifest: the parent of {entry.path!r} is not a directory")
        entries[entry.path] = entry
    links = {p: e.target for p, e in entries.items() if e.type is EntryType.SYMLINK}
    check_links(links, any_bytes=True)
    return entries, CipherTree(ivs, files)


def text_member(name: str, text: str) -> dict[str, str]:
    """A path or target as a member: as text, or, when it is not UTF-8, as base64 of its bytes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return {f"{name}_b64": base64.b64encode(name_bytes(text)).decode("ascii")}
    return {name: text}


def _read_text(members: Members, name: str) -> str:
    if not members.has(f"{name}_b64"):
        return members.text(name, most=MAX_PATH)
    name += "_b64"
    data = _base64(members, name, most=_MAX_BASE64_PATH)
    text = data.decode("utf-8", "surrogateescape")
    if _is_utf8(data):
        # One spelling only: base64 is for names that have no other.
        raise members.wrong(name, "base64 of bytes that are not UTF-8")
    return text


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _encode(entry: Entry, tree: CipherTree) -> dict[str, Any]:
    body: dict[str, Any] = text_member("path", entry.path) | {"type": entry.type.value}
    if entry.type is EntryType.SYMLINK:
        return body | text_member("target", entry.target)
    body["mode"] = entry.mode
    if entry.type is EntryType.DIRECTORY:
        return body | {"iv": tree.ivs[entry.path].hex()}
    tags = tree.files[entry.path]
    return body | {
        "file_id": tags.file_id.hex(),
        "groups": base64.b64encode(tags.groups).decode("ascii"),
        "sha256": entry.sha256,
        "size": entry.size,
    }


def _parse(members: Members, ivs: dict[str, bytes], files: dict[str, FileTags]) -> Entry:
    path = _read_text(members, "path")
    fault = path_fault(path, any_bytes=True)
    if fault:
        raise FormatError(f"{members.where}: path {path!r} is {fault}")
    kind = members.raw("type")
    if kind == EntryType.SYMLINK.value:
        target = _read_text(members, "target")
        return Entry(path, EntryType.SYMLINK, len(name_bytes(target)), MAX_MODE, target)
    mode = members.integer("mode", least=0, most=MAX_MODE)
    if kind == EntryType.DIRECTORY.value:
        ivs[path] = _iv(members)
        return Entry(path, EntryType.DIRECTORY, 0, mode)
    if kind != EntryType.FILE.value:
        raise members.wrong("type", "'file', 'dir' or 'symlink'")
    size = members.integer("size", least=0, most=MAX_FILE)
    files[path] = _tags(members, size)
    return Entry(path, EntryType.FILE, size, mode, sha256=members.hex("sha256", 32))


def _tags(members: Members, size: int) -> FileTags:
    file_id = bytes.fromhex(members.hex("file_id", FILE_ID_SIZE, empty=size == 0))
    expected = DIGEST_SIZE * groups_in(size)
    groups = _base64(members, "groups", most=-(-expected // 3) * 4)
    if len(groups) != expected:
        raise members.wrong("groups", f"base64 of {expected} bytes")
    if bool(file_id) != bool(size) or (size and not any(file_id)):
        raise members.wrong("file_id", "an id that is not zero, for a file that is not empty")
    return FileTags(file_id, groups)


def _iv(members: Members) -> bytes:
    iv = bytes.fromhex(members.hex("iv", DIRIV_SIZE))
    if not any(iv):
        raise members.wrong("iv", "an IV that is not zero")
    return iv


def _base64(members: Members, name: str, *, most: int) -> bytes:
    encoded = members.text(name, most=most)
    try:
        data = base64.b64decode(encoded.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise members.wrong(name, "base64") from error
    if base64.b64encode(data).decode("ascii") != encoded:
        raise members.wrong(name, "canonical base64")
    return data
