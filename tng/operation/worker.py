"""One of several worker processes: takes its order on stdin, says on stdout that it is ready.

Its stdin stays open for as long as the process that ordered it lives; its end is an order to stop,
so that no worker is left behind by a killed gateway.
"""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cai.errors import CaiError
from tng.config.entries import Config
from tng.guard.desk import BootKeys
from tng.operation.journal import Journal, LogFormat
from tng.operation.service import Gateway

MAX_ORDER = 64 * 1024 * 1024
"""Longest order, bytes."""

FAILED_STATUS = 70
"""Exit status of a worker that could not start; it has said why."""


@dataclass(frozen=True, slots=True)
class Order:
    """What a worker does.

    Attributes:
        config: with the real ports, and without a control interface.
        form: of its lines.
        control: Unix socket of its own control interface.
        mark: of its sockets, where the gateway captures traffic.
        salt: of prompt caches, the same in every worker.
        receipts: Ed25519 key of receipts, raw, the same in every worker.
        own: addresses of the keeper's control interface.
    """

    config: Config
    form: LogFormat
    control: Path
    mark: int | None
    salt: bytes = field(repr=False)
    receipts: bytes = field(repr=False)
    own: tuple[tuple[str, int], ...]

    @property
    def keys(self) -> BootKeys:
        """The secrets of this run."""
        keys = BootKeys()
        keys.salt = self.salt
        keys.receipts = Ed25519PrivateKey.from_private_bytes(self.receipts)
        return keys

    def encode(self) -> bytes:
        """As it goes down the pipe, its length first."""
        data = pickle.dumps(self)
        return len(data).to_bytes(8) + data


def main() -> int:
    """Entry point of a worker process; its exit status."""
    pipe = sys.stdin.buffer
    length = int.from_bytes(pipe.read(8))
    if not 0 < length <= MAX_ORDER:
        return FAILED_STATUS
    # The pipe comes from the parent process, which has read the configuration itself.
    order = pickle.loads(pipe.read(length))  # noqa: S301
    if not isinstance(order, Order):
        return FAILED_STATUS
    return asyncio.run(_work(order))


async def _work(order: Order) -> int:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    # Ctrl-C reaches the whole group; the parent then says when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    loop.add_reader(sys.stdin.fileno(), stop.set)
    journal = Journal(form=order.form)
    try:
        gateway = Gateway(
            order.config, journal, shared=True, mark=order.mark, keys=order.keys, own=order.own
        )
        await gateway.start()
        server = await asyncio.start_unix_server(gateway.control().serve, str(order.control))
    except CaiError as error:
        _say({"error": error.message, "hint": error.hint})
        return FAILED_STATUS
    except OSError as error:
        _say({"error": str(error), "hint": ""})
        return FAILED_STATUS
    journal.start()
    try:
        _say({"ready": True, "unsafe": list(gateway.unsafe)})
        await stop.wait()
        loop.remove_reader(sys.stdin.fileno())
        await gateway.drain()
    finally:
        server.close()
        journal.close()
    return 0


def _say(told: dict[str, object]) -> None:
    os.write(sys.stdout.fileno(), json.dumps(told).encode() + b"\n")

