"""Checking a whole sealed model: every byte that is stored, against what was sealed (spec §8)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path

from cai.errors import StorageError, Tampered
from cai.model.fleet import Fleet
from cai.model.gocryptfs.checking import check_cipher
from cai.model.gocryptfs.model import CipherModel
from cai.model.index import PieceHasher, StoredFile, hash_pieces, index_digest, parse_index
from cai.model.lanes import Lanes, opened
from cai.model.layout import (
    HEADER_FILE,
    INDEX_FILE,
    MANIFEST_FILE,
    MAX_INDEX_FILE,
    OBJECTS_DIR,
    PIECE,
    SIGNATURE_FILE,
)
from cai.model.manifest import Inline, Stored
from cai.model.progress import ProgressBar, silent
from cai.model.sealed import SealedModel, open_model
from cai.model.signature import read_signature
from cai.model.tree import Entry, EntryType
from cai.secret import Secret
from cai.terminal import Advance


@dataclass(frozen=True, slots=True)
class CheckReport:
    """A model that was checked as a whole; nothing in it is secret.

    Attributes:
        model_id: of the model line, hex.
        revision: from 1.
        root: ``model_root``, hex.
        content_root: hex.
        content_verified: the content root is that of the content, not only claimed.
        index_sha256: hex.
        files: plaintext files.
        objects: stored objects.
        plaintext_bytes: of all files.
        signature: ``verified`` under the demanded key, ``not asked`` when there is one and no key
            was demanded, ``none``.
    """

    model_id: str
    revision: int
    root: str
    content_root: str
    content_verified: bool
    index_sha256: str
    files: int
    objects: int
    plaintext_bytes: int
    signature: str = "none"

    def to_json(self) -> dict[str, object]:
        """The report as ``--json`` prints it."""
        return asdict(self)


def check(
    directory: Path, kek: Secret, *, expect_root: str | None = None, min_revision: int = 0,
    index_sha256: str | None = None, workers: int = 0, progress: ProgressBar = silent,
    owner_key: str | None = None,
) -> CheckReport:
    """Authenticate everything: each chunk, each digest, the index, and that nothing else is there.

    Args:
        directory: the sealed model.
        kek: the key-encryption key.
        expect_root: the ``model_root`` to insist on, hex.
        min_revision: the oldest revision to accept.
        index_sha256: the index to insist on, hex.
        workers: threads; 0 chooses by the machine.
        progress: shows the plaintext bytes done.
        owner_key: whose signature over the manifest to insist on, hex.

    Raises:
        Tampered: naming the stored file that is not what was sealed.
        CaiError: as ``open_model``.
    """
    with open_model(
        directory, kek, expect_root=expect_root, min_revision=min_revision, owner_key=owner_key
    ) as model:
        index = checked_index(model, index_sha256)
        signed = read_signature(model.files) is not None
        signature = "none" if not signed else "not asked" if owner_key is None else "verified"
        if isinstance(model, CipherModel):
            check_cipher(model, index, workers=workers, progress=progress)
            _check_manifest_pieces(model, index[MANIFEST_FILE])
            return _report(model, signature)
        # (C3) nothing is missing and nothing else is there
        found = model.files.listing()
        _check_listing(found - {SIGNATURE_FILE}, {HEADER_FILE, INDEX_FILE, *index})
        manifest = model.manifest
        files = [e for e in manifest.entries.values() if e.type is EntryType.FILE]
        total = sum(entry.size for entry in files)
        with Fleet(len(manifest.stored), workers) as fleet, progress("check", total) as advance:

            def one(entry: Entry, lanes: Lanes) -> None:
                storage = manifest.storage[entry.path]
                if isinstance(storage, Stored):
                    pieces = index[f"{OBJECTS_DIR}/{storage.name}"]
                    _check_object(model, entry, storage, pieces, fleet, lanes, advance)
                else:
                    _check_inline(entry, storage, advance)

            fleet.each(sorted(files, key=lambda entry: -entry.size), one)
        _check_manifest_pieces(model, index[MANIFEST_FILE])
        return _report(model, signature)


def _report(model: SealedModel, signature: str) -> CheckReport:
    manifest = model.manifest
    files = [e for e in manifest.entries.values() if e.type is EntryType.FILE]
    objects = len(files) if manifest.cipher is not None else len(manifest.stored)
    return CheckReport(
        model.model_id, model.revision, model.root, model.content_root,
        content_verified=True, index_sha256=model.header.index_sha256, files=len(files),
        objects=objects, plaintext_bytes=sum(entry.size for entry in files),
        signature=signature,
    )


def checked_index(model: SealedModel, expected: str | None) -> dict[str, StoredFile]:
    """The index of an opened model, authenticated (C1, C2).

    Raises:
        Tampered, FormatError: it is not the one that was sealed, or that is ``expected``.
    """
    # (C1) the index that the header, and perhaps the record, names
    data = model.files.read(INDEX_FILE, limit=MAX_INDEX_FILE)
    digest = index_digest(data)
    if digest != model.header.index_sha256 or len(data) != model.header.index_size:
        raise _tampered(INDEX_FILE, f"it is not the one that {HEADER_FILE} names")
    if expected is not None and digest != expected:
        raise _tampered(INDEX_FILE, f"its SHA-256 is {digest}, expected {expected}")
    index = parse_index(data)
    if model.manifest.cipher is not None:
        return index
    # (C2) it lists exactly the stored files, with their lengths
    stored = {f"{OBJECTS_DIR}/{s.name}": s.shape.stored for s in model.manifest.stored.values()}
    stored[MANIFEST_FILE] = model.header.manifest.stored
    if {path: file.size for path, file in index.items()} != stored:
        raise _tampered(INDEX_FILE, "it does not list the files of the manifest")
    return index


def _check_listing(found: set[str], expected: set[str]) -> None:
    for path in sorted(expected - found):
        raise Tampered(f"{path} is missing", path=path)
    for path in sorted(found - expected):
        raise Tampered(
            f"{path!r} does not belong to the sealed model", path=path,
            hint="remove it, or fetch the sealed model again",
        )


def _check_inline(entry: Entry, storage: Inline, advance: Advance) -> None:
    # (C4) for inline content
    if sha256(storage.content).hexdigest() != entry.sha256:
        raise _tampered(MANIFEST_FILE, f"the SHA-256 of {entry.path!r} is not its content's")
    advance(entry.size)


def _check_object(
    model: SealedModel, entry: Entry, storage: Stored, listed: StoredFile, fleet: Fleet,
    lanes: Lanes, advance: Advance,
) -> None:
    reader = model.open_object(entry, storage)
    try:
        pieces, digest = PieceHasher(), sha256()
        pieces.update(reader.head)
        # (C4) chunks, padding and plaintext digest
        for offset, plain, sealed in opened(reader, lanes):
            fleet.keep_on()
            beside = lanes.aside(partial(pieces.update_all, sealed))
            try:
                held = plain[: max(0, entry.size - offset)]
                digest.update(held)
            finally:
                beside.result()
            if plain[len(held) :] != bytes(len(plain) - len(held)):
                raise _tampered(reader.stored, f"its padding after {entry.path!r} is not zero")
            advance(len(held))
        if digest.hexdigest() != entry.sha256:
            raise _tampered(reader.stored, f"the SHA-256 of {entry.path!r} is not its content's")
        _compare_pieces(reader.stored, pieces.finish(), listed)
    finally:
        reader.close()


def _check_manifest_pieces(model: SealedModel, listed: StoredFile) -> None:
    handle = model.files.open(MANIFEST_FILE)
    try:
        found = hash_pieces(handle, 0, -(-listed.size // PIECE))
    except OSError as error:
        raise StorageError(f"read {MANIFEST_FILE}: {error.strerror}") from error
    finally:
        model.files.release(handle)
    _compare_pieces(MANIFEST_FILE, found, listed)


def _compare_pieces(stored: str, found: dict[int, str], listed: StoredFile) -> None:
    # (C5) the public index speaks of the same bytes
    for number, piece in enumerate(listed.pieces):
        if found.get(number) != piece:
            raise _tampered(
                INDEX_FILE, f"its BLAKE3 of {stored}, piece {number}, is not that of the file"
            )


def _tampered(stored: str, reason: str) -> Tampered:
    return Tampered(
        f"{stored} was altered: {reason}", path=stored,
        hint="fetch the sealed model again, or restore it from a copy",
    )
