"""Objects that need not be written again: an older revision's, and an interrupted run's.

Both are taken over by their manifest entry, and only after every stored byte was compared with its
BLAKE3 and the head with its digest (docs/spec-format.md §2, *Carrying over*, and §9).
"""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

from cai.errors import StorageError
from cai.model.checking import checked_index
from cai.model.files import StoredFiles
from cai.model.index import StoredFile, hash_pieces
from cai.model.journal import Finished
from cai.model.layout import OBJECTS_DIR, PIECE
from cai.model.manifest import Stored
from cai.model.object import Shape, object_digest
from cai.model.sealed import SealedModel
from cai.model.stage import new_file, output_error

Place = tuple[Stored, StoredFile]
"""Where a file is stored, and the line of the index for it."""


class OlderRevision:
    """The objects of an older revision, each to be taken once; safe from several threads.

    Args:
        model: opened, on this machine.

    Raises:
        Tampered, FormatError: its index is not the sealed one.
    """

    def __init__(self, model: SealedModel) -> None:
        index = checked_index(model, None)
        self._files = model.files
        self._lock = threading.Lock()
        self._places: dict[tuple[int, Shape], dict[str, list[Place]]] = {}
        for path, stored in model.manifest.stored.items():
            entry = model.entries[path]
            alike = self._places.setdefault((entry.size, stored.shape), {})
            listed = index[f"{OBJECTS_DIR}/{stored.name}"]
            alike.setdefault(entry.sha256, []).append((stored, listed))

    def may_have(self, size: int, shape: Shape) -> bool:
        """Whether some file of this size is stored in this shape."""
        return (size, shape) in self._places

    def take(self, size: int, shape: Shape, sha256: str, target: Path) -> Place | None:
        """Put the object of this content below ``target``.

        Returns:
            ``None`` when there is none, or none that is whole.

        Raises:
            StorageError, NoSpace: it cannot be put there.
        """
        while True:
            with self._lock:
                places = self._places.get((size, shape), {}).get(sha256)
                if not places:
                    return None
                stored, listed = places.pop()
            path = target / OBJECTS_DIR / stored.name
            try:
                self._bring(f"{OBJECTS_DIR}/{stored.name}", path)
                if is_whole(path, stored, listed):
                    return stored, listed
                path.unlink()
            except FileNotFoundError:
                continue
            except OSError as error:
                raise output_error(error, f"write {path.name}") from error

    def _bring(self, stored: str, path: Path) -> None:
        """A second name for the stored file, or a copy where the file system has none."""
        directory = self._files.directory
        assert directory is not None, "an older revision lies on this machine"  # noqa: S101
        try:
            os.link(directory / stored, path, follow_symlinks=False)
        except FileNotFoundError:
            raise
        except OSError:
            files = StoredFiles(directory)
            try:
                with (
                    os.fdopen(files.open(stored), "rb") as source,
                    os.fdopen(new_file(path), "wb") as copy,
                ):
                    shutil.copyfileobj(source, copy, PIECE)
                    copy.flush()
                    os.fsync(copy.fileno())
            finally:
                files.close()


def is_whole(path: Path, stored: Stored, listed: StoredFile) -> bool:
    """Whether a stored file has its length, its head and each of its pieces.

    Raises:
        StorageError: it cannot be read.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        if not os.fstat(handle).st_size == stored.shape.stored == listed.size:
            return False
        if object_digest(os.pread(handle, stored.shape.head, 0)) != stored.digest:
            return False
        found = hash_pieces(handle, 0, -(-listed.size // PIECE))
        return tuple(found[number] for number in sorted(found)) == listed.pieces
    except OSError as error:
        raise StorageError(f"read {path.name}: {error.strerror}") from error
    finally:
        os.close(handle)


def swept(directory: Path, finished: list[Finished]) -> dict[str, Finished]:
    """What a dead run left in the directory, down to the whole objects of its journal.

    Everything else is removed but the journal itself.

    Raises:
        OSError: something cannot be removed.
    """
    objects = directory / OBJECTS_DIR
    known = {done.stored.name: done for done in finished}
    whole: dict[str, Finished] = {}
    for path in objects.iterdir() if objects.is_dir() else ():
        done = known.get(path.name)
        if done is not None and is_whole(path, done.stored, done.listed):
            whole[done.path] = done
        else:
            path.unlink()
    return whole
