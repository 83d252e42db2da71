"""The threads that do what an event loop must not: verification, decisions, the database.

Verification of evidence is the expensive part and anybody can ask for it, so it has threads of its
own, no more than there are processors, and a bounded queue: beyond it a client is told to come back
rather than left waiting, and releases to guests that are already attested go on beside it.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from cai.errors import TooBusy
from kbs.server.settings import LimitSettings

QUICK_THREADS = 16
"""Threads for everything that is not verification."""

P = ParamSpec("P")
T = TypeVar("T")


class Crew:
    """The threads of one process.

    Args:
        limits: how many verifications run and wait.
    """

    def __init__(self, limits: LimitSettings) -> None:
        self._verifiers = ThreadPoolExecutor(limits.verifiers, "kbs-verify")
        self._quick = ThreadPoolExecutor(QUICK_THREADS, "kbs-quick")
        self._room = limits.verifiers + limits.waiting
        self._lock = threading.Lock()
        self._inside = 0

    async def quick(self, work: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
        """Run something that takes milliseconds, or waits for the database."""
        return await _run(self._quick, work, *args, **named)

    async def verify(self, work: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
        """Run something that verifies evidence.

        Raises:
            TooBusy: as many wait already as may.
        """
        with self._lock:
            if self._inside >= self._room:
                raise TooBusy("too many verifications at once", hint="try again in a second")
            self._inside += 1
        try:
            return await _run(self._verifiers, work, *args, **named)
        finally:
            with self._lock:
                self._inside -= 1

    def close(self) -> None:
        """End the threads after what they are doing."""
        for pool in (self._verifiers, self._quick):
            pool.shutdown(wait=True, cancel_futures=True)


async def _run(
    pool: ThreadPoolExecutor, work: Callable[P, T], *args: P.args, **named: P.kwargs
) -> T:
    context = contextvars.copy_context()
    call = functools.partial(context.run, work, *args, **named)
    return await asyncio.get_running_loop().run_in_executor(pool, call)
