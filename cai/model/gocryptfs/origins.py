"""Where the plaintext of a cipher directory comes from: a plain tree, or a model that is resealed.

The process that seals begins and finishes each file; its workers, forked before, open it for
themselves. A token goes from the one to the others, so that both mean the same file.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from cai.errors import CaiError, InputError, Tampered
from cai.model.gocryptfs.model import CipherModel
from cai.model.source import SourceFile, scan
from cai.model.tree import Entry

Token = tuple[int, ...]

_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class Begun(Protocol):
    """A file that is being sealed, in the process that seals."""

    @property
    def token(self) -> Token:
        """What a worker compares, so that it opens this very file."""

    def finish(self, sha256: str, /) -> None:
        """Check that what was read is what it should be; errors as the origin's."""

    def close(self) -> None:
        """Release the descriptors."""


class Plain(Protocol):
    """A file that a worker reads."""

    def readinto(self, offset: int, view: memoryview) -> None:
        """Fill the whole view from ``offset``; errors as the origin's."""

    def close(self) -> None:
        """Release the descriptors."""


class CipherOrigin(Protocol):
    """A tree to be sealed."""

    def scan(self) -> list[Entry]:
        """Every entry, sorted by the bytes of its path."""

    def begin(self, entry: Entry) -> Begun:
        """Begin a file."""

    def open(self, path: str, token: Token, /) -> Plain:
        """Open a file that was begun, in a worker."""


class PlainTree:
    """A plain directory, whose names may be any bytes."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def scan(self) -> list[Entry]:
        """Every entry; errors as ``cai.model.source.scan``."""
        return scan(self._directory, any_bytes=True)

    def begin(self, entry: Entry) -> Begun:
        """Begin a file; errors as ``cai.model.source.SourceFile``."""
        return _BegunFile(SourceFile(self._directory, entry))

    def open(self, path: str, token: Token, /) -> Plain:
        """Open a file.

        Raises:
            InputError: it is another one than was begun.
            OSError: it cannot be opened.
        """
        return _PlainFile(self._directory / path, token)


class SealedTree:
    """An opened model; its plaintext goes from one ciphertext into the other through memory."""

    def __init__(self, model: CipherModel) -> None:
        self._model = model

    def scan(self) -> list[Entry]:
        """The manifest's entries."""
        return list(self._model.entries.values())

    def begin(self, entry: Entry) -> Begun:
        """Begin a file."""
        return _BegunSealed(self._model.stored.path(entry.path), entry)

    def open(self, path: str, _token: Token, /) -> Plain:
        """Open a file; errors as ``CipherModel.open``."""
        return _SealedFile(self._model, path)


class _BegunFile:
    def __init__(self, file: SourceFile) -> None:
        self._file = file
        self.token: Token = file.identity

    def finish(self, _sha256: str, /) -> None:
        self._file.finish()

    def close(self) -> None:
        self._file.close()


class _PlainFile:
    def __init__(self, path: Path, token: Token) -> None:
        self._path = path
        self._fd = os.open(path, _READ)
        found = os.fstat(self._fd)
        if (found.st_dev, found.st_ino) != token:
            self.close()
            raise _changed(path)

    def readinto(self, offset: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            got = os.preadv(self._fd, [view[done:]], offset + done)
            if not got:
                raise _changed(self._path)
            done += got

    def close(self) -> None:
        os.close(self._fd)


class _BegunSealed:
    token: Token = ()

    def __init__(self, stored: str, entry: Entry) -> None:
        self._stored, self._entry = stored, entry

    def finish(self, sha256: str, /) -> None:
        if sha256 != self._entry.sha256:
            raise Tampered(
                f"{self._stored} was altered: the SHA-256 of {self._entry.path!r} is not its "
                "content's", path=self._stored,
            )

    def close(self) -> None:
        pass


class _SealedFile:
    def __init__(self, model: CipherModel, path: str) -> None:
        self._reader = model.open(path)

    def readinto(self, offset: int, view: memoryview) -> None:
        # Shorter than it was sealed, it would not have been opened.
        self._reader.readinto(offset, view)

    def close(self) -> None:
        self._reader.close()


def _changed(path: Path) -> CaiError:
    return InputError(
        f"{path} changed while it was read", hint="stop what writes it and try again"
    )
