"""A gateway as a process: ready line, signals, drain."""

from __future__ import annotations

import asyncio
import signal

from cai.terminal import Terminal
from tng.config.entries import Config
from tng.operation.journal import Journal, LogFormat
from tng.operation.service import Gateway

SIGTERM_STATUS = 143
SIGINT_STATUS = 130


async def run(
    config: Config, terminal: Terminal, form: LogFormat = LogFormat.TEXT
) -> int:
    """Run until a signal, then drain; a second signal ends at once.

    Returns:
        Exit status of the signal.

    Raises:
        CaiError: the gateway cannot start.
    """
    loop = asyncio.get_running_loop()
    stopped: asyncio.Queue[int] = asyncio.Queue()
    for number, status in ((signal.SIGTERM, SIGTERM_STATUS), (signal.SIGINT, SIGINT_STATUS)):
        loop.add_signal_handler(number, stopped.put_nowait, status)
    journal = Journal(form=form)
    gateway = Gateway(config, journal)
    listen = await gateway.start()
    journal.start()
    try:
        return await _serve(gateway, listen, stopped, terminal)
    finally:
        journal.close()


async def _serve(
    gateway: Gateway,
    listen: dict[str, list[str]],
    stopped: asyncio.Queue[int],
    terminal: Terminal,
) -> int:
    for name in gateway.unsafe:
        terminal.warn(f"{name} is in force: nothing that rests on it speaks of real hardware")
    addresses = "\n".join(f"{name} listens on {', '.join(where)}" for name, where in listen.items())
    terminal.result({"ready": True, "listen": listen, "unsafe": list(gateway.unsafe)}, addresses)
    status = await stopped.get()
    terminal.say("stopping: running requests may end")
    draining = asyncio.create_task(gateway.drain())
    again = asyncio.create_task(stopped.get())
    await asyncio.wait({draining, again}, return_when=asyncio.FIRST_COMPLETED)
    again.cancel()
    if not draining.done():
        await gateway.close()
        draining.cancel()
    return status
