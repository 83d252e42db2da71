"""The command line of the gateway: one module a verb."""

from __future__ import annotations

import sys

import typer

from cai.terminal import run_app
from tng.cli import config, netfilter, token
from tng.cli.exec import run_command
from tng.cli.launch import launch
from tng.cli.status import status

app = typer.Typer(
    name="tng",
    help="Carry requests only to guests that proved themselves.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(launch)
app.command("exec", context_settings={"allow_interspersed_args": False})(run_command)
app.command()(status)
app.add_typer(config.app, name="config")
app.add_typer(netfilter.app, name="netfilter")
app.add_typer(token.app, name="token")


def main() -> None:
    """Entry point of the console script ``tng``."""
    sys.exit(run_app("tng", app))
