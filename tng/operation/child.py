"""A command and the gateway that it speaks through, which ends when the command ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

from cai.errors import SettingError, StorageError
from cai.terminal import Terminal
from tng.config.entries import Config
from tng.config.modes import HttpProxy, Socks5
from tng.operation.journal import Journal
from tng.operation.service import Gateway

NOT_FOUND_STATUS, NOT_EXECUTABLE_STATUS = 127, 126
SIGNALLED_STATUS = 128
"""Added to the number of the signal that ended the command, as shells do."""

FORWARDED = (
    signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2,
)  # fmt: skip
"""Signals that are meant for the command."""

HTTP_VARIABLES = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
ALL_VARIABLES = ("all_proxy", "ALL_PROXY")
NO_VARIABLES = ("no_proxy", "NO_PROXY")


def proxy_variables(
    config: Config, listen: Mapping[str, Sequence[str]], no_proxy: str
) -> dict[str, str]:
    """The environment of the command.

    Args:
        config: of the gateway.
        listen: the real addresses by entry name.
        no_proxy: hosts that are reached without the gateway; the inherited list does not count.

    Raises:
        SettingError: no ingress is a proxy that a command can be pointed at.
    """
    http = socks = ""
    for entry in config.ingress:
        where = _reachable(listen.get(entry.name, [""])[0])
        if isinstance(entry.mode, HttpProxy):
            http = http or f"http://{where}"
        elif isinstance(entry.mode, Socks5) and entry.mode.login is None:
            # The h: names are resolved by the gateway, which checks where they lead.
            socks = socks or f"socks5h://{where}"
    if not http and not socks:
        raise SettingError(
            "no ingress is a proxy for a command",
            hint='add one of mode http_proxy: {"proxy_listen": {"port": 0}}',
        )
    found = dict.fromkeys(HTTP_VARIABLES, http or socks)
    found |= dict.fromkeys(ALL_VARIABLES, socks or http)
    return found | dict.fromkeys(NO_VARIABLES, no_proxy)


async def run_beside(
    config: Config, command: Sequence[str], no_proxy: str, log: Path | None, terminal: Terminal
) -> int:
    """Run a command beside its gateway.

    Returns:
        Exit status for this process.

    Raises:
        CaiError: the gateway cannot start; the command has not been run then.
    """
    with contextlib.ExitStack() as files:
        out = files.enter_context(_opened(log)) if log else None
        gateway = Gateway(config, Journal(out))
        listen = await gateway.start()
        try:
            for name in gateway.unsafe:
                terminal.warn(f"{name} is in force: nothing that rests on it is protected")
            environment = {**os.environ, **proxy_variables(config, listen, no_proxy)}
            return await _run(command, environment, terminal)
        finally:
            await gateway.close()


async def _run(command: Sequence[str], environment: Mapping[str, str], terminal: Terminal) -> int:
    loop = asyncio.get_running_loop()
    early: list[signal.Signals] = []
    for number in FORWARDED:
        # From here on no signal ends the gateway before the command.
        loop.add_signal_handler(number, early.append, number)
    try:
        process = await asyncio.create_subprocess_exec(*command, env=environment)
    except (OSError, ValueError) as error:
        missing = isinstance(error, FileNotFoundError)
        terminal.warn(f"{command[0]}: {getattr(error, 'strerror', None) or error}")
        return NOT_FOUND_STATUS if missing else NOT_EXECUTABLE_STATUS
    for number in FORWARDED:
        loop.add_signal_handler(number, _forward, process, number)
    for number in early:
        _forward(process, number)
    status = await process.wait()
    return status if status >= 0 else SIGNALLED_STATUS - status


def _forward(process: asyncio.subprocess.Process, number: int) -> None:
    if number in (signal.SIGINT, signal.SIGQUIT) and _from_terminal():
        # The terminal has given it to the command too.
        return
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(number)


def _from_terminal() -> bool:
    with contextlib.suppress(OSError, ValueError):
        return os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    return False


def _reachable(address: str) -> str:
    """A listening address as something to connect to."""
    host, _, port = address.rpartition(":")
    return {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host) + f":{port}"  # noqa: S104


def _opened(log: Path) -> TextIO:
    try:
        return log.open("a", encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{log} cannot be written: {error.strerror}") from error
