"""``tng config``: explain a configuration without running it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cai import terminal as terminals
from cai.errors import UsageError
from cai.terminal import JsonFlag
from tng.cli.given import ConfigContent, given_config

if TYPE_CHECKING:
    from rich.table import Table

    from tng.config.entries import Config

app = typer.Typer(help="Configurations.", no_args_is_help=True)

_MEANS = {
    "ignored": "no effect",
    "clear": "UNPROTECTED",
    "version": "differs",
    "refused": "NOT DONE",
}


@app.callback()
def config() -> None:
    """Configurations."""


@app.command()
def check(
    file: Annotated[
        Path | None, typer.Argument(help="A JSON file, or YAML by its suffix.", metavar="FILE")
    ] = None,
    config_content: ConfigContent = None,
    json_output: JsonFlag = False,
) -> None:
    """Explain a configuration: ignored keys, clear text, differences between versions of TNG.

    Exit status 0 when a gateway would start with it, 2 when it would not.
    """
    if (file is None) == (config_content is None):
        raise UsageError("give exactly one of FILE and --config-content")
    found = given_config(config_content, file)
    unsafe = [name for ingress in found.ingress for name in ingress.unsafe]
    unsafe += [name for egress in found.egress for name in egress.unsafe]
    terminals.current().result(
        {
            "ingress": [type(entry.mode).__name__ for entry in found.ingress],
            "egress": [type(entry.mode).__name__ for entry in found.egress],
            "unsafe": sorted(set(unsafe)),
            "notes": [
                {"kind": note.kind.value, "where": note.where, "text": note.text}
                for note in found.notes
            ],
            "starts": not found.refusals,
        },
        _table(found),
    )
    if found.refusals:
        raise typer.Exit(2)


def _table(found: Config) -> Table | str:
    from rich.table import Table
    from rich.text import Text

    if not found.notes:
        return f"{len(found.ingress)} ingress, {len(found.egress)} egress; nothing to remark"
    table = Table(box=None, padding=(0, 1))
    for heading in ("", "where", "what"):
        table.add_column(heading, overflow="fold")
    for note in found.notes:
        grave = note.kind.value in ("clear", "refused")
        table.add_row(
            Text(_MEANS[note.kind.value], style="red" if grave else "yellow"),
            Text(note.where),
            Text(note.text),
        )
    return table
