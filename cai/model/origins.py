"""Where the plaintext of a sealing comes from: a plain tree, or a sealed model that is resealed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from cai.errors import Tampered
from cai.model.layout import MANIFEST_FILE, OBJECTS_DIR
from cai.model.manifest import Stored
from cai.model.sealed import SealedModel
from cai.model.source import opened_source, scan
from cai.model.tree import Entry


class OriginFile(Protocol):
    """An open file of an origin; safe to use from several threads."""

    @property
    def state(self) -> tuple[str, ...]:
        """What tells whether it changed between two runs."""

    def readinto(self, offset: int, view: memoryview) -> None:
        """Fill the whole view from ``offset``; errors as the origin's."""

    def forget(self, offset: int, length: int) -> None:
        """This part is not needed again."""


class Origin(Protocol):
    """A tree to be sealed."""

    def scan(self) -> list[Entry]:
        """Every entry, sorted by the bytes of its path."""

    def opened(self, entry: Entry) -> AbstractContextManager[OriginFile]:
        """A file, for a block that may read it whole; its end checks that it did not change."""

    def verify(self, entry: Entry, sha256: str) -> None:
        """Compare the digest of what was read with what the origin knows of it."""


class PlainOrigin:
    """A plain directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def scan(self) -> list[Entry]:
        """Every entry; errors as ``cai.model.source.scan``."""
        return scan(self.directory)

    def opened(self, entry: Entry) -> AbstractContextManager[OriginFile]:
        """A file; errors as ``cai.model.source.SourceFile``."""
        return opened_source(self.directory, entry)

    def verify(self, entry: Entry, sha256: str) -> None:
        """A plain tree promises nothing."""


class SealedOrigin:
    """An opened sealed model: its plaintext goes from one object into the other, never to disk."""

    def __init__(self, model: SealedModel) -> None:
        self._model = model

    def scan(self) -> list[Entry]:
        """The manifest's entries."""
        return list(self._model.entries.values())

    @contextmanager
    def opened(self, entry: Entry) -> Iterator[OriginFile]:
        """A file; errors as ``SealedModel.open``."""
        reader = self._model.open(entry.path)
        try:
            yield _SealedFile(self._model, entry, reader.readinto)
        finally:
            reader.close()

    def verify(self, entry: Entry, sha256: str) -> None:
        """The content must be what the manifest says.

        Raises:
            Tampered: it is not.
        """
        if sha256 != entry.sha256:
            stored = _stored_path(self._model, entry)
            raise Tampered(
                f"{stored} was altered: the SHA-256 of {entry.path!r} is not its content's",
                path=stored,
            )


class _SealedFile:
    """One file of a sealed model as the source of another."""

    def __init__(self, model: SealedModel, entry: Entry, read: _Read) -> None:
        self._model, self._entry, self._readinto = model, entry, read

    @property
    def state(self) -> tuple[str, ...]:
        return ("sealed", self._model.root, self._entry.path)

    def readinto(self, offset: int, view: memoryview) -> None:
        if self._readinto(offset, view) != len(view):
            stored = _stored_path(self._model, self._entry)
            raise Tampered(f"{stored} was altered: it ends early", path=stored)

    def forget(self, offset: int, length: int) -> None:
        """The reader's cache is nobody else's."""


class _Read(Protocol):
    def __call__(self, offset: int, buffer: memoryview) -> int: ...


def _stored_path(model: SealedModel, entry: Entry) -> str:
    storage = model.manifest.storage[entry.path]
    return f"{OBJECTS_DIR}/{storage.name}" if isinstance(storage, Stored) else MANIFEST_FILE
