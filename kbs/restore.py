"""Restoring a backup: the rows come back, and the audit log says so.

A restored database forgets what happened after the backup, and checkpoints of that time are with
hosts and clients. So it never continues the old log as if nothing had been: a leaf says that it was
restored, from what, and which checkpoint was the last; checkpoints from then on have another
origin (decisions §6). Whoever held the old log notices and has to agree.
"""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from sqlalchemy import Connection, select, update

from cai.attest.checkpoint import ORIGIN_PREFIX, Checkpoint, read_checkpoint
from cai.errors import Tampered
from cai.merkle import leaf_hash
from kbs.audit import tree
from kbs.audit.log import AuditLog, Entry, read_head
from kbs.audit.replay import ORIGIN_ACTION
from kbs.database.backup import BATCH, Manifest, load
from kbs.database.opening import open_database
from kbs.database.settings import DatabaseSettings
from kbs.database.tables import AUDIT, AUDIT_HEAD


@dataclass(frozen=True, slots=True)
class Restored:
    """What was restored.

    Attributes:
        manifest: of the backup.
        origin: of the checkpoints from now on.
        previous: the last checkpoint that is known; ``None`` when none was.
    """

    manifest: Manifest
    origin: str
    previous: Checkpoint | None


def restore(
    backup: Path,
    data: Path,
    settings: DatabaseSettings,
    *,
    now: datetime,
    newest: bytes = b"",
) -> Restored:
    """Fill a new database from a backup.

    Args:
        backup: the file; its manifest lies beside it.
        data: data directory, which exists; SQLite lies in it.
        settings: where the database is.
        now: the time.
        newest: the newest checkpoint that anybody holds, where one was published after the backup;
            empty takes the backup's own.

    Raises:
        Tampered: the backup is damaged, or its audit log is not the one that a checkpoint signs.
        StorageError: the database is not empty.
        SettingError, FormatError: the schema is not this program's.
    """
    made: list[Restored] = []

    def then(connection: Connection, manifest: Manifest) -> None:
        stored = manifest.checkpoint.encode()
        known = [read_checkpoint(note) for note in (stored, newest) if note]
        _require_log(connection, manifest, known)
        previous = max(known, key=lambda item: item.size, default=None)
        note = newest if newest and previous == known[-1] else stored
        origin = f"{ORIGIN_PREFIX}{manifest.instance}/{os.urandom(8).hex()}"
        _start_origin(connection, manifest, origin, note, now)
        made.append(Restored(manifest, origin, previous))

    database = open_database(data, settings)
    try:
        load(backup, database, then)
    finally:
        database.close()
    return made[0]


def _start_origin(
    connection: Connection, manifest: Manifest, origin: str, note: bytes, now: datetime
) -> None:
    entry = Entry(
        ORIGIN_ACTION,
        {"kind": "system"},
        uuid.uuid4().hex,
        allowed=True,
        reason="restored from a backup",
        details={
            "origin": origin,
            "previous": note.decode("utf-8", "replace"),
            "backup": manifest.sha256,
            "created": manifest.created,
        },
    )
    AuditLog(manifest.instance, manifest.realm).append(connection, entry, now)
    connection.execute(update(AUDIT_HEAD).where(AUDIT_HEAD.c.id == 1).values(origin=origin))


def _require_log(
    connection: Connection, manifest: Manifest, known: list[Checkpoint]
) -> None:
    """Hold the restored leaves against the head row and the checkpoints that reach into them."""
    for item in known:
        if item.instance != manifest.instance:
            raise Tampered(f"the checkpoint is of {item.origin}, the backup is of another broker")
    roots = {item.size: item for item in known}
    frontier: list[bytes] = []
    size = 0
    query = select(AUDIT.c.seq, AUDIT.c.leaf).order_by(AUDIT.c.seq)
    for row in connection.execute(query.execution_options(yield_per=BATCH)):
        if row.seq != size:
            raise Tampered(f"the backup's audit log lacks leaf {size}")
        frontier, _ = tree.appended(frontier, size, leaf_hash(row.leaf))
        size += 1
        signed = roots.get(size)
        if signed is not None and signed.root != tree.fold(frontier):
            raise Tampered(
                f"the first {size} leaves of the backup are not the ones that a checkpoint signs"
            )
    head = read_head(connection)
    if (head.size, list(head.frontier)) != (size, frontier) or size != manifest.leaves:
        raise Tampered("the head of the backup's audit log does not fit its leaves")
