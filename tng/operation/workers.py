"""Several worker processes behind the same ports (``SO_REUSEPORT``), and the one that keeps them.

The keeper carries no traffic: it holds the ports, the capture rules and the control interface,
starts a worker anew that died, and passes a signal on to all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from cai.errors import ListenerFailed, SettingError
from cai.terminal import Terminal
from tng.config.entries import Config
from tng.config.transport import OhttpServer, OwnKey
from tng.guard.desk import BootKeys
from tng.netfilter.capture import Captures
from tng.operation.gathered import Gathered
from tng.operation.journal import Journal, LogFormat
from tng.operation.places import Places
from tng.operation.run import SIGINT_STATUS, SIGTERM_STATUS
from tng.operation.worker import Order

START_TIMEOUT_S = 60.0
"""Longest time until a worker is ready, seconds."""

STOP_TIMEOUT_S = 400.0
"""Longest time until a worker that was asked to stop has ended, seconds; a lease's drain is 300."""

PAUSE_S = 0.5
"""Time until a worker that died is started anew, seconds; doubled each time."""

MAX_PAUSE_S = 30.0
"""Longest such time, seconds."""

STEADY_S = 60.0
"""A worker that lived this long starts anew at once, seconds."""

# Not -m: the order is unpickled into the module's class, which then must not be __main__'s.
_WORKER = "import sys; from tng.operation.worker import main; sys.exit(main())"


class Workers:
    """The keeper.

    Args:
        config: of the whole gateway.
        count: of workers, at least 2.
        form: of the lines.
        journal: where the keeper's own go.

    Raises:
        SettingError: the configuration needs one process.
    """

    def __init__(self, config: Config, count: int, form: LogFormat, journal: Journal) -> None:
        config.require_served()
        for entry in config.egress:
            if isinstance(entry.transport, OhttpServer) and isinstance(entry.transport.key, OwnKey):
                raise SettingError(
                    f"{entry.name}: several workers cannot each make an OHTTP key of their own",
                    hint='give the key: {"source": "file", "path": ...}, or one worker',
                )
        self._config = config
        self._count = count
        self._form = form
        self._journal = journal
        self._places = Places()
        self._captures = Captures(config, journal)
        self._directory = tempfile.TemporaryDirectory(prefix="tng-")
        self._processes: dict[int, asyncio.subprocess.Process] = {}
        self._keepers: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._order: Order | None = None
        self._control: asyncio.Server | None = None
        self.unsafe: list[str] = []

    @property
    def listen(self) -> dict[str, list[str]]:
        """The real addresses by entry name."""
        return self._places.listen

    async def start(self) -> None:
        """Start every worker.

        Raises:
            CaiError: an address is taken, or a worker cannot start.
        """
        try:
            if self._captures:
                await self._captures.guard()
            placed = self._places.take(self._config)
            # Before the workers, so that each of them knows where it may not go.
            own = await self._open_control()
            keys = BootKeys()
            self._order = Order(
                placed, self._form, Path(), self._captures.mark,
                keys.salt, keys.receipts.private_bytes_raw(), own,
            )  # fmt: skip
            started = [self._spawn(number) for number in range(self._count)]
            for process in await asyncio.gather(*started):
                self.unsafe = list(dict.fromkeys([*self.unsafe, *process]))
            if self._captures:
                await self._captures.capture(self._places.captured)
        except BaseException:
            await self.close()
            raise
        for number in range(self._count):
            self._keepers.add(asyncio.create_task(self._keep(number)))

    async def drain(self) -> None:
        """Ask every worker to stop, and wait until all have ended."""
        self._stopping = True
        for task in self._keepers:
            task.cancel()
        for process in self._processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await asyncio.gather(*(one.wait() for one in self._processes.values()))
        await self.close()

    async def close(self) -> None:
        """End everything now."""
        self._stopping = True
        for task in self._keepers:
            task.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        await self._captures.release()
        for process in self._processes.values():
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        if self._control:
            self._control.close()
        self._places.close()
        self._directory.cleanup()

    def _socket(self, number: int) -> Path:
        return Path(self._directory.name) / f"{number}.sock"

    async def _spawn(self, number: int) -> list[str]:
        """Start one worker and wait until it is ready; the ``unsafe_…`` settings in force."""
        assert self._order is not None  # noqa: S101 - made before the first worker
        socket = self._socket(number)
        socket.unlink(missing_ok=True)
        order = replace(self._order, control=socket)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", _WORKER,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        self._processes[number] = process
        assert process.stdin is not None and process.stdout is not None  # noqa: S101, PT018
        line = b""
        with contextlib.suppress(OSError, TimeoutError):
            process.stdin.write(order.encode())
            async with asyncio.timeout(START_TIMEOUT_S):
                await process.stdin.drain()
                line = await process.stdout.readline()
        told = json.loads(line) if line else {}
        if told.get("ready"):
            return [str(name) for name in told.get("unsafe", [])]
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        raise ListenerFailed(
            str(told.get("error") or "it ended without a word"), hint=str(told.get("hint") or "")
        )

    async def _keep(self, number: int) -> None:
        loop = asyncio.get_running_loop()
        pause = PAUSE_S
        while not self._stopping:
            since = loop.time()
            status = await self._processes[number].wait()
            if loop.time() - since > STEADY_S:
                pause = PAUSE_S
            self._journal.line(f"worker {number} ended ({status}); another takes its place")
            await asyncio.sleep(pause)
            pause = min(2 * pause, MAX_PAUSE_S)
            try:
                await self._spawn(number)
            except ListenerFailed as error:
                self._journal.line(f"worker {number} does not start: {error.message}")

    async def _open_control(self) -> tuple[tuple[str, int], ...]:
        where = self._config.telemetry.control
        if where is None:
            return ()
        gathered = Gathered(lambda: [self._socket(number) for number in range(self._count)])
        try:
            self._control = await asyncio.start_server(gathered.serve, where.host, where.port)
        except (OSError, UnicodeError, OverflowError) as error:
            raise ListenerFailed(f"control_interface cannot listen on {where}: {error}") from error
        own = []
        for bound in self._control.sockets:
            host, port = bound.getsockname()[:2]
            own.append((str(host).partition("%")[0], int(port)))
            shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            self._places.listen.setdefault("control_interface", []).append(shown)
        return tuple(own)


async def run_workers(config: Config, count: int, terminal: Terminal, form: LogFormat) -> int:
    """Run several workers until a signal, then drain them; a second signal ends them at once.

    Returns:
        Exit status of the signal.

    Raises:
        CaiError: the gateway cannot start.
    """
    loop = asyncio.get_running_loop()
    stopped: asyncio.Queue[int] = asyncio.Queue()
    for number, status in ((signal.SIGTERM, SIGTERM_STATUS), (signal.SIGINT, SIGINT_STATUS)):
        loop.add_signal_handler(number, stopped.put_nowait, status)
    workers = Workers(config, count, form, Journal(form=form))
    await workers.start()
    for name in workers.unsafe:
        terminal.warn(f"{name} is in force: nothing that rests on it speaks of real hardware")
    if any(entry.guard is not None for entry in config.egress):
        terminal.warn(f"limits of callers count in each worker: {count} of them allow as much more")
    listen = workers.listen
    addresses = "\n".join(f"{name} listens on {', '.join(where)}" for name, where in listen.items())
    terminal.result(
        {"ready": True, "listen": listen, "unsafe": workers.unsafe, "workers": count}, addresses
    )
    status = await stopped.get()
    terminal.say("stopping: running requests may end")
    draining = asyncio.create_task(workers.drain())
    again = asyncio.create_task(stopped.get())
    await asyncio.wait({draining, again}, return_when=asyncio.FIRST_COMPLETED)
    again.cancel()
    if not draining.done():
        draining.cancel()
        await workers.close()
    return status
