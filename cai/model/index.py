"""``index.cai``: what to fetch, and how to tell that it arrived whole (docs/spec-format.md §6)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256

from blake3 import blake3

from cai import jcs
from cai.errors import FormatError
from cai.model.layout import (
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

_MAX_PATH = len(OBJECTS_DIR) + 1 + 32
_MAX_STORED = 2 * MAX_OBJECT_SIZE


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file of the index.

    Attributes:
        size: stored bytes.
        pieces: BLAKE3 of each 4 MiB piece, hex.
    """

    size: int
    pieces: tuple[str, ...]


def encode_index(files: Mapping[str, StoredFile]) -> bytes:
    """The canonical bytes of ``index.cai``."""
    listed = [
        {"path": path, "size": files[path].size, "blake3": list(files[path].pieces)}
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
    for number, item in enumerate(members.list("files", most=MAX_ENTRIES + 1)):
        entry = Members(item, where=f"{INDEX_FILE} file {number}")
        path = entry.text("path", most=_MAX_PATH)
        folder, _, name = path.rpartition("/")
        if path != MANIFEST_FILE and not (folder == OBJECTS_DIR and OBJECT_NAME.fullmatch(name)):
            raise entry.wrong("path", f"{MANIFEST_FILE} or {OBJECTS_DIR}/<32 hex digits>")
        if path <= before:
            raise FormatError(f"{INDEX_FILE}: {path} is out of order or there twice")
        before = path
        size = entry.integer("size", least=1, most=_MAX_STORED)
        pieces = entry.list("blake3", most=-(-size // PIECE))
        files[path] = StoredFile(size, _parse_pieces(pieces, size, entry))
        entry.finish()
    members.finish()
    if MANIFEST_FILE not in files:
        raise FormatError(f"{INDEX_FILE}: {MANIFEST_FILE} is missing")
    return files


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
