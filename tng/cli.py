"""The command line of the gateway: `tng launch`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cai import terminal as terminals
from cai.errors import UsageError
from cai.terminal import JsonFlag, run_app

app = typer.Typer(
    name="tng",
    help="Carry requests only to guests that proved themselves.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def tng() -> None:
    """Carry requests only to guests that proved themselves."""


@app.command()
def launch(
    config_content: Annotated[
        str | None, typer.Option("--config-content", help="The configuration itself, as JSON.")
    ] = None,
    config_file: Annotated[
        Path | None,
        typer.Option("--config-file", "-c", help="A JSON file, or YAML by its suffix."),
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """Run the gateway until SIGTERM or Ctrl-C.

    Under --json one document is printed when every listener is open: {"ready": true, "listen":
    {"ingress[0]": ["127.0.0.1:41000"]}, "unsafe": []}. One line a request goes to stderr.
    """
    import asyncio

    from tng.config.entries import load_content, load_file

    if (config_content is None) == (config_file is None):
        raise UsageError(
            "give exactly one of --config-content and --config-file", hint="tng launch --help"
        )
    if config_content is not None:
        config = load_content(config_content)
    else:
        assert config_file is not None  # noqa: S101 - one of the two is given
        config = load_file(config_file)
    terminal = terminals.current()
    for warning in config.warnings:
        terminal.warn(warning)
    from tng.operation.run import run

    status = asyncio.run(run(config, terminal))
    if status == 130:
        raise KeyboardInterrupt
    raise typer.Exit(status)


def main() -> None:
    """Entry point of the console script ``tng``."""
    sys.exit(run_app("tng", app))
