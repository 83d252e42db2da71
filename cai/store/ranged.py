"""A sealed model read straight from a store, range by range, without a copy on this machine.

``RangedFiles`` is to a store what ``cai.model.files.StoredFiles`` is to a directory. Every piece is
compared with the index before a byte of it leaves, and again by the model's own reader; pieces are
kept in a bounded cache, and where somebody reads forwards the next ones are fetched ahead.

Example::

    files = open_ranged("oss://bucket/minilm", index_sha256=record.index_sha256)
    model = open_model_files(files, kek, expect_root=record.manifest_root)
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from cai.errors import CaiError, LimitExceeded, Tampered
from cai.model.index import StoredFile
from cai.model.layout import HEADER_FILE, INDEX_FILE, PIECE
from cai.store.access import StoreOptions
from cai.store.base import Store
from cai.store.opening import open_store
from cai.store.piececache import PieceCache
from cai.store.publication import Publication, read_pieces, read_publication

CACHE_BYTES = 256 * 1024 * 1024
"""Size of the cache, unless the caller says otherwise, bytes."""

AHEAD = 4
"""Pieces that are fetched ahead of a reader who reads forwards."""


class RangedFiles:
    """The stored files of a sealed model in a store; safe for threads and forked processes.

    Args:
        connect: opens the store; called once in each process, since connections are not shared.
        index_sha256: the index to insist on, hex.
        cache_bytes: size of the cache that all processes share.
        ahead: pieces to fetch ahead; 0 for none.

    Attributes:
        directory: ``None``: there is none.
        publication: what is published.

    Raises:
        InputError, Tampered, FormatError: as ``read_publication``.
    """

    directory: Path | None = None

    def __init__(
        self, connect: Callable[[], Store], *, index_sha256: str | None = None,
        cache_bytes: int = CACHE_BYTES, ahead: int = AHEAD,
    ) -> None:
        self._connect = connect
        self._ahead = ahead
        self._here = _Here(connect)
        self.publication: Publication = read_publication(self._here.store, index_sha256)
        self._listed = self.publication.files
        self._numbers = {path: number for number, path in enumerate(self._listed)}
        self._documents: dict[str, bytes] = dict(self.publication.signatures)
        self._documents |= {
            HEADER_FILE: self.publication.header, INDEX_FILE: self.publication.index
        }
        self._cache = PieceCache(cache_bytes)
        self._handles: dict[int, str] = {}
        self._serial = itertools.count(3)

    # by path

    def size(self, stored: str) -> int:
        """Stored bytes of a file.

        Raises:
            Tampered: the model has no such file.
        """
        if stored in self._documents:
            return len(self._documents[stored])
        return self._file(stored).size

    def read_range(self, stored: str, offset: int, length: int) -> bytes:
        """Bytes from ``offset``, fewer at the end of the file.

        Raises:
            Tampered: they are not what the index lists.
            PeerUnreachable: the store does not answer, however often it is asked.
        """
        data = bytearray(max(0, min(length, self.size(stored) - offset)))
        return bytes(data[: self.readinto(stored, offset, memoryview(data))])

    def readinto(self, stored: str, offset: int, view: memoryview) -> int:
        """As ``read_range``, into the caller's memory; returns the bytes filled."""
        if stored in self._documents:
            part = self._documents[stored][offset : offset + len(view)]
            view[: len(part)] = part
            return len(part)
        file = self._file(stored)
        view = view[: max(0, min(len(view), file.size - offset))]
        done = 0
        while done < len(view):
            number, skip = divmod(offset + done, PIECE)
            done += self._from_piece(stored, file, number, skip, view[done:])
        return done

    # as cai.model.files.SealedFiles

    def open(self, stored: str) -> int:
        """Open a stored file; the handle is a number of ours, the same in forked processes."""
        self.size(stored)
        handle = next(self._serial)
        self._handles[handle] = stored
        return handle

    def length(self, handle: int) -> int:
        """Stored bytes of an open file."""
        return self.size(self._path(handle))

    def preadv(self, handle: int, views: list[memoryview], offset: int) -> int:
        """Fill the views from ``offset``; fewer bytes at the end of the file."""
        stored, done = self._path(handle), 0
        for view in views:
            count = self.readinto(stored, offset + done, view)
            done += count
            if count < len(view):
                break
        return done

    def forget(self, handle: int, offset: int, length: int) -> None:
        """Nothing: the cache is bounded."""

    def release(self, handle: int) -> None:
        """Close an open file."""
        self._handles.pop(handle, None)

    def read(self, stored: str, *, limit: int) -> bytes:
        """A small stored file whole.

        Raises:
            LimitExceeded: it is longer than ``limit`` bytes.
        """
        size = self.size(stored)
        if size > limit:
            raise LimitExceeded(f"{stored}: more than {limit} bytes")
        return self.read_range(stored, 0, size)

    def readlink(self, stored: str) -> str:
        """Text of a stored symbolic link.

        Raises:
            Tampered: there is no such link.
        """
        if stored not in self.publication.links:
            raise Tampered(f"{stored} is no symbolic link", path=stored)
        return self.publication.links[stored]

    def listing(self) -> set[str]:
        """Every stored path, as the index has them; folders below the first have a slash behind."""
        below = {path for folder in self.publication.folders for path in _above(folder)}
        return {*self._documents, *self._listed, *self.publication.links, *below}

    def close(self) -> None:
        """Close connections and cache."""
        self._here.close()
        self._cache.close()

    def _path(self, handle: int) -> str:
        try:
            return self._handles[handle]
        except KeyError:
            raise CaiError(f"handle {handle} is not open") from None

    def _file(self, stored: str) -> StoredFile:
        file = self._listed.get(stored)
        if file is None:
            raise Tampered(f"{stored} is missing", path=stored)
        return file

    def _from_piece(
        self, stored: str, file: StoredFile, number: int, skip: int, view: memoryview
    ) -> int:
        key = self._key(stored, number)
        self._fetch_ahead(stored, file, number)
        copied = self._cache.get(key, skip, view)
        if not copied:
            data = self._fill(stored, file, number)
            part = memoryview(data)[skip : skip + len(view)]
            view[: len(part)] = part
            copied = len(part)
        return copied

    def _fill(self, stored: str, file: StoredFile, number: int) -> bytes:
        here = self._in_this_process()
        return self._cache.fill(
            self._key(stored, number), lambda: read_pieces(here.store, stored, file, number, 1)
        )

    def _fetch_ahead(self, stored: str, file: StoredFile, number: int) -> None:
        """Fetch the next pieces in the background, where the one before this one was read too."""
        here = self._in_this_process()
        forwards = number == 0 or self._cache.has(self._key(stored, number - 1))
        if not self._ahead or not forwards:
            return
        last = min(number + self._ahead, len(file.pieces) - 1)
        for following in range(number + 1, last + 1):
            key = self._key(stored, following)
            if key not in here.coming and not self._cache.has(key):
                here.start(key, partial(self._fill, stored, file, following))

    def _key(self, stored: str, number: int) -> int:
        return self._numbers[stored] << 32 | number

    def _in_this_process(self) -> _Here:
        if self._here.pid != os.getpid():
            self._here = _Here(self._connect)
        return self._here


class _Here:
    """What one process has for itself: connections and threads."""

    def __init__(self, connect: Callable[[], Store]) -> None:
        self.pid = os.getpid()
        self.store = connect()
        self.coming: dict[int, Future[bytes]] = {}
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None

    def start(self, key: int, work: Callable[[], bytes]) -> None:
        with self._lock:
            if key in self.coming:
                return
            if self._pool is None:
                self._pool = ThreadPoolExecutor(AHEAD, thread_name_prefix="cai-ahead")
            future = self.coming[key] = self._pool.submit(work)
        # Whoever wants the piece meets the error again, and then it is told.
        future.add_done_callback(lambda _done: self.coming.pop(key, None))

    def close(self) -> None:
        if self.pid != os.getpid():
            return  # a fork's: its threads and connections belong to the parent
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self.store.close()


def open_ranged(
    uri: str, options: StoreOptions | None = None, *, index_sha256: str | None = None,
    cache_bytes: int = CACHE_BYTES, ahead: int = AHEAD,
) -> RangedFiles:
    """Open a sealed model in a store for reading on demand.

    Args:
        uri: where it is.
        options: endpoint and where credentials are.
        index_sha256: the index to insist on, hex.
        cache_bytes: size of the cache that all processes share.
        ahead: pieces of 4 MiB to fetch ahead.

    Raises:
        UsageError, SettingError: as ``open_store``.
        InputError, Tampered, FormatError, PeerError: there is no sealed model to read.
    """
    return RangedFiles(
        lambda: open_store(uri, options), index_sha256=index_sha256, cache_bytes=cache_bytes,
        ahead=ahead,
    )


def _above(folder: str) -> list[str]:
    """``data/a/b`` -> ``data/a/``, ``data/a/b/``."""
    parts = folder.split("/")
    return ["/".join(parts[:count]) + "/" for count in range(2, len(parts) + 1)]
