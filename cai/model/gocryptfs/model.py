"""An opened model of method gocryptfs: the manifest pins every block of the cipher directory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from cai.errors import InputError, InputMissing
from cai.model.files import SealedFiles
from cai.model.gocryptfs.blocks import BlockCipher
from cai.model.gocryptfs.entries import FileTags
from cai.model.gocryptfs.keys import CipherKeys
from cai.model.gocryptfs.layout import CONF_FILE, DIRIV_FILE, LONG_SUFFIX
from cai.model.gocryptfs.names import NameCipher, StoredName
from cai.model.gocryptfs.reader import BlockReader
from cai.model.header import Header
from cai.model.layout import DATA_DIR
from cai.model.manifest import Manifest
from cai.model.paths import name_bytes
from cai.model.sealed import SealedModel
from cai.model.tree import Entry, EntryType


class StoredTree:
    """Stored paths of a tree's entries: their names encrypted under the IVs of their directories.

    Args:
        names: encrypts names.
        ivs: IV by path of directory.
    """

    def __init__(self, names: NameCipher, ivs: Mapping[str, bytes]) -> None:
        self._names, self._ivs = names, ivs
        self._folders = {"": DATA_DIR}

    def name(self, path: str) -> StoredName:
        """How the last part of a path is stored."""
        above, _, last = path.rpartition("/")
        return self._names.encrypt(name_bytes(last), self._ivs[above])

    def path(self, path: str) -> str:
        """Where an entry is stored, relative to the sealed model."""
        return f"{self._folder(path.rpartition('/')[0])}/{self.name(path).name}"

    def _folder(self, path: str) -> str:
        folders = self._folders
        if path not in folders:
            above = ""
            for part in path.split("/"):
                here = f"{above}/{part}" if above else part
                if here not in folders:
                    folders[here] = f"{folders[above]}/{self.name(here).name}"
                above = here
        return folders[path]

    def expected(self, entry: Entry) -> Iterator[str]:
        """Every stored path that belongs to an entry; a directory's own ends with a slash."""
        stored = self.path(entry.path)
        if self.name(entry.path).long:
            yield stored + LONG_SUFFIX
        if entry.type is EntryType.DIRECTORY:
            yield f"{stored}/"
            yield f"{stored}/{DIRIV_FILE}"
        else:
            yield stored


ROOT_FILES = (f"{DATA_DIR}/{CONF_FILE}", f"{DATA_DIR}/{DIRIV_FILE}")
"""Stored files of every cipher directory."""


class CipherModel(SealedModel):
    """A sealed model whose files lie in a cipher directory; made by ``open_model``.

    Attributes:
        tree: what the manifest knows of the cipher directory.
        keys: of the cipher directory.
        stored: stored paths of the entries.
        names: encrypts names and targets.
    """

    by_processes = True
    """Blocks are small: several processes read faster than one, several threads do not."""

    def __init__(
        self, files: SealedFiles, header: Header, manifest: Manifest, root: str, keys: CipherKeys
    ) -> None:
        super().__init__(files, header, manifest, root)
        assert manifest.cipher is not None  # noqa: S101 - open_model has compared the methods
        self.tree = manifest.cipher
        self.keys = keys
        self.names = NameCipher(keys)
        self.stored = StoredTree(self.names, self.tree.ivs)
        self._cipher = BlockCipher(keys)

    def open(self, path: str) -> BlockReader:
        """Open a file of the tree.

        Raises:
            InputMissing: no such file.
            InputError: the path is not a file.
            Tampered: its stored file is missing or is not the sealed one.
            StorageError: it cannot be read.
        """
        entry = self.entries.get(path)
        if entry is None:
            raise InputMissing(f"no file {path!r} in the model")
        if entry.type is not EntryType.FILE:
            raise InputError(f"{path!r} is not a file")
        return BlockReader(
            self._files, self.stored.path(path), self._cipher, path=path, size=entry.size,
            tags=self.tags(path),
        )

    def tags(self, path: str) -> FileTags:
        """What pins the stored bytes of a file."""
        return self.tree.files[path]
