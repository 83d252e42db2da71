"""The command line of the gateway: one module a verb."""

from __future__ import annotations

import sys

import typer

from cai.terminal import run_app
from tng.cli import config
from tng.cli.launch import launch

app = typer.Typer(
    name="tng",
    help="Carry requests only to guests that proved themselves.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(launch)
app.add_typer(config.app, name="config")


def main() -> None:
    """Entry point of the console script ``tng``."""
    sys.exit(run_app("tng", app))
