"""Sealing a tree: one pass over each file, everything or nothing (docs/spec-format.md §9).

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
from cai.errors import FormatError, InputMissing, Refused, UsageError
from cai.model.carrying import OlderRevision, swept
from cai.model.content import content_root
from cai.model.fleet import Fleet
from cai.model.header import DekKeys, Header, wrap_dek
from cai.model.index import StoredFile, encode_index, index_digest
from cai.model.journal import Finished, Journal, read_journal
from cai.model.lanes import BATCH, Lanes
from cai.model.layout import (
    DEFAULT_CHUNK,
    HEADER_FILE,
    INDEX_FILE,
    INLINE_SIZE,
    INLINE_TOTAL,
    KEY_SIZE,
    MANIFEST_FILE,
    METHOD,
    OBJECTS_DIR,
    SIGNATURE_FILE,
)
from cai.model.manifest import Inline, Manifest, Storage, Stored, model_root, pad
from cai.model.members import valid_flags
from cai.model.object import SALT_SIZE, Shape
from cai.model.options import PICKLE_FLAG, SealOptions, SealReport
from cai.model.origins import Origin, OriginFile, PlainOrigin, SealedOrigin
from cai.model.padding import padded_size
from cai.model.pickles import HEAD, looks_like_pickle
from cai.model.progress import ProgressBar, silent
from cai.model.sealed import SealedModel
from cai.model.source import opened_source, require_directory
from cai.model.stage import Stage, leftovers, output_error, refuse_occupied, write_file
from cai.model.tree import Entry, EntryType
from cai.model.writer import write_object
from cai.secret import Secret
from cai.terminal import Advance

BeforeCommit = Callable[[SealReport], None]


def seal(
    source: Path, out: Path, kek: Secret, *, options: SealOptions | None = None,
    progress: ProgressBar = silent, before_commit: BeforeCommit | None = None,
    against: SealedModel | None = None, journal: Secret | None = None,
    sign: Callable[[str], bytes] | None = None,
    review: Callable[[Manifest], None] | None = None, resume: bool = True,
) -> SealReport:
    """Seal the tree at ``source`` into the directory ``out``.

    What a run that was killed had finished for the same output is taken up, when its journal opens
    and every byte of it is whole.

    Args:
        source: the plain tree.
        out: where the sealed model shall appear; missing or an empty directory.
        kek: the key-encryption key, 32 bytes.
        options: what a writer may choose.
        progress: shows the plaintext bytes done.
        before_commit: called when everything is written and before it appears, so that a key is
            safe before its model exists; what it raises undoes the sealing.
        against: an older revision, opened; what did not change since is not written again. The new
            one is its next revision, unless ``options`` name a model and revision.
        journal: what the journal is encrypted under, the KEK itself unless told otherwise; the KEK
            is then in the journal (``interrupted_kek``).
        sign: gives the bytes of ``manifest.sig`` for the model root.
        review: called with the manifest before it is written; what it raises undoes the sealing.
        resume: take up what a killed run left; else remove it.

    Returns:
        What was sealed.

    Raises:
        UsageError: ``out`` is inside ``source``, or occupied.
        InputMissing, InputError: the source is missing or cannot be sealed.
        Refused: it holds a Python pickle and ``allow`` does not hold ``pickle``.
        LimitExceeded: more than the format holds.
        Tampered: the index of ``against`` is not what was sealed.
        StorageError, NoSpace: the file system refused.
    """
    chosen = options or SealOptions()
    _check_options(chosen, kek)
    check_places(source, out)
    origin = PlainOrigin(source)
    entries = origin.scan()
    if PICKLE_FLAG not in chosen.allow:
        refuse_pickles(source, entries)
    older = None
    if against is not None:
        if against.header.method != METHOD:
            raise UsageError(f"objects of method {against.header.method} are not carried over")
        if not chosen.model_id:
            chosen = following(against, chosen)
        older = OlderRevision(against)
    job = Job(origin, entries, kek, chosen, older, journal, sign, review)
    return _run(job, out, progress, before_commit, resume=resume)


def reseal(
    model: SealedModel, out: Path, kek: Secret, *, options: SealOptions | None = None,
    progress: ProgressBar = silent, before_commit: BeforeCommit | None = None,
    journal: Secret | None = None, sign: Callable[[str], bytes] | None = None,
) -> SealReport:
    """Seal an opened model anew, as its next revision: new data key, new object keys, all new.

    Plaintext goes through memory only. What the manifest says of the model stays; of ``options``
    count chunk, padding, time and workers.

    Args:
        model: the sealed model; all of it is verified on the way.
        out: where the new one shall appear.
        kek: what wraps the new data key; the old one's or another.
        options: what a writer may choose.
        progress: shows the plaintext bytes done.
        before_commit: as in ``seal``.
        journal: as in ``seal``.
        sign: as in ``seal``.

    Raises:
        UsageError: ``out`` is inside the sealed model, or occupied.
        Tampered: something is not what was sealed; nothing has appeared.
        StorageError, NoSpace: the file system refused.
    """
    if model.header.method != METHOD:
        raise UsageError(
            f"a model of method {model.header.method} is not resealed",
            hint="decrypt it and seal it again",
        )
    manifest, directory = model.manifest, model.files.directory
    place = out.parent.resolve() / out.name
    if directory is not None and directory.resolve() in (place, *place.parents):
        raise UsageError(f"the output {out} is inside the sealed model {directory}")
    refuse_occupied(out)
    chosen = replace(
        following(model, options or SealOptions()), name=manifest.name, licence=manifest.licence,
        allow=manifest.allow, provenance=manifest.provenance,
    )
    if any(item.shape.size > max(INLINE_SIZE, model.entries[path].size)
           for path, item in manifest.stored.items()):
        chosen = replace(chosen, pad=True)
    _check_options(chosen, kek)
    origin = SealedOrigin(model)
    job = Job(origin, origin.scan(), kek, chosen, None, journal, sign)
    return _run(job, out, progress, before_commit)


def following(model: SealedModel, options: SealOptions) -> SealOptions:
    """Options for the revision that follows an opened one."""
    return replace(
        options, model_id=model.model_id, revision=model.revision + 1, previous=model.root
    )


def interrupted_kek(out: Path, journal: Secret) -> Secret | None:
    """The KEK that a killed run for this output had made and kept in its journal, if any."""
    held = [kek for kek, _ in _journals(out, journal) if kek is not None]
    return held[0] if held else None


def was_interrupted(out: Path, journal: Secret) -> bool:
    """Whether a killed run for this output left a journal under this secret."""
    return bool(_journals(out, journal))


def _journals(out: Path, secret: Secret) -> list[tuple[Secret | None, list[Finished]]]:
    found: list[tuple[Secret | None, list[Finished]]] = []
    for path, handle in leftovers(out.parent.resolve() / out.name):
        held = read_journal(path, secret)
        os.close(handle)
        if held is not None:
            found.append(held)
    return found


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


def _run(
    job: Job, out: Path, progress: ProgressBar, before_commit: BeforeCommit | None, *,
    resume: bool = True,
) -> SealReport:
    finished: list[Finished] = []

    def adopt(directory: Path) -> bool:
        held = read_journal(directory, job.journal or job.kek) if resume else None
        if held is not None:
            finished.extend(held[1])
        return held is not None

    total = sum(entry.size for entry in job.entries if entry.type is EntryType.FILE)
    with Stage(out, adopt=adopt) as stage, progress("seal", total) as advance:
        try:
            done = _prepared(stage.path, finished)
            journal = Journal(
                stage.path, job.journal or job.kek, finished=done.values(),
                kek=job.kek if job.journal else None,
            )
        except OSError as error:
            raise output_error(error, f"create {out}") from error
        try:
            report = _Sealing(job, stage.path, done, journal, advance).run()
            if before_commit is not None:
                before_commit(report)
            stage.commit(last=journal.remove)
        except OSError as error:
            raise output_error(error, f"write {out}") from error
        finally:
            journal.close()
    return report


def _prepared(directory: Path, finished: list[Finished]) -> dict[str, Finished]:
    """An empty ``objects``, or one that holds exactly what is whole of a dead run."""
    for name in (HEADER_FILE, INDEX_FILE, MANIFEST_FILE, SIGNATURE_FILE):
        (directory / name).unlink(missing_ok=True)
    (directory / OBJECTS_DIR).mkdir(mode=0o755, exist_ok=True)
    return swept(directory, finished)


@dataclass(frozen=True, slots=True)
class _Planned:
    """One file that becomes an object, with the random values drawn for it."""

    entry: Entry
    shape: Shape
    name: str
    key: bytes = field(repr=False)
    salt: bytes


class _Sealing:
    """One run: collects entries and index while it writes."""

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


def _check_options(options: SealOptions, kek: Secret) -> None:
    if len(kek) != KEY_SIZE:
        raise FormatError(f"the key has {len(kek)} bytes, expected {KEY_SIZE}")
    if not valid_flags(list(options.allow)):
        raise UsageError(f"allow flags {list(options.allow)} are not sorted, different flags")
    Shape(1, options.chunk)


def check_places(source: Path, out: Path) -> None:
    """Check what can be checked before anything is read.

    Raises:
        InputMissing, InputError: the source is missing or is not a directory.
        UsageError: ``out`` is inside it, or occupied.
    """
    require_directory(source)
    inside, outside = out.parent.resolve() / out.name, source.resolve()
    if inside == outside or outside in inside.parents:
        raise UsageError(
            f"the output {out} is inside the model {source}",
            hint="choose an output outside of it with -o",
        )
    refuse_occupied(out)


def refuse_pickles(source: Path, entries: list[Entry]) -> None:
    """Refuse a tree that holds a Python pickle, by the content of its files.

    Raises:
        Refused: naming the file.
        InputMissing, InputError, StorageError: as ``opened_source``.
    """
    for entry in entries:
        if entry.type is not EntryType.FILE:
            continue
        head = bytearray(min(HEAD, entry.size))
        try:
            with opened_source(source, entry) as file:
                file.readinto(0, memoryview(head))
        except InputMissing as error:
            raise InputMissing(f"{source / entry.path} vanished while it was read") from error
        if looks_like_pickle(bytes(head)):
            raise Refused(
                f"{source / entry.path} is a Python pickle, which runs code when it is loaded",
                code="pickle", hint="convert it to safetensors, or give --allow-pickle",
            )
