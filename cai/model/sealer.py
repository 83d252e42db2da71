"""One run of sealing: plan, objects side by side, manifest, index, header (docs/spec-format.md §9).

Files are sealed side by side, each by threads of its own: SHA-256 goes through a file in order and
is what limits one file's speed. Every random value is drawn before the first file, in the order of
the entries, so that the order of work does not show in the bytes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

from cai import __version__
from cai.model.carrying import OlderRevision
from cai.model.content import content_root
from cai.model.fleet import Fleet
from cai.model.header import DekKeys, Header, wrap_dek
from cai.model.index import StoredFile, encode_index, index_digest
from cai.model.journal import Finished, Journal
from cai.model.lanes import BATCH, Lanes
from cai.model.layout import (
    DEFAULT_CHUNK,
    HEADER_FILE,
    INDEX_FILE,
    INLINE_SIZE,
    INLINE_TOTAL,
    KEY_SIZE,
    MANIFEST_FILE,
    OBJECTS_DIR,
    SIGNATURE_FILE,
)
from cai.model.manifest import Inline, Manifest, Storage, Stored, model_root, pad
from cai.model.object import SALT_SIZE, Shape
from cai.model.options import SealOptions, SealReport
from cai.model.origins import Origin, OriginFile
from cai.model.padding import padded_size
from cai.model.stage import write_file
from cai.model.tree import Entry, EntryType
from cai.model.writer import write_object
from cai.secret import Secret
from cai.terminal import Advance


@dataclass(frozen=True, slots=True)
class Job:
    """One sealing: what, how, and under which key."""

    origin: Origin
    entries: list[Entry]
    kek: Secret
    options: SealOptions
    older: OlderRevision | None = None
    journal: Secret | None = None
    sign: Callable[[str], bytes] | None = None
    review: Callable[[Manifest], None] | None = None


@dataclass(frozen=True, slots=True)
class _Planned:
    """One file that becomes an object, with the random values drawn for it."""

    entry: Entry
    shape: Shape
    name: str
    key: bytes = field(repr=False)
    salt: bytes


class Sealer:
    """One run: collects entries and index while it writes.

    Args:
        job: what is sealed, and how.
        target: the directory in the making; ``objects`` is there.
        resumable: whole objects of a killed run, by the path of their file.
        journal: gets every object that is on the disk.
        advance: gets the plaintext bytes done.
    """

    def __init__(
        self, job: Job, target: Path, resumable: dict[str, Finished], journal: Journal,
        advance: Advance,
    ) -> None:
        self._job, self._options, self._origin = job, job.options, job.origin
        self._target, self._journal, self._advance = target, journal, advance
        self._resumable = resumable
        self._random = job.options.unsafe_entropy or os.urandom
        self._index: dict[str, StoredFile] = {}
        self._sealed: dict[str, Entry] = {}
        self._storage: dict[str, Storage] = {}
        self._counts = {"carried": 0, "resumed": 0, "written": 0}
        self._lock = threading.Lock()

    def run(self) -> SealReport:
        """Write everything into the target; errors as ``cai.model.sealing.seal``."""
        # The order of the draws is part of the vectors (§9).
        model_id = self._options.model_id or self._random(32).hex()
        dek = self._random(KEY_SIZE)
        nonce = self._random(12)
        planned = self._plan()
        with Fleet(len(planned), self._options.workers) as self._fleet:
            # The largest first, so that none is left alone at the end.
            self._fleet.each(sorted(planned, key=lambda plan: -plan.entry.size), self._object)
            self._drop_unused()
            manifest = self._manifest(model_id)
            if self._job.review is not None:
                self._job.review(manifest)
            canonical = manifest.encode()
            keys = DekKeys.of(dek, model_id)
            shape, digest = self._write_manifest(
                pad(canonical), keys.manifest_key, self._fleet.lanes()
            )
        index = encode_index(self._index)
        write_file(self._target / INDEX_FILE, index)
        revision = self._options.revision
        header = Header(
            model_id, revision,
            wrap_dek(dek, self._job.kek, model_id=model_id, revision=revision, nonce=nonce),
            keys.commitment, shape, digest, index_digest(index), len(index),
        )
        header_bytes = replace(header, mac=keys.mac(header)).encode()
        write_file(self._target / HEADER_FILE, header_bytes)
        if self._job.sign is not None:
            signature = self._job.sign(model_root(canonical))
            write_file(self._target / SIGNATURE_FILE, signature)
        return self._report(manifest, canonical, index, len(header_bytes))

    def _plan(self) -> list[_Planned]:
        """Decide for each file where it goes (§5.3); the small ones are read at once."""
        planned: list[_Planned] = []
        inline_bytes = 0
        for entry in self._job.entries:
            self._sealed[entry.path] = entry
            if entry.type is not EntryType.FILE:
                continue
            small = entry.size <= INLINE_SIZE
            if small and inline_bytes + entry.size <= INLINE_TOTAL:
                inline_bytes += entry.size
                self._inline(entry)
                continue
            size = INLINE_SIZE if small else entry.size
            shape = Shape(padded_size(size) if self._options.pad else size, self._options.chunk)
            name, key, salt = self._random(16), self._random(KEY_SIZE), self._random(SALT_SIZE)
            planned.append(_Planned(entry, shape, name.hex(), key, salt))
        return planned

    def _object(self, plan: _Planned, lanes: Lanes) -> None:
        entry = plan.entry
        with self._origin.opened(entry) as file:
            done = self._resumable.get(entry.path)
            kind = "resumed"
            if done is None or (done.state, done.stored.shape) != (file.state, plan.shape):
                done = self._carried(plan, file)
                kind = "carried"
            if done is None:
                done = self._written(plan, file, lanes)
                kind = "written"
            else:
                self._advance(entry.size)
        self._origin.verify(entry, done.sha256)
        if kind != "resumed":
            self._journal.add(done)
        with self._lock:
            self._counts[kind] += 1 if kind != "written" else done.listed.size
            self._sealed[entry.path] = replace(entry, sha256=done.sha256)
            self._storage[entry.path] = done.stored
            self._index[f"{OBJECTS_DIR}/{done.stored.name}"] = done.listed

    def _carried(self, plan: _Planned, file: OriginFile) -> Finished | None:
        """The object of an older revision, when it has this very content."""
        older, entry = self._job.older, plan.entry
        if older is None or not older.may_have(entry.size, plan.shape):
            return None
        digest = self._digest(file, entry.size)
        place = older.take(entry.size, plan.shape, digest, self._target)
        return None if place is None else Finished(entry.path, file.state, digest, *place)

    def _digest(self, file: OriginFile, size: int) -> str:
        digest, room = sha256(), memoryview(bytearray(min(BATCH, size)))
        for offset in range(0, size, BATCH):
            part = room[: min(BATCH, size - offset)]
            self._read(file, offset, part)
            digest.update(part)
        return digest.hexdigest()

    def _written(self, plan: _Planned, file: OriginFile, lanes: Lanes) -> Finished:
        entry, digest = plan.entry, sha256()

        def read(offset: int, view: memoryview) -> None:
            held = view[: max(0, entry.size - offset)]
            self._read(file, offset, held)
            view[len(held) :] = bytes(len(view) - len(held))

        def done(offset: int, plain: memoryview) -> None:
            held = plain[: max(0, entry.size - offset)]
            digest.update(held)
            self._advance(len(held))
            file.forget(offset, len(held))

        object_digest, listed = write_object(
            self._target / OBJECTS_DIR / plan.name, plan.shape, plan.key, plan.salt, lanes,
            read=read, done=done,
        )
        stored = Stored(plan.name, plan.key, object_digest, plan.shape)
        return Finished(entry.path, file.state, digest.hexdigest(), stored, listed)

    def _read(self, file: OriginFile, offset: int, view: memoryview) -> None:
        self._fleet.keep_on()
        file.readinto(offset, view)

    def _inline(self, entry: Entry) -> None:
        content = bytearray(entry.size)
        with self._origin.opened(entry) as file:
            file.readinto(0, memoryview(content))
        digest = sha256(content).hexdigest()
        self._origin.verify(entry, digest)
        self._advance(entry.size)
        self._sealed[entry.path] = replace(entry, sha256=digest)
        self._storage[entry.path] = Inline(bytes(content))

    def _drop_unused(self) -> None:
        """Remove what a dead run had finished of files that are others now, or are gone."""
        for done in self._resumable.values():
            if f"{OBJECTS_DIR}/{done.stored.name}" not in self._index:
                (self._target / OBJECTS_DIR / done.stored.name).unlink()

    def _write_manifest(self, padded: bytes, key: bytes, lanes: Lanes) -> tuple[Shape, str]:
        shape = Shape(len(padded), DEFAULT_CHUNK)
        source = memoryview(padded)

        def read(offset: int, view: memoryview) -> None:
            view[:] = source[offset : offset + len(view)]

        digest, self._index[MANIFEST_FILE] = write_object(
            self._target / MANIFEST_FILE, shape, key, self._random(SALT_SIZE), lanes,
            read=read, done=lambda _offset, _plain: None,
        )
        return shape, digest

    def _manifest(self, model_id: str) -> Manifest:
        options = self._options
        created = (options.created or datetime.now(UTC)).astimezone(UTC)
        manifest = Manifest(
            model_id=model_id, revision=options.revision, previous=options.previous,
            content_root=content_root(self._sealed.values()), name=options.name,
            created=created.strftime("%Y-%m-%dT%H:%M:%SZ"), allow=options.allow,
            licence=options.licence,
            provenance={"tool": f"cai {__version__}"} | dict(options.provenance),
            entries=self._sealed, storage=self._storage,
        )
        # A writer never makes what its own reader refuses.
        Manifest.parse(manifest.encode())
        return manifest

    def _report(
        self, manifest: Manifest, canonical: bytes, index: bytes, header_size: int
    ) -> SealReport:
        kinds = [entry.type for entry in manifest.entries.values()]
        stored = sum(file.size for file in self._index.values()) + len(index) + header_size
        return SealReport(
            model_id=manifest.model_id, revision=manifest.revision,
            root=model_root(canonical), content_root=manifest.content_root,
            index_sha256=index_digest(index), allow=manifest.allow,
            files=kinds.count(EntryType.FILE), directories=kinds.count(EntryType.DIRECTORY),
            symlinks=kinds.count(EntryType.SYMLINK), objects=len(manifest.stored),
            plaintext_bytes=sum(
                e.size for e in manifest.entries.values() if e.type is EntryType.FILE
            ),
            stored_bytes=stored, carried=self._counts["carried"], resumed=self._counts["resumed"],
            written_bytes=self._counts["written"] + self._index[MANIFEST_FILE].size + len(index)
            + header_size,
        )
