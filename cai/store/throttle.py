"""A bandwidth limit that all transfers of one push or pull share."""

from __future__ import annotations

import re
import threading
import time

from cai.errors import Interrupted, UsageError

MIN_RATE, MAX_RATE = 1024, 10**12
"""Smallest and largest limit, bytes a second."""

_RATE = re.compile(r"(\d{1,12})([kKMG]?)(i?)B?(?:/s)?")
_POWER = {"": 0, "k": 1, "K": 1, "M": 2, "G": 3}


class Throttle:
    """Hands out bytes at a steady rate; safe from any thread.

    Args:
        rate: bytes a second; 0 for no limit.
    """

    def __init__(self, rate: int = 0) -> None:
        self.rate = rate
        self._free_at = 0.0
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def __call__(self, amount: int) -> None:
        """Wait until ``amount`` more bytes may travel.

        Raises:
            Interrupted: ``stop`` was called.
        """
        if self._stopped.is_set():
            raise Interrupted("the transfer was stopped")
        if not self.rate:
            return
        with self._lock:
            now = time.monotonic()
            wait = max(0.0, self._free_at - now)
            self._free_at = now + wait + amount / self.rate
        if wait and self._stopped.wait(wait):
            raise Interrupted("the transfer was stopped")

    def stop(self) -> None:
        """Let no more bytes travel: one transfer failed, or somebody pressed Ctrl-C."""
        self._stopped.set()


def parse_rate(text: str) -> int:
    """Bytes a second from ``20M``, ``512KiB``, ``1G/s``: ``K`` is 1000, ``Ki`` is 1024.

    Raises:
        UsageError: another form, or outside of the limits.
    """
    match = _RATE.fullmatch(text.strip())
    if match and not (match[3] and not match[2]):
        rate: int = int(match[1]) * (1024 if match[3] else 1000) ** _POWER[match[2]]
        if MIN_RATE <= rate <= MAX_RATE:
            return rate
    raise UsageError(
        f"{text!r} is not a rate from 1 KiB to 1 TB a second", hint="for example 20M or 512KiB"
    )
