"""A backup: every row of one moment, sealed as it is stored, in a file with a manifest beside it.

The file is an SQLite database of the same schema, whatever engine it was read from, so a backup of
PostgreSQL can be restored to SQLite and the other way round. It holds no key encryption key: who
finds it learns names, sizes and the audit log, and no secret. Rows that live for minutes stay out,
because a restored challenge could be answered a second time.

The manifest guards against damage, not against an attacker: the digest is not signed. What a
backup's rows are is shown by the audit log inside it and by checkpoints that others hold.
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, MetaData, Table, func, insert, select

from cai import jcs
from cai.errors import FormatError, InputMissing, StorageError, Tampered, from_os_error
from kbs.database.engine import Database
from kbs.database.opening import hold_creation
from kbs.database.schema import found_revision, require_revision, upgrade
from kbs.database.tables import AUDIT_CHECKPOINT, AUDIT_HEAD, INSTANCE, METADATA
from kbs.database.trouble import translated

MANIFEST_VERSION: Final = 1
"""Member ``cai-kbs-backup`` of the manifest."""

MAX_MANIFEST: Final = 256 * 1024
"""Largest manifest that is read, bytes."""

BATCH: Final = 500
"""Rows that are copied at once."""

_BLOCK = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a backup holds.

    Attributes:
        instance: id of the key broker.
        realm: its realm.
        schema: revision of the tables.
        created: when the rows were read, RFC 3339.
        size: bytes of the file.
        sha256: of the file, hex.
        rows: how many each table has.
        leaves: size of the audit log.
        checkpoint: newest stored checkpoint, a signed note; empty when there is none.
    """

    instance: str
    realm: str
    schema: str
    created: str
    size: int
    sha256: str
    rows: dict[str, int] = field(default_factory=dict)
    leaves: int = 0
    checkpoint: str = ""

    def encode(self) -> bytes:
        """Canonical JSON."""
        return jcs.canonical(
            {
                "cai-kbs-backup": MANIFEST_VERSION,
                "instance": self.instance,
                "realm": self.realm,
                "schema": self.schema,
                "created": self.created,
                "size": self.size,
                "sha256": self.sha256,
                "rows": self.rows,
                "leaves": self.leaves,
                "checkpoint": self.checkpoint,
            }
        )

    @classmethod
    def parse(cls, data: bytes) -> Manifest:
        """Read a manifest.

        Raises:
            FormatError, LimitExceeded: another form.
        """
        value = jcs.parse_canonical(data, what="backup manifest", limit=MAX_MANIFEST)
        if not isinstance(value, dict) or value.pop("cai-kbs-backup", None) != MANIFEST_VERSION:
            raise FormatError("backup manifest: not one of this program's")
        kinds: dict[str, type] = {
            "instance": str, "realm": str, "schema": str, "created": str, "size": int,
            "sha256": str, "rows": dict, "leaves": int, "checkpoint": str,
        }  # fmt: skip
        if set(value) != set(kinds) or any(
            type(value[name]) is not kind for name, kind in kinds.items()
        ):
            raise FormatError("backup manifest: a member is missing or of another kind")
        if any(type(count) is not int for count in value["rows"].values()):
            raise FormatError("backup manifest: rows are not counted")
        return cls(**value)


def manifest_path(backup: Path) -> Path:
    """Where a backup's manifest lies."""
    return backup.with_name(backup.name + ".json")


def save(database: Database, target: Path, *, now: datetime) -> Manifest:
    """Write a backup and its manifest; a running broker goes on.

    Args:
        database: of this program's schema or an older one.
        target: new file; the manifest is written beside it.
        now: the time.

    Raises:
        StorageError: a file exists already or cannot be written.
        InputMissing: the database holds no key broker.
    """
    beside = manifest_path(target)
    for path in (target, beside):
        if path.exists() or path.is_symlink():
            raise StorageError(f"{path} exists already", hint="choose another name")
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        _create_private(partial)
        with database.read() as source, translated("read the database"):
            found = _copy_out(source, partial)
        size, digest = _sync(partial)
        manifest = Manifest(
            created=now.strftime("%Y-%m-%dT%H:%M:%SZ"), size=size, sha256=digest, **found
        )
        _write_private(beside, manifest.encode() + b"\n")
        # The rows appear last: a manifest without them is refused, and so is the reverse.
        os.link(partial, target)
        partial.unlink()
        _sync_directory(target.parent)
    except OSError as error:
        raise from_os_error(error, f"write backup {target}") from error
    finally:
        for path in (partial, *_side_files(partial)):
            path.unlink(missing_ok=True)
    return manifest


def read_manifest(backup: Path) -> Manifest:
    """The manifest of a backup.

    Raises:
        InputMissing, StorageError: it cannot be read.
        FormatError: it has another form.
    """
    path = manifest_path(backup)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_MANIFEST + 1)
    except FileNotFoundError as error:
        raise InputMissing(
            f"{path} does not exist", hint="a backup is two files; copy both"
        ) from error
    except OSError as error:
        raise from_os_error(error, f"read {path}") from error
    return Manifest.parse(data.removesuffix(b"\n"))


def load(
    backup: Path, database: Database, then: Callable[[Connection, Manifest], None]
) -> Manifest:
    """Fill an empty database with the rows of a backup, in one transaction.

    Args:
        backup: the file; its manifest lies beside it. Of an older schema it is upgraded first, as
            a copy.
        database: of this program's schema, without an instance.
        then: called in the transaction, with the rows in place.

    Raises:
        Tampered: the file is not the one of its manifest.
        FormatError: a newer program made it, or it is not a backup.
        StorageError: the database holds something already.
    """
    manifest = read_manifest(backup)
    with _own_copy(backup, manifest) as copy:
        upgrade(copy)
        with copy.read() as source, database.write() as target, translated("read the backup"):
            _require_same(source, manifest)
            _require_empty(target, database)
            for table in METADATA.sorted_tables:
                if not _is_short_lived(table):
                    _copy_rows(source, table, target, table)
            then(target, manifest)
    return manifest


def _copy_out(source: Connection, path: Path) -> dict[str, Any]:
    """Copy every table of the source's own schema; returns what the manifest says of them."""
    revision = found_revision(source)
    if revision is None:
        raise InputMissing("the database is empty", hint="kbs serve makes it")
    require_revision(revision, where="the database")
    copy = Database.open(f"sqlite:///{path.absolute()}")
    try:
        upgrade(copy, to=revision)
        names = [table.name for table in METADATA.sorted_tables if not _is_short_lived(table)]
        rows: dict[str, int] = {}
        with copy.write() as target:
            for name in names:
                # The tables as they are there, not as this program would make them.
                there, here = _reflected(source, name), _reflected(target, name)
                if there is not None and here is not None:
                    rows[name] = _copy_rows(source, there, target, here)
    finally:
        copy.close()
    with closing(sqlite3.connect(path)) as connection:
        # One file: no log beside it.
        connection.execute("PRAGMA journal_mode=DELETE")
    row = source.execute(select(INSTANCE.c.id, INSTANCE.c.realm)).one_or_none()
    if row is None:
        raise InputMissing("the database holds no key broker", hint="kbs serve makes it")
    return {
        "instance": row.id, "realm": row.realm, "schema": revision, "rows": rows,
        **_log_state(source),
    }  # fmt: skip


def _log_state(source: Connection) -> dict[str, Any]:
    leaves = source.execute(select(AUDIT_HEAD.c.size)).scalar() or 0
    note = source.execute(
        select(AUDIT_CHECKPOINT.c.note).order_by(AUDIT_CHECKPOINT.c.size.desc()).limit(1)
    ).scalar()
    return {"leaves": int(leaves), "checkpoint": bytes(note or b"").decode("utf-8", "replace")}


def _reflected(connection: Connection, name: str) -> Table | None:
    found = MetaData()
    found.reflect(connection, only=lambda table, _: table == name)
    return found.tables.get(name)


def _copy_rows(source: Connection, there: Table, target: Connection, here: Table) -> int:
    count = 0
    query = select(there).order_by(*there.primary_key.columns)
    rows = source.execute(query.execution_options(yield_per=BATCH))
    for batch in rows.mappings().partitions():
        target.execute(insert(here), [dict(row) for row in batch])
        count += len(batch)
    return count


def _require_same(source: Connection, manifest: Manifest) -> None:
    row = source.execute(select(INSTANCE.c.id, INSTANCE.c.realm)).one_or_none()
    if row is None or (row.id, row.realm) != (manifest.instance, manifest.realm):
        raise Tampered("the backup is of another key broker than its manifest says")


def _require_empty(target: Connection, database: Database) -> None:
    # A broker that starts at this moment waits, and then finds the restored instance.
    hold_creation(target)
    for table in METADATA.sorted_tables:
        if target.execute(select(func.count()).select_from(table)).scalar_one():
            raise StorageError(
                f"{database.where} is not empty: {table.name} has rows",
                hint="restore into a new database; nothing is ever overwritten",
            )


@contextmanager
def _own_copy(backup: Path, manifest: Manifest) -> Iterator[Database]:
    """A private copy whose digest was taken while it was made."""
    with tempfile.TemporaryDirectory(prefix="kbs-restore-", dir=_roomy()) as name:
        path = Path(name) / "backup.sqlite"
        digest, size = sha256(), 0
        try:
            with backup.open("rb") as source, path.open("xb") as target:
                while block := source.read(_BLOCK):
                    size += len(block)
                    digest.update(block)
                    target.write(block)
        except FileNotFoundError as error:
            raise InputMissing(f"{backup} does not exist", hint="check the path") from error
        except OSError as error:
            raise from_os_error(error, f"read backup {backup}") from error
        if (size, digest.hexdigest()) != (manifest.size, manifest.sha256):
            raise Tampered(
                f"{backup} is not the file of its manifest", hint="copy the backup again"
            )
        copy = Database.open(f"sqlite:///{path}")
        try:
            yield copy
        finally:
            copy.close()


def _roomy() -> str | None:
    """Where a copy of a backup has room: not in memory, if it can be helped."""
    place = Path("/var/tmp")  # noqa: S108 - a directory of our own is made in it
    return str(place) if os.access(place, os.W_OK) else None


def _is_short_lived(table: Table) -> bool:
    return bool(table.info.get("short-lived"))


def _create_private(path: Path) -> None:
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600))


def _write_private(path: Path, data: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> tuple[int, str]:
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
        size = file.tell()
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _side_files(path: Path) -> tuple[Path, ...]:
    return tuple(path.with_name(path.name + end) for end in ("-wal", "-shm", "-journal"))
