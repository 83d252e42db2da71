"""Writing a sealed model's plain tree back, verified, whole or not at all (docs/spec-format.md)."""

from __future__ import annotations

import os
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

from cai.errors import Tampered, UsageError
from cai.model.gocryptfs.model import CipherModel
from cai.model.gocryptfs.unsealing import unseal_gocryptfs
from cai.model.lanes import Lanes, opened
from cai.model.layout import MANIFEST_FILE
from cai.model.manifest import Inline, Stored
from cai.model.progress import ProgressBar, silent
from cai.model.sealed import SealedModel
from cai.model.stage import Stage, new_file, output_error, write_all
from cai.model.tree import Entry, EntryType
from cai.terminal import Advance


def unseal(
    model: SealedModel, out: Path, *, workers: int = 0, progress: ProgressBar = silent
) -> int:
    """Write the plain tree of an opened model into ``out``, a directory of mode 0700.

    Modes are those that were sealed. Links are made last, so that no file is ever written through
    one.

    Returns:
        Plaintext bytes written.

    Raises:
        UsageError: ``out`` is inside the sealed model, or is there already and is not an empty
            directory.
        Tampered: something is not what was sealed; nothing has appeared.
        StorageError, NoSpace: the file system refused.
    """
    if isinstance(model, CipherModel):
        return unseal_gocryptfs(model, out, workers=workers, progress=progress)
    place = out.parent.resolve() / out.name
    sealed = model.files.directory
    if sealed is not None and sealed.resolve() in (place, *place.parents):
        raise UsageError(f"the output {out} is inside the sealed model {sealed}")
    entries = list(model.entries.values())
    total = sum(entry.size for entry in entries if entry.type is EntryType.FILE)
    with (
        Stage(out, mode=0o700) as stage,
        Lanes(workers) as lanes,
        progress("decrypt", total) as advance,
    ):
        current = str(out)
        try:
            for entry in entries:
                current, target = entry.path, stage.path / entry.path
                if entry.type is EntryType.DIRECTORY:
                    target.mkdir(mode=0o700)
                elif entry.type is EntryType.FILE:
                    _write_file(model, entry, target, lanes, advance)
            for entry in entries:
                if entry.type is EntryType.SYMLINK:
                    current = entry.path
                    (stage.path / entry.path).symlink_to(entry.target)
            # Children first: a directory may forbid its owner to write or even to look inside.
            for entry in reversed(entries):
                if entry.type is EntryType.DIRECTORY:
                    current = entry.path
                    _finish_directory(stage.path / entry.path, entry.mode)
        except OSError as error:
            raise output_error(error, f"write {current!r}") from error
        stage.commit(folders_synced=True)
    return total


def _write_file(
    model: SealedModel, entry: Entry, target: Path, lanes: Lanes, advance: Advance
) -> None:
    fd = new_file(target, mode=0o600)
    try:
        digest = sha256()
        storage = model.manifest.storage[entry.path]
        stored = MANIFEST_FILE
        if isinstance(storage, Inline):
            digest.update(storage.content)
            write_all(fd, [memoryview(storage.content)], 0)
            advance(entry.size)
        else:
            stored = _write_stored(model, entry, storage, fd, lanes, digest.update, advance)
        if digest.hexdigest() != entry.sha256:
            raise Tampered(
                f"{stored} was altered: the SHA-256 of {entry.path!r} is not its content's",
                path=stored,
            )
        os.fchmod(fd, entry.mode)
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_stored(
    model: SealedModel, entry: Entry, storage: Stored, fd: int, lanes: Lanes,
    digest: Callable[[memoryview], None], advance: Advance,
) -> str:
    """Write a stored file; returns the stored path of its object."""

    def sink(offset: int, plain: memoryview) -> None:
        held = plain[: max(0, entry.size - offset)]
        write_all(fd, [held] if held else [], offset)

    reader = model.open_object(entry, storage)
    try:
        for offset, plain, _ in opened(reader, lanes, sink):
            held = plain[: max(0, entry.size - offset)]
            digest(held)
            advance(len(held))
        return reader.stored
    finally:
        reader.close()


def _finish_directory(path: Path, mode: int) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fsync(handle)
        os.fchmod(handle, mode)
    finally:
        os.close(handle)
