"""A sealed model as those see it who carry it without a key: three documents and listed files.

``index.cai`` lists the files with a BLAKE3 digest for each 4 MiB piece; ``cai.json`` names the
index's SHA-256; and whoever knows that SHA-256 from the release record knows every byte
(docs/spec-format.md §6). Only the members that carrying needs are read, so that a method which
this module has never heard of is carried as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Protocol

from blake3 import blake3

from cai import jcs
from cai.errors import InputError, InputMissing, LimitExceeded, Tampered
from cai.model.index import StoredFile, parse_index
from cai.model.layout import (
    HEADER_FILE,
    INDEX_FILE,
    MAX_HEADER_FILE,
    MAX_INDEX_FILE,
    OBJECTS_DIR,
    PIECE,
    SIGNATURE_FILE,
)
from cai.model.members import Members
from cai.store.base import Blob, Pace, check_path, unpaced

DIGEST_TRIES = 3
"""Times a range is fetched when its digest is wrong: damage on the way happens, if rarely."""

SIGNATURES = (SIGNATURE_FILE,)
"""Files that the index does not list and that are carried if they are there."""

MAX_SIGNATURE = 64 * 1024
"""Largest of ``SIGNATURES`` that is carried, bytes."""


class Readable(Protocol):
    """The part of a store that reading a publication needs."""

    uri: str

    def read(self, path: str, offset: int, length: int, pace: Pace = unpaced) -> Blob:
        """As ``Store.read``."""


@dataclass(frozen=True, slots=True)
class Publication:
    """What is published at one place.

    Attributes:
        header: the bytes of ``cai.json``; not authenticated.
        index: the bytes of ``index.cai``.
        index_sha256: their digest, hex.
        files: every listed file; symbolic links are apart.
        links: text of every listed symbolic link by its path.
        signatures: the bytes of the ``SIGNATURES`` that are there.
        model_id: as the header claims, hex.
        revision: as the header claims.
        authenticated: the index is the one that the caller demanded.
    """

    header: bytes
    index: bytes
    index_sha256: str
    files: Mapping[str, StoredFile]
    links: Mapping[str, str]
    signatures: Mapping[str, bytes]
    model_id: str
    revision: int
    authenticated: bool

    @property
    def folders(self) -> list[str]:
        """Folders that a reader expects: of listed files, or the one for objects."""
        below = {path.rpartition("/")[0] for path in (*self.files, *self.links)} - {""}
        return sorted(below) or [OBJECTS_DIR]

    @property
    def total(self) -> int:
        """Bytes of all listed files."""
        return sum(file.size for file in self.files.values())


def read_publication(store: Readable, index_sha256: str | None = None) -> Publication:
    """Read what is published, against the demanded index where there is one.

    Raises:
        InputError: there is no sealed model.
        Tampered: the index is not the demanded one, or not the one that ``cai.json`` names.
        FormatError, LimitExceeded: a document breaks the format.
        PeerUnreachable, StorageError: it cannot be read.
    """
    try:
        header = read_small(store, HEADER_FILE, MAX_HEADER_FILE)
    except InputMissing as error:
        raise InputError(
            f"{store.uri} holds no sealed model: there is no {HEADER_FILE}",
            hint="check the address; it is the directory that 'cai encrypt' wrote",
        ) from error
    claims = Members(
        jcs.parse_canonical(header, what=HEADER_FILE, limit=MAX_HEADER_FILE), where=HEADER_FILE
    )
    named = claims.object("index")
    digest, size = named.hex("sha256", 32), named.integer("size", least=1, most=MAX_INDEX_FILE)
    try:
        index = read_small(store, INDEX_FILE, size)
    except (InputMissing, LimitExceeded) as error:
        raise _other_index(store) from error
    found = sha256(index).hexdigest()
    if index_sha256 is not None and found != index_sha256:
        raise Tampered(
            f"{INDEX_FILE} is not the expected one: its SHA-256 is {found}, expected "
            f"{index_sha256}", path=INDEX_FILE, code="index-mismatch",
            hint="this is another model or revision, or it was altered",
        )
    if found != digest:
        raise _other_index(store)
    listed = parse_index(index)
    for path in listed:
        check_path(path)
    files = {path: file for path, file in listed.items() if not file.link}
    links = {path: file.link for path, file in listed.items() if file.link}
    return Publication(
        header, index, found, files, links, _signatures(store), claims.hex("model_id", 32),
        claims.integer("revision", least=1), authenticated=index_sha256 is not None,
    )


def read_small(store: Readable, path: str, limit: int) -> bytes:
    """Read a small file whole.

    Raises:
        InputMissing: there is none.
        LimitExceeded: it is longer than ``limit`` bytes.
    """
    blob = store.read(path, 0, limit)
    if blob.total > limit:
        raise LimitExceeded(f"{store.uri}/{path}: more than {limit} bytes")
    return blob.data


def read_pieces(
    store: Readable, path: str, file: StoredFile, first: int, count: int, pace: Pace = unpaced
) -> bytes:
    """Read ``count`` pieces of a listed file from piece ``first``, and verify them.

    Raises:
        Tampered: they are not the listed ones, however often they are read.
        PeerUnreachable, StorageError: they cannot be read.
    """
    start = first * PIECE
    length = min(count * PIECE, file.size - start)
    if not length:
        return b""
    wrong = first
    for _ in range(DIGEST_TRIES):
        try:
            blob = store.read(path, start, length, pace)
        except InputMissing:
            raise Tampered(f"{path} is missing in {store.uri}", path=path) from None
        if blob.total != file.size:
            raise Tampered(
                f"{path} has {blob.total} bytes in {store.uri}, expected {file.size}", path=path
            )
        bad = wrong_pieces(blob.data, file, first)
        if not bad and len(blob.data) == length:
            return blob.data
        wrong = bad[0] if bad else first
    raise Tampered(
        f"{path} was altered in {store.uri}: piece {wrong} is not the listed one", path=path,
        hint="push the sealed model again, from where it is whole",
    )


def wrong_pieces(data: bytes | memoryview, file: StoredFile, first: int) -> list[int]:
    """Numbers of the pieces in ``data``, which starts with piece ``first``, that are not listed."""
    view, wrong = memoryview(data), []
    for number in range(first, first + -(-len(view) // PIECE)):
        part = view[(number - first) * PIECE : (number - first + 1) * PIECE]
        if blake3(part).hexdigest() != file.pieces[number]:
            wrong.append(number)
    return wrong


def label_of(file: StoredFile) -> str:
    """One digest for a whole file: BLAKE3 over its pieces' digests, hex."""
    return blake3(b"".join(bytes.fromhex(piece) for piece in file.pieces)).hexdigest()


def label_of_bytes(data: bytes) -> str:
    """``label_of`` a small file that no index lists."""
    return blake3(data).hexdigest()


def _signatures(store: Readable) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for name in SIGNATURES:
        try:
            found[name] = read_small(store, name, MAX_SIGNATURE)
        except InputMissing:
            continue
    return found


def _other_index(store: Readable) -> Tampered:
    return Tampered(
        f"{INDEX_FILE} in {store.uri} is not the one that {HEADER_FILE} names", path=INDEX_FILE,
        hint="if a new revision is being pushed there, wait until that has ended",
    )
