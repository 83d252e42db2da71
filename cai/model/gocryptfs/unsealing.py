"""Writing the plain tree of a gocryptfs model, verified, whole or not at all."""

from __future__ import annotations

import os
from hashlib import sha256
from pathlib import Path

from cai.errors import Tampered, UsageError
from cai.model.gocryptfs.below import above, mode_below, open_below
from cai.model.gocryptfs.crew import Crew, workers_for
from cai.model.gocryptfs.model import CipherModel
from cai.model.gocryptfs.reading import SLOT, LastDescriptor, Unit, UnitReader, run_units
from cai.model.gocryptfs.stock import StockModel
from cai.model.progress import ProgressBar, silent
from cai.model.stage import Stage, output_error, write_all
from cai.model.tree import Entry, EntryType
from cai.terminal import Advance


def unseal_gocryptfs(
    model: CipherModel | StockModel, out: Path, *, workers: int = 0,
    progress: ProgressBar = silent,
) -> int:
    """Write the plain tree of an opened model into ``out``, a directory of mode 0700.

    Modes are those of the manifest, or of the stored files where there is none. Links are made
    last, so that no file is ever written through one.

    Returns:
        Plaintext bytes written.

    Raises:
        UsageError: ``out`` is inside the sealed model, or is there already and is not an empty
            directory.
        Tampered: something is not what was sealed; nothing has appeared.
        StorageError, NoSpace: the file system refused.
    """
    place = out.parent.resolve() / out.name
    sealed = model.files.directory
    if sealed is not None and sealed.resolve() in (place, *place.parents):
        raise UsageError(f"the output {out} is inside the sealed model {sealed}")
    entries = list(model.entries.values())
    total = sum(entry.size for entry in entries if entry.type is EntryType.FILE)
    with Stage(out, mode=0o700) as stage:
        root = os.open(stage.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _make(root, entries)
            target = LastDescriptor()

            def sink(unit: Unit, plain: memoryview) -> None:
                handle = target.get(
                    unit.path, lambda: open_below(root, unit.path, os.O_WRONLY)
                )
                write_all(handle, [plain] if plain else [], unit.offset)

            reader = UnitReader(model, sink)
            try:
                with (
                    Crew(
                        reader.work, workers=workers_for(total, workers), slot_size=SLOT
                    ) as crew,
                    progress("decrypt", total) as advance,
                ):
                    _write(crew, root, entries, advance)
            finally:
                reader.close()
                target.close()
            _finish(root, entries)
        except OSError as error:
            raise output_error(error, f"write {error.filename or out}") from error
        finally:
            os.close(root)
        stage.commit(folders_synced=True)
    return total


def _make(root: int, entries: list[Entry]) -> None:
    """Folders, and empty files that only their owner can read."""
    for entry in entries:
        with above(root, entry.path) as (folder, name):
            if entry.type is EntryType.DIRECTORY:
                os.mkdir(name, 0o700, dir_fd=folder)
            elif entry.type is EntryType.FILE:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
                os.close(open_below(folder, name, flags))


def _write(crew: Crew[Unit], root: int, entries: list[Entry], advance: Advance) -> None:
    files = {entry.path: entry for entry in entries if entry.type is EntryType.FILE}
    digest = sha256()
    for unit, plain, _stored in run_units(crew, files.values()):
        entry = files[unit.path]
        if entry.sha256:
            digest.update(plain)
        advance(len(plain))
        if not unit.last:
            continue
        if entry.sha256 and digest.hexdigest() != entry.sha256:
            raise Tampered(f"the SHA-256 of {entry.path!r} is not its content's")
        digest = sha256()
        handle = open_below(root, entry.path, os.O_RDONLY)
        try:
            os.fchmod(handle, entry.mode)
            os.fsync(handle)
        finally:
            os.close(handle)


def _finish(root: int, entries: list[Entry]) -> None:
    for entry in entries:
        if entry.type is EntryType.SYMLINK:
            with above(root, entry.path) as (folder, name):
                os.symlink(entry.target, name, dir_fd=folder)
    # Children first: a directory may forbid its owner to write or even to look inside.
    for entry in reversed(entries):
        if entry.type is EntryType.DIRECTORY:
            handle = open_below(root, entry.path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
            mode_below(root, entry.path, entry.mode)
