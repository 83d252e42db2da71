"""How many calls one slow place takes on at once.

A service that hangs must not hold every thread of the broker: a few callers wait for it, the others
are told at once that it is not available.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from cai.errors import Unavailable

MAX_CALLS: Final = 8
"""Most calls to one place at once."""

WAIT_SECONDS: Final = 2.0
"""How long a further caller waits for its turn, seconds."""


class Gate:
    """Lets a few callers through.

    Args:
        what: names the place in errors.
        calls: most at once.
        wait_s: how long a further one waits.
    """

    def __init__(
        self, what: str, *, calls: int = MAX_CALLS, wait_s: float = WAIT_SECONDS
    ) -> None:
        self._what = what
        self._free = threading.BoundedSemaphore(calls)
        self._wait = wait_s

    @contextmanager
    def passing(self) -> Iterator[None]:
        """One call.

        Raises:
            Unavailable: too many others wait for the same place.
        """
        if not self._free.acquire(timeout=self._wait):
            raise Unavailable(
                f"{self._what} does not answer the calls that it already has",
                hint="try again in a moment; nothing was changed",
                code="keys-unavailable",
            )
        try:
            yield
        finally:
            self._free.release()
