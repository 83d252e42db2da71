"""An opened sealed model: header and manifest authenticated, files ready to read (spec-format §8).

Example::

    model = open_model(Path("model.sealed"), kek, expect_root=record.manifest_root)
    model.open("config.json").readinto(0, memoryview(bytearray(4096)))
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cai.errors import InputError, InputMissing, Tampered
from cai.model.content import content_root
from cai.model.files import SealedFiles, StoredFiles
from cai.model.header import Header, unlock
from cai.model.layout import (
    GOCRYPTFS,
    HEADER_FILE,
    MANIFEST_FILE,
    MAX_HEADER_FILE,
    OBJECTS_DIR,
)
from cai.model.manifest import Inline, Manifest, Stored, model_root, unpad
from cai.model.reader import InlineReader, ObjectReader
from cai.model.signature import verify_signature
from cai.model.tree import Entry, EntryType, FileReader
from cai.secret import Secret

if TYPE_CHECKING:
    from cai.model.gocryptfs.keys import CipherKeys


class SealedModel:
    """A ``ModelTree`` over a sealed model; safe to use from several threads and forks.

    Made by ``open_model``.

    Attributes:
        manifest: everything the manifest says.
        header: the authenticated ``cai.json``.
        root: ``model_root``, hex.
        entries: every path but the root, parents before children.
    """

    def __init__(self, files: SealedFiles, header: Header, manifest: Manifest, root: str) -> None:
        self._files = files
        self.header = header
        self.manifest = manifest
        self.root = root
        self.entries = manifest.entries

    @property
    def content_root(self) -> str:
        """Content root, hex: the owner's claim until the content was hashed."""
        return self.manifest.content_root

    @property
    def model_id(self) -> str:
        """The model line, hex."""
        return self.manifest.model_id

    @property
    def revision(self) -> int:
        """The revision, from 1."""
        return self.manifest.revision

    @property
    def allow(self) -> tuple[str, ...]:
        """Flags of the manifest; what counts is their intersection with the record's."""
        return self.manifest.allow

    @property
    def files(self) -> SealedFiles:
        """The stored files."""
        return self._files

    def open(self, path: str) -> FileReader:
        """Open a file of the tree.

        Raises:
            InputMissing: no such file.
            InputError: the path is not a file.
            Tampered: its stored object is missing or is not the sealed one.
            StorageError: it cannot be read.
        """
        entry = self.entries.get(path)
        if entry is None:
            raise InputMissing(f"no file {path!r} in the model")
        if entry.type is not EntryType.FILE:
            raise InputError(f"{path!r} is not a file")
        storage = self.manifest.storage[path]
        if isinstance(storage, Inline):
            return InlineReader(storage.content)
        return self.open_object(entry, storage)

    def open_object(self, entry: Entry, storage: Stored) -> ObjectReader:
        """Open the object of a stored file; errors as ``open``."""
        return ObjectReader(
            self._files, f"{OBJECTS_DIR}/{storage.name}", storage.shape, storage.digest,
            storage.key, path=entry.path, size=entry.size,
        )

    def close(self) -> None:
        """Close the directories; readers that are open stay usable."""
        self._files.close()

    def __enter__(self) -> SealedModel:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


def read_header(directory: Path) -> Header:
    """Read ``cai.json`` without a key; nothing in it is authenticated.

    Raises:
        InputMissing, InputError, StorageError: there is no sealed model to read.
        FormatError, LimitExceeded: it is not of the form of §4.
    """
    files = StoredFiles(directory)
    try:
        return _read_header(files)
    finally:
        files.close()


def open_model(
    directory: Path, kek: Secret, *, expect_root: str | None = None, min_revision: int = 0,
    owner_key: str | None = None,
) -> SealedModel:
    """Open a sealed model in the order of spec-format §8.

    Args:
        directory: the sealed model.
        kek: the key-encryption key, 32 bytes.
        expect_root: the ``model_root`` to insist on, hex.
        min_revision: the oldest revision to accept.
        owner_key: whose signature over the manifest to insist on, Ed25519, 64 hex digits.

    Raises:
        InputMissing, InputError: there is no sealed model of a known method.
        FormatError, LimitExceeded: ``cai.json`` or the manifest breaks the format.
        WrongKey: the key is another one.
        Tampered: something is not what was sealed, or older or other than demanded.
        StorageError: the file system refused.
    """
    return open_model_files(
        StoredFiles(directory), kek, expect_root=expect_root, min_revision=min_revision,
        owner_key=owner_key,
    )


def open_model_files(
    files: SealedFiles, kek: Secret, *, expect_root: str | None = None, min_revision: int = 0,
    owner_key: str | None = None,
) -> SealedModel:
    """Open a sealed model from stored files that lie anywhere; closes them when it fails.

    Raises:
        CaiError: as ``open_model``, and what ``files`` raises.
    """
    try:
        # (1) to (5)
        header = _read_header(files)
        cipher = _cipher_keys(files, kek) if header.method == GOCRYPTFS else None
        _, keys = unlock(header, cipher.kek if cipher else kek)
        # (6) no older revision than demanded
        if header.revision < min_revision:
            raise Tampered(
                f"{HEADER_FILE} is revision {header.revision}, at least {min_revision} is required",
                path=HEADER_FILE, code="rollback", hint="fetch the current revision",
            )
        # (7) the manifest's bytes, (8) their form
        canonical = unpad(_read_manifest(files, header, keys.manifest_key))
        manifest = Manifest.parse(canonical)
        # (9) the same model and revision as the header's, and the same method
        if (manifest.model_id, manifest.revision) != (header.model_id, header.revision):
            raise _manifest_altered(f"it belongs to another model or revision than {HEADER_FILE}")
        if (manifest.cipher is not None) != (cipher is not None):
            raise _manifest_altered(f"it is of another method than {HEADER_FILE}")
        # (10) the content root is the entries' own
        if content_root(manifest.entries.values()) != manifest.content_root:
            raise _manifest_altered("its content root is not that of its entries")
        # (11) the root that the caller insists on
        root = model_root(canonical)
        if expect_root is not None and root != expect_root:
            raise Tampered(
                f"this is another model: its root is {root}, expected {expect_root}",
                path=MANIFEST_FILE, code="root-mismatch",
                hint="check that model and record belong together",
            )
        # (12) the owner that the caller insists on
        if owner_key is not None:
            verify_signature(files, root, owner_key)
        if cipher is not None:
            from cai.model.gocryptfs.model import CipherModel

            return CipherModel(files, header, manifest, root, cipher)
        return SealedModel(files, header, manifest, root)
    except BaseException:
        files.close()
        raise


def _cipher_keys(files: SealedFiles, password: Secret) -> CipherKeys:
    """Keys of method gocryptfs, whose KEK comes from the cipher directory (spec-gocryptfs §5)."""
    from cai.model.gocryptfs.keys import unlock_directory

    return unlock_directory(files, password)


def _read_header(files: SealedFiles) -> Header:
    return Header.parse(files.read(HEADER_FILE, limit=MAX_HEADER_FILE))


def _read_manifest(files: SealedFiles, header: Header, key: bytes) -> bytes:
    reader = ObjectReader(files, MANIFEST_FILE, header.manifest, header.manifest_digest, key)
    try:
        padded = bytearray(header.manifest.size)
        reader.readinto(0, memoryview(padded))
        return bytes(padded)
    finally:
        reader.close()


def _manifest_altered(reason: str) -> Tampered:
    return Tampered(f"{MANIFEST_FILE} was altered: {reason}", path=MANIFEST_FILE)
