"""Sealing a tree: one pass over each file, everything or nothing (docs/spec-format.md §9).

What is refused, what a killed run left, and when the output appears are decided here; the work
itself is ``cai.model.sealer``'s.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from cai.errors import FormatError, InputMissing, Refused, UsageError
from cai.model.carrying import OlderRevision, swept
from cai.model.journal import Finished, Journal, read_journal
from cai.model.layout import (
    HEADER_FILE,
    INDEX_FILE,
    INLINE_SIZE,
    KEY_SIZE,
    MANIFEST_FILE,
    METHOD,
    OBJECTS_DIR,
    SIGNATURE_FILE,
)
from cai.model.manifest import Manifest
from cai.model.members import valid_flags
from cai.model.object import Shape
from cai.model.options import PICKLE_FLAG, SealOptions, SealReport
from cai.model.origins import PlainOrigin, SealedOrigin
from cai.model.pickles import HEAD, looks_like_pickle
from cai.model.progress import ProgressBar, silent
from cai.model.sealed import SealedModel
from cai.model.sealer import Job, Sealer
from cai.model.source import opened_source, require_directory
from cai.model.stage import Stage, leftovers, output_error, refuse_occupied
from cai.model.tree import Entry, EntryType
from cai.secret import Secret

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
            hint="'cai reseal' does it with its own writer",
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
            report = Sealer(job, stage.path, done, journal, advance).run()
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
