"""``kbs db``: the database itself, on the machine that reaches it; no broker needs to run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cai import terminal
from cai.terminal import JsonFlag

if TYPE_CHECKING:
    from kbs.database.settings import DatabaseSettings

app = typer.Typer(help="The database: schema, backup, restore.", no_args_is_help=True)

Config = Annotated[
    Path | None, typer.Option(help="The broker's configuration file.", metavar="FILE")
]
Data = Annotated[
    Path | None, typer.Option(help="Data directory of the broker; default kbs-data.")
]
Url = Annotated[
    str,
    typer.Option(
        "--database",
        help="PostgreSQL, without a password; default SQLite in DATA.",
        metavar="postgresql+psycopg://USER@HOST/NAME",
    ),
]


@app.command("upgrade")
def db_upgrade(
    *,
    config: Config = None,
    data: Data = None,
    database: Url = "",
    json_output: JsonFlag = False,
) -> None:
    """Make the tables, or bring older ones up to date; stop brokers of the older program first."""
    from kbs.database.opening import connect
    from kbs.database.schema import upgrade

    opened = connect(*_existing(config, data, database))
    try:
        before, now = upgrade(opened)
    finally:
        opened.close()
    text = f"schema {now}, unchanged" if before == now else f"schema {before or 'empty'} -> {now}"
    terminal.current().result({"before": before, "schema": now}, text)


@app.command("check")
def db_check(
    *,
    config: Config = None,
    data: Data = None,
    database: Url = "",
    json_output: JsonFlag = False,
) -> None:
    """Say whether the database can be reached and has this program's tables; changes nothing."""
    from cai.errors import FormatError
    from kbs.database.opening import connect
    from kbs.database.schema import differences, require_current, wanted_revision

    opened = connect(*_existing(config, data, database))
    try:
        require_current(opened)
        found = differences(opened)
        where = opened.where
    finally:
        opened.close()
    if found:
        raise FormatError(
            f"{where}: the tables were changed by something else: {'; '.join(found)[:1000]}",
            hint="restore a backup into a new database",
        )
    schema = wanted_revision()
    terminal.current().result(
        {"database": where, "schema": schema}, f"{where}: schema {schema}, as it should be"
    )


@app.command("backup")
def db_backup(
    out: Annotated[Path, typer.Argument(help="New file; OUT.json is its manifest.")],
    *,
    config: Config = None,
    data: Data = None,
    database: Url = "",
    json_output: JsonFlag = False,
) -> None:
    """Write every row, sealed as it is, to a file; the broker goes on meanwhile.

    The key encryption key is not in it: keep that apart, or nothing opens the backup.
    """
    from datetime import UTC, datetime

    from kbs.database.backup import manifest_path, save
    from kbs.database.opening import connect

    opened = connect(*_existing(config, data, database))
    try:
        manifest = save(opened, out, now=datetime.now(UTC))
    finally:
        opened.close()
    rows = sum(manifest.rows.values())
    terminal.current().result(
        {
            "backup": str(out),
            "manifest": str(manifest_path(out)),
            "size": manifest.size,
            "sha256": manifest.sha256,
            "leaves": manifest.leaves,
        },
        f"{out}: {rows} rows, {manifest.leaves} of them audit leaves, {manifest.size} bytes",
    )


@app.command("restore")
def db_restore(
    backup: Annotated[Path, typer.Argument(help="A backup; BACKUP.json lies beside it.")],
    *,
    config: Config = None,
    data: Data = None,
    database: Url = "",
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Newest checkpoint that anybody holds, if the backup is older."),
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """Fill a new, empty database from a backup; its audit log starts a new origin.

    What happened after the backup is gone: revocations, too. Revoke again before you serve.
    """
    from datetime import UTC, datetime

    from cai.settings import read_settings_file
    from kbs.instance import private_directory
    from kbs.restore import restore

    directory, settings = _place(config, data, database)
    newest = b"" if checkpoint is None else read_settings_file(checkpoint, what="checkpoint")
    if settings.parsed is None:
        private_directory(directory)
    done = restore(backup, directory, settings, now=datetime.now(UTC), newest=newest)
    speaker = terminal.current()
    speaker.warn(
        f"what happened after {done.manifest.created} is gone, revocations too; revoke again "
        "before you serve"
    )
    speaker.result(
        {
            "instance": done.manifest.instance,
            "realm": done.manifest.realm,
            "leaves": done.manifest.leaves,
            "origin": done.origin,
            "previous": None if done.previous is None else done.previous.size,
        },
        f"restored key broker {done.manifest.instance} ({done.manifest.realm}); checkpoints are "
        f"now of {done.origin}",
    )


def _place(config: Path | None, data: Path | None, url: str) -> tuple[Path, DatabaseSettings]:
    """Data directory and database: of the configuration, where the command line is silent."""
    from dataclasses import replace

    from kbs.server.config import ServeSettings, read_config

    settings = ServeSettings() if config is None else read_config(config)
    database = replace(settings.database, url=url) if url else settings.database
    if database.unsafe:
        terminal.current().warn("unsafe_unverified_tls: anybody between may be the database")
    return data or settings.data, database


def _existing(config: Path | None, data: Path | None, url: str) -> tuple[Path, DatabaseSettings]:
    """The same, of a database that is there: looking for one makes none."""
    from cai.errors import InputMissing
    from kbs.database.opening import DATABASE_NAME

    directory, settings = _place(config, data, url)
    if settings.parsed is None and not (directory / DATABASE_NAME).exists():
        raise InputMissing(
            f"{directory / DATABASE_NAME} does not exist",
            hint="give --config, --data or --database; kbs serve makes a new one",
        )
    return directory, settings
