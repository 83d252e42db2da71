"""``pull``: a sealed model out of a store, without its key (docs/stores.md).

Everything is made in ``OUT.partial-pull`` beside OUT and appears by one rename, or by one exchange
where OUT holds an older revision. Whatever of it is already on this disk (in OUT, or left by a pull
that was killed) is compared with the index piece by piece and not fetched again; nothing else is
remembered. No byte is written that does not have the digest that the index demands.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from cai.errors import NoSpace
from cai.model.layout import HEADER_FILE, INDEX_FILE, PIECE
from cai.model.progress import ProgressBar, silent
from cai.model.stage import output_error, write_all
from cai.store.base import PART, Store
from cai.store.copies import (
    files_below,
    linked,
    missing_pieces,
    open_file,
    piece_length,
    same_file,
    size_of,
    unshare,
)
from cai.store.flow import Flow
from cai.store.place import Partial, refuse_other
from cai.store.publication import Publication, read_pieces, read_publication
from cai.store.throttle import Throttle
from cai.terminal import Advance


@dataclass(frozen=True, slots=True)
class PullReport:
    """What a pull did.

    Attributes:
        uri: where the model came from.
        out: where it is.
        model_id: hex; a claim until the model is opened with its key.
        revision: likewise.
        index_sha256: of the index that everything was compared with, hex.
        authenticated: that index was demanded by the caller; else the pull is complete, but what
            it is complete in regard to came from the store itself.
        files: listed files.
        total_bytes: of the listed files.
        fetched_bytes: that travelled now.
    """

    uri: str
    out: str
    model_id: str
    revision: int
    index_sha256: str
    authenticated: bool
    files: int
    total_bytes: int
    fetched_bytes: int

    def to_json(self) -> dict[str, object]:
        """The report as ``--json`` prints it."""
        return asdict(self)


def pull(
    store: Store, out: Path, *, index_sha256: str | None = None, workers: int = 0, rate: int = 0,
    progress: ProgressBar = silent,
) -> PullReport:
    """Fetch a sealed model.

    Args:
        store: where it is.
        out: where it shall be: nothing, an empty directory, or another revision of this model.
        index_sha256: the index to insist on (from the release record), hex.
        workers: transfers at once; 0 for the usual number.
        rate: bytes a second for all of them together; 0 for no limit.
        progress: shows the bytes done.

    Raises:
        Tampered: what the store holds is not what the index lists, or not the demanded index.
        InputError, FormatError: the store holds no sealed model.
        UsageError: OUT holds something else, or another pull is running.
        PeerError, StorageError, NoSpace: the store or the disk fails; the next pull continues.
    """
    publication = read_publication(store, index_sha256)
    place = out.parent.resolve() / out.name
    refuse_other(place, publication.model_id)
    throttle = Throttle(rate)
    with Partial(place) as partial, Flow(workers, throttle.stop) as flow:
        with progress("pull", publication.total) as advance:
            run = _Pull(store, publication, place, partial.path, throttle, advance)
            run.prepare(flow)
            run.fetch(flow)
        if run.is_complete():
            partial.discard()
        else:
            run.write_documents()
            flow.all(publication.files, run.sync)
            partial.commit()
    return PullReport(
        store.uri, str(out), publication.model_id, publication.revision, publication.index_sha256,
        publication.authenticated, len(publication.files), publication.total, run.fetched,
    )


class _Pull:
    def __init__(
        self, store: Store, publication: Publication, out: Path, partial: Path, throttle: Throttle,
        advance: Advance,
    ) -> None:
        self._store, self._of, self._out, self._partial = store, publication, out, partial
        self._throttle, self._advance = throttle, advance
        self._missing: dict[str, list[int]] = {}
        self._from_out: set[str] = set()
        self.fetched = 0

    def prepare(self, flow: Flow) -> None:
        """Find out which pieces are here, in the partial directory or in OUT."""
        try:
            self._remove_strangers()
            for folder in self._of.folders:
                (self._partial / folder).mkdir(parents=True, exist_ok=True)
            for path, text in self._of.links.items():
                (self._partial / path).symlink_to(text)
        except OSError as error:
            raise output_error(error, f"write {self._partial}") from error
        for path, missing in flow.each(self._of.files, self._adopt):
            self._missing[path] = missing
            listed = self._of.files[path]
            self._advance(listed.size - sum(piece_length(listed, number) for number in missing))
        wanted = sum(
            piece_length(self._of.files[path], number)
            for path, missing in self._missing.items() for number in missing
        )
        room = os.statvfs(self._partial)
        if wanted > room.f_bavail * room.f_frsize:
            raise NoSpace(
                f"{wanted} bytes are still to be fetched, {self._partial.parent} has no room "
                "for them", hint="free some space or choose another place",
            )

    def fetch(self, flow: Flow) -> None:
        """Fetch what is missing."""
        flow.all(self._runs(), self._fetch_run)

    def is_complete(self) -> bool:
        """Whether OUT holds exactly this revision already."""
        documents = {HEADER_FILE: self._of.header, INDEX_FILE: self._of.index}
        documents |= self._of.signatures
        if self._from_out != set(self._of.files):
            return False
        try:
            same = all(
                (self._out / path).read_bytes() == data for path, data in documents.items()
            )
            whole = {*documents, *self._of.files, *self._of.links}
            links = all(
                str((self._out / path).readlink()) == text for path, text in self._of.links.items()
            )
            return same and links and files_below(self._out) == whole
        except OSError:
            return False

    def write_documents(self) -> None:
        """Write signatures, index and header."""
        documents = {**self._of.signatures, INDEX_FILE: self._of.index}
        for path, data in (documents | {HEADER_FILE: self._of.header}).items():
            try:
                handle = open_file(self._partial / path, os.O_CREAT | os.O_EXCL)
                try:
                    write_all(handle, [memoryview(data)], 0)
                    os.fsync(handle)
                finally:
                    os.close(handle)
            except OSError as error:
                raise output_error(error, f"write {path}") from error

    def sync(self, path: str) -> None:
        """Make a file durable."""
        try:
            handle = open_file(self._partial / path, 0)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            raise output_error(error, f"write {path}") from error

    def _remove_strangers(self) -> None:
        """Remove from the partial directory what no file of this revision can continue."""
        for folder, names, files in os.walk(self._partial, topdown=False):
            base = Path(folder)
            for name in [*names, *files]:
                path = base / name
                relative = path.relative_to(self._partial).as_posix()
                mode = path.lstat().st_mode
                if stat.S_ISDIR(mode):
                    if not any(path.iterdir()):
                        path.rmdir()
                elif relative not in self._of.files or not stat.S_ISREG(mode):
                    path.unlink()

    def _adopt(self, path: str) -> list[int]:
        """Bring what is here of a file into the partial directory; returns the missing pieces."""
        listed = self._of.files[path]
        target, old = self._partial / path, self._out / path
        try:
            missing = missing_pieces(target, listed)
            if not missing and size_of(target) == listed.size:
                if same_file(target, old):
                    self._from_out.add(path)
                return []
            old_missing = missing_pieces(old, listed)
            if not old_missing and size_of(old) == listed.size:
                target.unlink(missing_ok=True)
                if linked(old, target):
                    self._from_out.add(path)
                else:
                    shutil.copyfile(old, target)
                return []
            if len(old_missing) < len(missing):
                target.unlink(missing_ok=True)
                shutil.copyfile(old, target)
                missing = old_missing
            elif size_of(target) >= 0 and target.stat().st_nlink > 1:
                unshare(target)  # never repair a file that OUT shares
            handle = open_file(target, os.O_CREAT)
            try:
                if os.fstat(handle).st_size != listed.size:
                    os.ftruncate(handle, listed.size)
            finally:
                os.close(handle)
        except OSError as error:
            raise output_error(error, f"write {target}") from error
        return missing

    def _runs(self) -> Iterator[tuple[str, int, int]]:
        """Missing pieces as (path, first, count), neighbours together."""
        for path, missing in self._missing.items():
            first = count = 0
            for number in missing:
                if count and number == first + count and count < PART // PIECE:
                    count += 1
                    continue
                if count:
                    yield path, first, count
                first, count = number, 1
            if count:
                yield path, first, count

    def _fetch_run(self, run: tuple[str, int, int]) -> None:
        path, first, count = run
        data = read_pieces(
            self._store, path, self._of.files[path], first, count, self._throttle
        )
        try:
            handle = open_file(self._partial / path, 0)
            try:
                write_all(handle, [memoryview(data)], first * PIECE)
            finally:
                os.close(handle)
        except OSError as error:
            raise output_error(error, f"write {path}") from error
        self.fetched += len(data)
        self._advance(len(data))
