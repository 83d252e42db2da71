"""``tng launch``: run the gateway."""

from __future__ import annotations

from typing import Annotated

import typer

from cai import terminal as terminals
from cai.terminal import JsonFlag
from tng.cli.given import ConfigContent, ConfigFile, given_config


def launch(
    config_content: ConfigContent = None,
    config_file: ConfigFile = None,
    log_format: Annotated[
        str,
        typer.Option(
            "--log-format", envvar="TNG_LOG_FORMAT", help="Lines on stderr: text or json."
        ),
    ] = "text",
    workers: Annotated[
        int | None,
        typer.Option(min=1, max=64, help="Processes behind the same ports; else as configured."),
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """Run the gateway until SIGTERM or Ctrl-C.

    Under --json one document is printed when every listener is open: {"ready": true, "listen":
    {"ingress[0]": ["127.0.0.1:41000"]}, "unsafe": []}. One line a request goes to stderr, without
    its path, headers or body.
    """
    import asyncio

    from tng.operation.journal import log_format as named

    form = named(log_format)
    config = given_config(config_content, config_file)
    terminal = terminals.current()
    config.require_served()
    for note in config.notes:
        terminal.warn(str(note))
    count = workers or config.workers
    if count > 1:
        from tng.operation.workers import run_workers

        status = asyncio.run(run_workers(config, count, terminal, form))
    else:
        from tng.operation.run import run

        status = asyncio.run(run(config, terminal, form))
    if status == 130:
        raise KeyboardInterrupt
    raise typer.Exit(status)
