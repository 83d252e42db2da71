"""``push``: a sealed model into a store, without its key (docs/stores.md).

Order: every listed file but the manifest, then the manifest, signatures, ``index.cai`` and last
``cai.json``, so that whoever finds the header finds all the rest. Each piece is compared with the
index before it leaves. What is there already is left alone. An interrupted push is continued by
the next one from the parts that the store has, each compared by its MD5; nothing is remembered on
this side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from cai.errors import InputMissing, PeerError, Tampered, UsageError
from cai.model.index import StoredFile
from cai.model.layout import HEADER_FILE, INDEX_FILE, MANIFEST_FILE, PIECE
from cai.model.progress import ProgressBar, silent
from cai.store.base import PART, Store, Upload, part_size
from cai.store.flow import Flow
from cai.store.local import LocalStore
from cai.store.publication import (
    SIGNATURES,
    Publication,
    label_of,
    label_of_bytes,
    read_pieces,
    read_publication,
)
from cai.store.throttle import Throttle
from cai.terminal import Advance


@dataclass(frozen=True, slots=True)
class PushReport:
    """What a push did.

    Attributes:
        uri: where the model is.
        model_id: hex.
        revision: from 1.
        index_sha256: what ``pull --index-sha256`` takes, hex.
        files: listed files.
        total_bytes: of the listed files.
        sent_bytes: that travelled now.
        resumed_bytes: that an interrupted push had left in the store.
        present_bytes: of files that were there already.
        removed: files that ``prune`` removed.
    """

    uri: str
    model_id: str
    revision: int
    index_sha256: str
    files: int
    total_bytes: int
    sent_bytes: int
    resumed_bytes: int
    present_bytes: int
    removed: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        """The report as ``--json`` prints it."""
        return asdict(self)


def push(
    sealed: Path, store: Store, *, index_sha256: str | None = None, workers: int = 0,
    rate: int = 0, verify: bool = False, prune: bool = False, progress: ProgressBar = silent,
) -> PushReport:
    """Put a sealed model into a store.

    Args:
        sealed: directory of the sealed model.
        store: where it goes.
        index_sha256: the index to insist on, hex.
        workers: transfers at once; 0 for the usual number.
        rate: bytes a second for all of them together; 0 for no limit.
        verify: read everything back and compare.
        prune: remove files of earlier revisions when all is done.
        progress: shows the bytes done.

    Raises:
        Tampered: the sealed model is not what its index says, or ``verify`` found a difference.
        InputError, FormatError: it is no sealed model.
        Refused, PeerError: the store refuses or is not reachable.
    """
    if not store.writable:
        raise UsageError(f"{store.uri} can only be read", hint="push to file:, oss:, s3: or cos:")
    source = LocalStore(sealed)
    publication = read_publication(source, index_sha256)
    throttle = Throttle(rate)
    with Flow(workers, throttle.stop) as flow, progress("push", publication.total) as advance:
        run = _Push(source, store, publication, flow, throttle, advance)
        run.files()
        if verify:
            run.verify()
        run.documents()
        removed = run.tidy(prune=prune)
    return PushReport(
        store.uri, publication.model_id, publication.revision, publication.index_sha256,
        len(publication.files), publication.total, run.sent, run.resumed, run.present, removed,
    )


@dataclass(slots=True)
class _Transfer:
    """One file that is sent in parts."""

    path: str
    file: StoredFile
    upload: Upload
    part: int
    parts: list[int]


class _Push:
    def __init__(
        self, source: LocalStore, store: Store, publication: Publication, flow: Flow,
        throttle: Throttle, advance: Advance,
    ) -> None:
        self._source, self._store, self._of = source, store, publication
        self._flow, self._throttle, self._advance = flow, throttle, advance
        self._pending: Mapping[str, list[Upload]] = store.pending()
        self.sent = self.resumed = self.present = 0

    def files(self) -> None:
        """Send every listed file that is missing, the manifest last."""
        for path, text in self._of.links.items():
            if self._source.link_text(path) != text:
                raise Tampered(f"{path} is not the listed symbolic link", path=path)
        self._store.furnish(self._of.folders, self._of.links)
        paths = [path for path in self._of.files if path != MANIFEST_FILE]
        self._send_missing(paths)
        self._send_missing([path for path in self._of.files if path == MANIFEST_FILE])

    def verify(self) -> None:
        """Read everything back."""
        jobs = [
            (path, first, min(PART // PIECE, len(file.pieces) - first))
            for path, file in self._of.files.items()
            for first in range(0, len(file.pieces), PART // PIECE)
        ]
        self._flow.all(
            jobs,
            lambda job: read_pieces(
                self._store, job[0], self._of.files[job[0]], job[1], job[2], self._throttle
            ),
        )

    def documents(self) -> None:
        """Send signatures, index and header, in this order, where they differ."""
        for path in SIGNATURES:
            # A signature over another manifest must not stand beside this one.
            stale = path not in self._of.signatures and self._store.stat(path) is not None
            if stale and not self._holds(INDEX_FILE, self._of.index):
                self._store.remove(path)
        documents = dict(sorted(self._of.signatures.items()))
        documents |= {INDEX_FILE: self._of.index, HEADER_FILE: self._of.header}
        for path, data in documents.items():
            if not self._holds(path, data):
                self._store.put(path, data, label_of_bytes(data), self._throttle)
                self.sent += len(data)

    def tidy(self, *, prune: bool) -> tuple[str, ...]:
        """Forget interrupted uploads of this model's files; remove what no longer belongs."""
        known = {*self._of.files, *self._of.signatures, INDEX_FILE, HEADER_FILE}
        for path, uploads in self._pending.items():
            for upload in uploads:
                if path in known or prune:
                    upload.abort()
        if not prune:
            return ()
        removed = [
            item.path for item in self._store.names(recursive=True) if item.path not in known
        ]
        self._flow.all(removed, self._store.remove)
        return tuple(removed)

    def _send_missing(self, paths: list[str]) -> None:
        missing = []
        for path, there in self._flow.each(paths, self._is_there):
            size = self._of.files[path].size
            if there:
                self.present += size
                self._advance(size)
            else:
                missing.append(path)
        small = [path for path in missing if self._of.files[path].size <= PART]
        self._flow.all(small, self._send_small)
        large = [path for path in sorted(missing) if self._of.files[path].size > PART]
        self._send_large(large, fresh=False)

    def _is_there(self, path: str) -> bool:
        """Whether the store has this very file: by its label, or else by reading it."""
        file = self._of.files[path]
        found = self._store.stat(path)
        if found is None or found.size != file.size:
            return False
        if found.label is not None:
            return found.label == label_of(file)
        try:
            for first in range(0, len(file.pieces), PART // PIECE):
                count = min(PART // PIECE, len(file.pieces) - first)
                read_pieces(self._store, path, file, first, count)
        except Tampered:
            return False
        return True

    def _send_small(self, path: str) -> None:
        file = self._of.files[path]
        data = self._read(path, file, 0, file.size)
        self._store.put(path, data, label_of(file), self._throttle)
        self._count(len(data))

    def _send_large(self, paths: list[str], *, fresh: bool) -> None:
        """Send files in parts; ``fresh`` ignores what interrupted uploads have left."""
        transfers: dict[str, _Transfer] = {}
        left: dict[str, int] = {}

        def parts() -> Iterator[tuple[_Transfer, int]]:
            for path in paths:
                transfer = transfers[path] = self._begin(path, fresh=fresh)
                left[path] = len(transfer.parts)
                if not transfer.parts:
                    transfer.upload.complete(-(-transfer.file.size // transfer.part))
                for number in transfer.parts:
                    yield transfer, number

        for (transfer, _), _ in self._flow.each(parts(), self._send_part):
            left[transfer.path] -= 1
            if not left[transfer.path]:
                transfer.upload.complete(-(-transfer.file.size // transfer.part))
        again = [path for path, there in self._flow.each(paths, self._appeared) if not there]
        if again and fresh:
            raise PeerError(f"{again[0]} did not appear in {self._store.uri} as it was sent")
        if again:
            # A part of another file's upload under the same name; once more from the start.
            self._send_large(again, fresh=True)

    def _begin(self, path: str, *, fresh: bool) -> _Transfer:
        file = self._of.files[path]
        part = part_size(file.size)
        numbers = list(range(1, -(-file.size // part) + 1))
        uploads = [] if fresh else list(self._pending.get(path, []))
        while uploads:
            upload = uploads.pop()
            try:
                found = upload.found(file.size, part)
            except InputMissing:
                continue
            good = [n for n in numbers if n in found and self._same(path, n, part, found[n].md5)]
            if good and max(found) <= numbers[-1]:
                self._pending[path].remove(upload)
                self.resumed += sum(min(part, file.size - (n - 1) * part) for n in good)
                self._advance(sum(min(part, file.size - (n - 1) * part) for n in good))
                return _Transfer(path, file, upload, part, sorted({*numbers} - {*good}))
        return _Transfer(
            path, file, self._store.begin(path, file.size, label_of(file)), part, numbers
        )

    def _send_part(self, job: tuple[_Transfer, int]) -> None:
        transfer, number = job
        data = self._read(
            transfer.path, transfer.file, (number - 1) * transfer.part, transfer.part
        )
        transfer.upload.send(number, data, _md5(data), self._throttle)
        self._count(len(data))

    def _appeared(self, path: str) -> bool:
        """Whether a file that was sent is there: right size, and right label where there is one."""
        file, found = self._of.files[path], self._store.stat(path)
        return (
            found is not None
            and found.size == file.size
            and found.label in (None, label_of(file))
        )

    def _same(self, path: str, number: int, part: int, md5: str) -> bool:
        data = self._read(path, self._of.files[path], (number - 1) * part, part)
        return _md5(data).hex() == md5

    def _read(self, path: str, file: StoredFile, start: int, length: int) -> bytes:
        """A range of the sealed model, compared with the index before it goes anywhere."""
        length = min(length, file.size - start)
        return read_pieces(self._source, path, file, start // PIECE, -(-length // PIECE))

    def _holds(self, path: str, data: bytes) -> bool:
        found = self._store.stat(path)
        if found is None or found.size != len(data):
            return False
        if found.label is not None:
            return found.label == label_of_bytes(data)
        return self._store.read(path, 0, len(data)).data == data

    def _count(self, amount: int) -> None:
        self.sent += amount
        self._advance(amount)


def _md5(data: bytes) -> bytes:
    return hashlib.md5(data, usedforsecurity=False).digest()
