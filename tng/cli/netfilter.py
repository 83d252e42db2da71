"""``tng netfilter``: the guard that keeps clear text out, with or without a gateway."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from cai import terminal as terminals
from cai.errors import UsageError
from cai.terminal import JsonFlag
from tng.cli.given import ConfigContent, ConfigFile, given_config

DEFAULT_MARK = 565

app = typer.Typer(help="The packet filter's rules of gateways.", no_args_is_help=True)


@app.callback()
def netfilter() -> None:
    """The packet filter's rules of gateways."""


@app.command()
def guard(
    config_content: ConfigContent = None,
    config_file: ConfigFile = None,
    port: Annotated[
        list[int] | None,
        typer.Option(min=1, max=65535, help="A backend's port; may be given several times."),
    ] = None,
    so_mark: Annotated[int, typer.Option(min=1, help="Mark that may pass.")] = DEFAULT_MARK,
) -> None:
    """Drop the service ports for all but loopback and the gateway, before anything listens.

    The ports are those that the configuration's netfilter entries capture, or --port. Both address
    families, forwarded traffic too. It stays until `tng netfilter down`.
    """
    from tng.netfilter import kernel
    from tng.netfilter.capture import Captures
    from tng.netfilter.ruleset import port_guard
    from tng.operation.journal import Journal

    if bool(port) == bool(config_content or config_file):
        raise UsageError("give either a configuration or --port")
    if port:
        asyncio.run(kernel.load(port_guard(port, so_mark)))
    else:
        captures = Captures(given_config(config_content, config_file), Journal())
        if not captures:
            raise UsageError("the configuration has no netfilter entry", hint="give --port")
        asyncio.run(captures.guard())
    terminals.current().say("guarded until `tng netfilter down`")


@app.command()
def show(json_output: JsonFlag = False) -> None:
    """Show the rules of all gateways of this machine."""
    from tng.netfilter import kernel

    async def read() -> tuple[tuple[str, ...], str]:
        return await kernel.tables(), await kernel.shown()

    names, text = asyncio.run(read())
    terminals.current().result({"tables": list(names), "rules": text}, text or "no rules")


@app.command()
def down(json_output: JsonFlag = False) -> None:
    """Take guard and capture away: what they kept out may pass in clear from now on.

    Stop the backend first.
    """
    from tng.netfilter import kernel

    async def remove() -> tuple[str, ...]:
        names = await kernel.tables()
        await kernel.remove(*names)
        return names

    names = asyncio.run(remove())
    terminals.current().result(
        {"removed": list(names)}, f"removed {', '.join(names)}" if names else "there was none"
    )
