"""Files that need not be encrypted again: those of the revision before (spec-gocryptfs §8.1)."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path

from cai.errors import StorageError
from cai.model.checking import checked_index
from cai.model.gocryptfs.below import above, open_below
from cai.model.gocryptfs.entries import FileTags
from cai.model.gocryptfs.model import CipherModel
from cai.model.index import StoredFile, hash_pieces
from cai.model.layout import PIECE
from cai.model.stage import output_error
from cai.model.tree import Entry, EntryType

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC

Taken = tuple[str, FileTags, StoredFile]
"""SHA-256 of a file that was taken over, what pins its blocks, and its line of the index."""


class OlderCipher:
    """The files of an older revision, each to be taken once; safe from several threads.

    Args:
        model: opened, on this machine.

    Attributes:
        ivs: of its directories, by path; a directory that is still there keeps its own, so that
            what did not change keeps its stored name too.

    Raises:
        Tampered, FormatError: its index is not the sealed one.
    """

    def __init__(self, model: CipherModel) -> None:
        index = checked_index(model, None)
        directory = model.files.directory
        assert directory is not None, "an older revision lies on this machine"  # noqa: S101
        self._directory: Path = directory
        self.ivs: Mapping[str, bytes] = model.tree.ivs
        self._lock = threading.Lock()
        self._sizes: set[int] = set()
        self._alike: dict[tuple[int, str], list[tuple[str, FileTags, StoredFile]]] = {}
        for path, entry in model.entries.items():
            if entry.type is EntryType.FILE and entry.size:
                self._sizes.add(entry.size)
                stored = model.stored.path(path)
                place = stored, model.tags(path), index[stored]
                self._alike.setdefault((entry.size, entry.sha256), []).append(place)

    def may_have(self, entry: Entry) -> bool:
        """Whether some file has this size."""
        return entry.size in self._sizes

    def take(self, entry: Entry, sha256: str, root: int, target: str) -> Taken | None:
        """Put the ciphertext of this content at ``target`` below the directory ``root``.

        Returns:
            ``None`` when there is none, or none that is whole.

        Raises:
            StorageError, NoSpace: it cannot be put there.
        """
        mode = entry.mode | 0o400
        while True:
            with self._lock:
                places = self._alike.get((entry.size, sha256))
                if not places:
                    return None
                stored, tags, listed = places.pop()
            try:
                self._bring(stored, root, target, mode)
                if _is_whole(root, target, listed):
                    return sha256, tags, listed
                with above(root, target) as (folder, name):
                    os.unlink(name, dir_fd=folder)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise output_error(error, f"write {target}") from error

    def _bring(self, stored: str, root: int, target: str, mode: int) -> None:
        """A second name for the stored file; a copy where modes differ or links are not had."""
        old = os.open(self._directory, _DIRECTORY)
        try:
            source = open_below(old, stored, os.O_RDONLY)
            try:
                if os.fstat(source).st_mode & 0o777 == mode and _linked(old, stored, root, target):
                    return
                copy = open_below(root, target, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
                with os.fdopen(copy, "wb") as out, os.fdopen(os.dup(source), "rb") as plain:
                    shutil.copyfileobj(plain, out, PIECE)
                    out.flush()
                    os.fchmod(out.fileno(), mode)
                    os.fsync(out.fileno())
            finally:
                os.close(source)
        finally:
            os.close(old)


def _linked(old: int, stored: str, root: int, target: str) -> bool:
    with above(old, stored) as (folder, name), above(root, target) as (to, new_name):
        try:
            os.link(name, new_name, src_dir_fd=folder, dst_dir_fd=to, follow_symlinks=False)
        except OSError:
            return False
    return True


def _is_whole(root: int, stored: str, listed: StoredFile) -> bool:
    """Whether a stored file has its length and each of its pieces.

    Raises:
        StorageError: it cannot be read.
    """
    handle = open_below(root, stored, os.O_RDONLY | os.O_NONBLOCK)
    try:
        if os.fstat(handle).st_size != listed.size:
            return False
        found = hash_pieces(handle, 0, -(-listed.size // PIECE))
        return tuple(found[number] for number in sorted(found)) == listed.pieces
    except OSError as error:
        raise StorageError(f"read {stored}: {error.strerror}") from error
    finally:
        os.close(handle)
