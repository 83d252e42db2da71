"""Sealing a plain tree: one pass over each file, everything or nothing (docs/spec-format.md §9)."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

from cai import __version__
from cai.errors import FormatError, InputMissing, Refused, UsageError
from cai.model.content import content_root
from cai.model.header import DekKeys, Header, wrap_dek
from cai.model.index import StoredFile, encode_index, index_digest
from cai.model.lanes import Lanes
from cai.model.layout import (
    DEFAULT_CHUNK,
    HEADER_FILE,
    INDEX_FILE,
    INLINE_SIZE,
    INLINE_TOTAL,
    KEY_SIZE,
    MANIFEST_FILE,
    OBJECTS_DIR,
)
from cai.model.manifest import Inline, Manifest, Storage, Stored, model_root, pad
from cai.model.members import valid_flags
from cai.model.object import SALT_SIZE, Shape
from cai.model.options import PICKLE_FLAG, SealOptions, SealReport
from cai.model.pickles import HEAD, looks_like_pickle
from cai.model.progress import ProgressBar, silent
from cai.model.source import opened_source, require_directory, scan
from cai.model.stage import Stage, output_error, refuse_occupied, write_file
from cai.model.tree import Entry, EntryType
from cai.model.writer import write_object
from cai.secret import Secret
from cai.terminal import Advance


def seal(
    source: Path, out: Path, kek: Secret, *, options: SealOptions | None = None,
    progress: ProgressBar = silent, before_commit: Callable[[SealReport], None] | None = None,
) -> SealReport:
    """Seal the tree at ``source`` into the directory ``out``.

    Args:
        source: the plain tree.
        out: where the sealed model shall appear; missing or an empty directory.
        kek: the key-encryption key, 32 bytes.
        options: what a writer may choose.
        progress: shows the plaintext bytes done.
        before_commit: called when everything is written and before it appears, so that a key is
            safe before its model exists; what it raises undoes the sealing.

    Returns:
        What was sealed.

    Raises:
        UsageError: ``out`` is inside ``source``, or occupied.
        InputMissing, InputError: the source is missing or cannot be sealed.
        Refused: it holds a Python pickle and ``allow`` does not hold ``pickle``.
        LimitExceeded: more than the format holds.
        StorageError, NoSpace: the file system refused.
    """
    chosen = options or SealOptions()
    _check_options(chosen, kek)
    check_places(source, out)
    entries = scan(source)
    if PICKLE_FLAG not in chosen.allow:
        _refuse_pickles(source, entries)
    total = sum(entry.size for entry in entries if entry.type is EntryType.FILE)
    with (
        Stage(out) as stage,
        Lanes(chosen.workers) as lanes,
        progress("seal", total) as advance,
    ):
        report = _Sealing(source, stage.path, kek, chosen, lanes, advance).run(entries)
        if before_commit is not None:
            before_commit(report)
        stage.commit()
    return report


class _Sealing:
    """One run: collects entries and index while it writes."""

    def __init__(
        self, source: Path, target: Path, kek: Secret, options: SealOptions, lanes: Lanes,
        advance: Advance,
    ) -> None:
        self._source, self._target, self._kek = source, target, kek
        self._options, self._lanes, self._advance = options, lanes, advance
        self._random = options.unsafe_entropy or os.urandom
        self._index: dict[str, StoredFile] = {}
        self._inline_bytes = 0

    def run(self, entries: list[Entry]) -> SealReport:
        # The order of the draws is part of the vectors (§9).
        model_id = self._options.model_id or self._random(32).hex()
        dek = self._random(KEY_SIZE)
        nonce = self._random(12)
        try:
            (self._target / OBJECTS_DIR).mkdir(mode=0o755)
        except OSError as error:
            raise output_error(error, f"create {OBJECTS_DIR}") from error
        sealed: dict[str, Entry] = {}
        storage: dict[str, Storage] = {}
        for entry in entries:
            sealed[entry.path] = entry
            if entry.type is EntryType.FILE:
                sealed[entry.path], storage[entry.path] = self._file(entry)
        manifest = self._manifest(model_id, sealed, storage)
        canonical = manifest.encode()
        keys = DekKeys.of(dek, model_id)
        shape, digest = self._write_manifest(pad(canonical), keys.manifest_key)
        index = encode_index(self._index)
        write_file(self._target / INDEX_FILE, index)
        revision = self._options.revision
        header = Header(
            model_id, revision,
            wrap_dek(dek, self._kek, model_id=model_id, revision=revision, nonce=nonce),
            keys.commitment, shape, digest, index_digest(index), len(index),
        )
        header_bytes = replace(header, mac=keys.mac(header)).encode()
        write_file(self._target / HEADER_FILE, header_bytes)
        return self._report(manifest, canonical, index, len(header_bytes))

    def _file(self, entry: Entry) -> tuple[Entry, Storage]:
        inline = entry.size <= INLINE_SIZE
        if inline and self._inline_bytes + entry.size <= INLINE_TOTAL:
            return self._inline(entry)
        name, key, salt = self._random(16).hex(), self._random(KEY_SIZE), self._random(SALT_SIZE)
        shape = Shape(INLINE_SIZE if inline else entry.size, self._options.chunk)
        digest = sha256()
        with opened_source(self._source, entry) as file:

            def read(offset: int, view: memoryview) -> None:
                held = view[: max(0, entry.size - offset)]
                file.readinto(offset, held)
                view[len(held) :] = bytes(len(view) - len(held))

            def done(offset: int, plain: memoryview) -> None:
                held = plain[: max(0, entry.size - offset)]
                digest.update(held)
                self._advance(len(held))
                file.forget(offset, len(held))

            stored = f"{OBJECTS_DIR}/{name}"
            object_digest, self._index[stored] = write_object(
                self._target / stored, shape, key, salt, self._lanes, read=read, done=done
            )
        return (
            replace(entry, sha256=digest.hexdigest()),
            Stored(name, key, object_digest, shape),
        )

    def _inline(self, entry: Entry) -> tuple[Entry, Storage]:
        content = bytearray(entry.size)
        with opened_source(self._source, entry) as file:
            file.readinto(0, memoryview(content))
        self._inline_bytes += entry.size
        self._advance(entry.size)
        return replace(entry, sha256=sha256(content).hexdigest()), Inline(bytes(content))

    def _write_manifest(self, padded: bytes, key: bytes) -> tuple[Shape, str]:
        shape = Shape(len(padded), DEFAULT_CHUNK)
        source = memoryview(padded)

        def read(offset: int, view: memoryview) -> None:
            view[:] = source[offset : offset + len(view)]

        digest, self._index[MANIFEST_FILE] = write_object(
            self._target / MANIFEST_FILE, shape, key, self._random(SALT_SIZE), self._lanes,
            read=read, done=lambda _offset, _plain: None,
        )
        return shape, digest

    def _manifest(
        self, model_id: str, entries: dict[str, Entry], storage: dict[str, Storage]
    ) -> Manifest:
        options = self._options
        created = (options.created or datetime.now(UTC)).astimezone(UTC)
        manifest = Manifest(
            model_id=model_id, revision=options.revision, previous=options.previous,
            content_root=content_root(entries.values()), name=options.name,
            created=created.strftime("%Y-%m-%dT%H:%M:%SZ"), allow=options.allow,
            licence=options.licence,
            provenance={"tool": f"cai {__version__}"} | dict(options.provenance),
            entries=entries, storage=storage,
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
            stored_bytes=stored,
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


def _refuse_pickles(source: Path, entries: list[Entry]) -> None:
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
