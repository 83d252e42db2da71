"""``tng exec``: run one command behind a gateway of its own.

The way that needs no privileges: the command gets the proxy variables, and the gateway lives in
this process for as long as the command does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cai import terminal as terminals
from tng.cli.given import ConfigContent, ConfigFile, given_config


def run_command(
    command: Annotated[
        list[str], typer.Argument(help="The command and its arguments.", metavar="-- COMMAND")
    ],
    config_content: ConfigContent = None,
    config_file: ConfigFile = None,
    no_proxy: Annotated[
        str, typer.Option(help="Hosts that the command reaches without the gateway, in clear.")
    ] = "",
    log: Annotated[
        Path | None, typer.Option(help="File for the gateway's lines; by default stderr.")
    ] = None,
) -> None:
    """Run a command with http_proxy, HTTPS_PROXY, all_proxy and no_proxy set to a gateway.

    The configuration needs an ingress of mode http_proxy or socks5. Signals go to the command; the
    exit status is the command's, 128 + N when signal N ended it, 127 when there is no such command.
    """
    import asyncio

    from tng.operation.child import run_beside

    config = given_config(config_content, config_file)
    config.require_served()
    terminal = terminals.current()
    for note in config.notes:
        terminal.warn(str(note))
    raise typer.Exit(asyncio.run(run_beside(config, command, no_proxy, log, terminal)))
