"""Several files at once: each goes through lanes of its own, all of it in bounded memory.

A digest goes through a file in order and limits the speed of one file; side by side, files use the
other cores.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from queue import Empty, SimpleQueue
from typing import TypeVar

from cai.errors import Interrupted
from cai.model.lanes import Lanes

MAX_FILES_AT_ONCE = 6
"""Most files that are worked on side by side; each takes about 35 MB of memory."""

SIGNAL_CHECK_S = 0.2
"""Longest time until a signal is noticed, seconds."""

Item = TypeVar("Item")


class Fleet:
    """Lanes for several files, to be used as a context manager.

    Args:
        files: how many there are to do.
        workers: threads for each of them; 0 chooses by the machine.
    """

    def __init__(self, files: int, workers: int = 0) -> None:
        cores = len(os.sched_getaffinity(0))
        self._count = max(1, min(files, cores, MAX_FILES_AT_ONCE))
        self._workers = workers or (0 if self._count == 1 else 2)
        self._free: SimpleQueue[Lanes] = SimpleQueue()
        self._stack = ExitStack()
        self._stopped = False

    def each(self, items: Iterable[Item], work: Callable[[Item, Lanes], None]) -> None:
        """Do ``work`` on every item, in the order of the items but side by side.

        Whatever the first failure raises is raised; what runs then is stopped at its next
        ``keep_on``, what waits is left out.
        """

        def one(item: Item) -> None:
            lanes = self._free.get()
            try:
                self.keep_on()
                work(item, lanes)
            finally:
                self._free.put(lanes)

        futures: list[Future[None]] = []
        ended: SimpleQueue[Future[None]] = SimpleQueue()
        with ThreadPoolExecutor(self._count, thread_name_prefix="cai-model-file") as pool:
            try:
                # A signal may come between any two of these.
                for item in items:
                    futures.append(pool.submit(one, item))
                    futures[-1].add_done_callback(ended.put)
                for _ in range(len(futures)):
                    _next(ended).result()
            except BaseException:
                self._stopped = True
                for future in futures:
                    future.cancel()
                raise

    def keep_on(self) -> None:
        """For work that takes long.

        Raises:
            Interrupted: another item failed.
        """
        if self._stopped:
            raise Interrupted("stopped, because another file failed")

    def lanes(self) -> Lanes:
        """Lanes for the caller's own use, while nothing else runs."""
        lanes = self._free.get()
        self._free.put(lanes)
        return lanes

    def __enter__(self) -> Fleet:
        for _ in range(self._count):
            self._free.put(self._stack.enter_context(Lanes(self._workers)))
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stack.close()


def _next(ended: SimpleQueue[Future[None]]) -> Future[None]:
    """The next that ended.

    A signal that comes just before a wait without end is not noticed until that ends, so the main
    thread waits in short pieces.
    """
    while True:
        try:
            return ended.get(timeout=SIGNAL_CHECK_S)
        except Empty:
            continue
