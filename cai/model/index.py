"""``index.cai``: what to fetch, and how to tell that it arrived whole (docs/spec-format.md §6)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256

from blake3 import blake3

from cai import jcs
from cai.errors import FormatError
from cai.model.layout import (
    DATA_DIR,
    INDEX_FILE,
    MANIFEST_FILE,
    MAX_ENTRIES,
    MAX_INDEX_FILE,
    MAX_OBJECT_SIZE,
    OBJECT_NAME,
    OBJECTS_DIR,
    PIECE,
)
from cai.model.members import Members

_MAX_PATH = 64 * 1024
_MAX_STORED = 2 * MAX_OBJECT_SIZE
_MAX_LINK = 8192
_MAX_FILES = 3 * MAX_ENTRIES + 3
_DATA_PART = re.compile(r"(?!\.\.?$)[A-Za-z0-9_.-]{1,255}", re.ASCII)
_LINK = re.compile(r"[A-Za-z0-9_-]{1,8192}", re.ASCII)


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file of the index.

    Attributes:
        size: stored bytes.
        pieces: BLAKE3 of each 4 MiB piece, hex.
        link: text of a symbolic link, as method gocryptfs has them; empty for files.
    """

    size: int
    pieces: tuple[str, ...]
    link: str = ""


def encode_index(files: Mapping[str, StoredFile]) -> bytes:
    """The canonical bytes of ``index.cai``."""
    listed = [
        {"path": path, "size": files[path].size, "blake3": list(files[path].pieces)}
        | ({"link": files[path].link} if files[path].link else {})
        for path in sorted(files)
    ]
    return jcs.canonical({"cai-index": 1, "piece": PIECE, "files": listed})


def parse_index(data: bytes) -> dict[str, StoredFile]:
    """Parse ``index.cai``.

    Raises:
        FormatError, LimitExceeded: not canonical, or not of the form of §6.
    """
    value = jcs.parse_canonical(data, what=INDEX_FILE, limit=MAX_INDEX_FILE)
    members = Members(value, where=INDEX_FILE)
    members.constant("cai-index", 1)
    members.constant("piece", PIECE)
    files: dict[str, StoredFile] = {}
    before = ""
    for number, item in enumerate(members.list("files", most=_MAX_FILES)):
        entry = Members(item, where=f"{INDEX_FILE} file {number}")
        path = entry.text("path", most=_MAX_PATH)
        in_data = _is_data(path)
        folder, _, name = path.rpartition("/")
        in_objects = folder == OBJECTS_DIR and OBJECT_NAME.fullmatch(name)
        if path != MANIFEST_FILE and not (in_data or in_objects):
            raise entry.wrong("path", f"{MANIFEST_FILE} or {OBJECTS_DIR}/<32 hex digits>")
        if path <= before:
            raise FormatError(f"{INDEX_FILE}: {path} is out of order or there twice")
        before = path
        size = entry.integer("size", least=0 if in_data else 1, most=_MAX_STORED)
        pieces = entry.list("blake3", most=-(-size // PIECE))
        link = ""
        if in_data and entry.has("link"):
            link = entry.text("link", most=_MAX_LINK)
            if size or not _LINK.fullmatch(link):
                raise entry.wrong("link", "the text of an encrypted symbolic link")
        files[path] = StoredFile(size, _parse_pieces(pieces, size, entry), link)
        entry.finish()
    members.finish()
    if MANIFEST_FILE not in files:
        raise FormatError(f"{INDEX_FILE}: {MANIFEST_FILE} is missing")
    _refuse_mixture(files)
    return files


def _is_data(path: str) -> bool:
    """Whether it is a path in the cipher directory that can be nowhere else (spec-gocryptfs)."""
    first, *parts = path.split("/")
    return first == DATA_DIR and bool(parts) and all(map(_DATA_PART.fullmatch, parts))


def _refuse_mixture(files: Mapping[str, StoredFile]) -> None:
    """Objects and a cipher directory do not stand together, nor is a file also a directory."""
    folders = {path.split("/")[0] for path in files if "/" in path}
    if len(folders) > 1:
        raise FormatError(f"{INDEX_FILE}: it lists files of two methods")
    for path in files:
        above = path.rpartition("/")[0]
        while above:
            if above in files:
                raise FormatError(f"{INDEX_FILE}: {above} is a file and a directory")
            above = above.rpartition("/")[0]


def index_digest(data: bytes) -> str:
    """``index_sha256``: SHA-256 of the file's bytes, hex."""
    return sha256(data).hexdigest()


class PieceHasher:
    """BLAKE3 of 4 MiB pieces over a stream of stored bytes.

    A stream that begins inside a piece leaves that piece out of ``digests``.

    Args:
        start: offset of the first byte that will be given.
    """

    def __init__(self, start: int = 0) -> None:
        self._offset = start
        self._hasher = blake3()
        self._whole = start % PIECE == 0
        self.digests: dict[int, str] = {}

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Take the next bytes of the stream."""
        view = memoryview(data)
        while view:
            room = PIECE - self._offset % PIECE
            part = view[:room]
            self._hasher.update(part)
            self._offset += len(part)
            view = view[room:]
            if self._offset % PIECE == 0:
                self._close()

    def update_all(self, parts: Iterable[memoryview]) -> None:
        """Take the next bytes of the stream, in several parts."""
        for part in parts:
            self.update(part)

    def finish(self) -> dict[int, str]:
        """Digests by piece number, the last, shorter piece with them."""
        if self._offset % PIECE:
            self._offset += PIECE - self._offset % PIECE
            self._close()
        return self.digests

    def _close(self) -> None:
        if self._whole:
            self.digests[self._offset // PIECE - 1] = self._hasher.hexdigest()
        self._hasher = blake3()
        self._whole = True


def listed(data: bytes) -> StoredFile:
    """The line of a small stored file."""
    pieces = PieceHasher()
    pieces.update(data)
    digests = pieces.finish()
    return StoredFile(len(data), tuple(digests[number] for number in sorted(digests)))


def hash_pieces(fd: int, first: int, end: int) -> dict[int, str]:
    """Digests of the pieces ``first`` to ``end - 1`` of an open file, by reading them.

    Raises:
        OSError: the file cannot be read.
    """
    hasher = PieceHasher(first * PIECE)
    for number in range(first, end):
        offset = number * PIECE
        while offset < (number + 1) * PIECE:
            data = os.pread(fd, min(1 << 20, (number + 1) * PIECE - offset), offset)
            if not data:
                break
            hasher.update(data)
            offset += len(data)
    return hasher.finish()


def _parse_pieces(values: list[object], size: int, entry: Members) -> tuple[str, ...]:
    if len(values) != -(-size // PIECE):
        raise entry.wrong("blake3", f"one digest for each of {-(-size // PIECE)} pieces")
    pieces = tuple(value for value in values if isinstance(value, str))
    if len(pieces) != len(values) or not all(_is_digest(piece) for piece in pieces):
        raise entry.wrong("blake3", "64 lower-case hex digits each")
    return pieces


def _is_digest(text: str) -> bool:
    return len(text) == 64 and all(letter in "0123456789abcdef" for letter in text)
