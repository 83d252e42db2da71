"""One line for each thing that happened, on stderr; never a path, a header or a body of a request.

Names and addresses come from outside, so everything that is not printable is replaced. Lines leave
by a thread: a reader that is slow, or gone, holds up no request, and what it has no room for is
dropped and counted.
"""

from __future__ import annotations

import asyncio
import json
import queue
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from enum import StrEnum
from typing import TextIO

from cai.errors import CaiError, UsageError
from cai.settings import suggestion
from tng.operation.accesslog import Access
from tng.operation.metrics import Meters

MAX_LINE = 600
"""Longest text of a line, characters."""

MAX_WAITING = 10_000
"""Most lines that wait for a slow reader; the newest are dropped beyond them."""

GATHER_S = 0.05
"""How long lines are gathered before the thread gets them, seconds."""

CLOSE_S = 1.0
"""Longest wait at the end for the last lines to leave, seconds."""


class LogFormat(StrEnum):
    """How lines look."""

    TEXT = "text"
    JSON = "json"


def log_format(name: str) -> LogFormat:
    """The format of ``--log-format`` or ``TNG_LOG_FORMAT``.

    Raises:
        UsageError: there is no such one.
    """
    known = [item.value for item in LogFormat]
    if name not in known:
        raise UsageError(
            f"log format {name!r} is unknown", hint=suggestion(name, known) or "use text or json"
        )
    return LogFormat(name)


class Journal:
    """Writes lines and counts what they tell.

    Args:
        out: where to, at once; by default the process's stderr, by a thread once ``start`` ran.
        form: how lines look.
        meters: what is counted.
    """

    def __init__(
        self,
        out: TextIO | None = None,
        *,
        form: LogFormat = LogFormat.TEXT,
        meters: Meters | None = None,
    ) -> None:
        self.meters = meters or Meters()
        self._out = out
        self._form = form
        self._listeners: list[Callable[[Access], None]] = []
        self._thread: _Writer | None = None

    def start(self) -> None:
        """From now on lines leave by a thread (inside a running loop)."""
        if self._thread is None:
            self._thread = _Writer(self._write, self._dropped)

    def close(self) -> None:
        """Write what waits, then at once again."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.close()

    def listen(self, listener: Callable[[Access], None]) -> None:
        """Also tell ``listener`` of every request that ends (traces)."""
        self._listeners.append(listener)

    def line(self, text: str) -> None:
        """Write one line with its time."""
        now = datetime.now(UTC)
        clean = _printable(text)
        if self._form is LogFormat.JSON:
            self._put(_json({"time": _stamp(now), "kind": "event", "text": clean}))
        else:
            self._put(f"tng: {now:%H:%M:%S} {clean}\n")

    def access(self, access: Access) -> None:
        """Write and count one request that ended."""
        self.meters.requests.add(1, access.entry, str(access.status))
        for listener in self._listeners:
            listener(access)
        now = datetime.now(UTC)
        if self._form is LogFormat.JSON:
            told = {
                name: _printable(value) if isinstance(value, str) else value
                for name, value in access.to_json().items()
            }
            self._put(_json({"time": _stamp(now), "kind": "access", **told}))
        else:
            self._put(f"tng: {now:%H:%M:%S} {_printable(access.text())}\n")

    def refused(self, entry: str, error: CaiError) -> None:
        """Count a refusal; the line about it is the caller's."""
        self.meters.refusals.add(1, entry, error.machine_code)

    def _put(self, line: str) -> None:
        if self._thread is None:
            self._write(line)
        else:
            self._thread.put(line)

    def _write(self, text: str) -> None:
        out = self._out or sys.stderr
        try:
            out.write(text)
            out.flush()
        except (OSError, ValueError):
            # A full or closed log may not stop the traffic; there is nowhere left to say so.
            return

    def _dropped(self, count: int) -> None:
        self.meters.lines_dropped.add(count)


class _Writer:
    """A thread that writes; lines reach it in bundles, so that a request wakes nobody."""

    def __init__(self, write: Callable[[str], None], dropped: Callable[[int], None]) -> None:
        self._write = write
        self._dropped = dropped
        self._loop = asyncio.get_running_loop()
        self._lines: list[str] = []
        # Each count has one writer: this one the loop, the other one the thread.
        self._handed = 0
        self._written = 0
        self._bundles: queue.SimpleQueue[list[str] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="tng journal", daemon=True)
        self._thread.start()

    def put(self, line: str) -> None:
        """Take one line, or drop it."""
        if self._handed - self._written + len(self._lines) >= MAX_WAITING:
            self._dropped(1)
            return
        if not self._lines and not self._loop.is_closed():
            self._loop.call_later(GATHER_S, self._hand_over)
        self._lines.append(line)

    def close(self) -> None:
        """Write what waits, for at most ``CLOSE_S``."""
        self._hand_over()
        self._bundles.put(None)
        self._thread.join(CLOSE_S)

    def _hand_over(self) -> None:
        if self._lines:
            self._handed += len(self._lines)
            self._bundles.put(self._lines)
            self._lines = []

    def _run(self) -> None:
        while (bundle := self._bundles.get()) is not None:
            self._write("".join(bundle))
            self._written += len(bundle)


def endpoint_text(address: object) -> str:
    """A socket address as ``host:port`` or a Unix path."""
    if isinstance(address, tuple) and len(address) >= 2:
        host, port = str(address[0]), address[1]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return str(address or "local")


def _printable(text: str) -> str:
    clean = text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)
    return clean if len(clean) <= MAX_LINE else clean[: MAX_LINE - 1] + "…"


def _stamp(now: datetime) -> str:
    return f"{now:%Y-%m-%dT%H:%M:%S}.{now.microsecond // 1000:03d}Z"


def _json(value: dict[str, object]) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":")) + "\n"
