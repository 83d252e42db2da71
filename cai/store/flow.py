"""Many transfers at once: bounded, the first error ends them all, none is left running behind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

from cai.errors import UsageError
from cai.store.base import MAX_WORKERS, WORKERS

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


class Flow:
    """A pool of threads, to be used as a context manager.

    Args:
        workers: how many transfers are under way at once; 0 for the usual number.
        on_failure: called before a failed run waits for what is still under way.

    Raises:
        UsageError: more than ``MAX_WORKERS``.
    """

    def __init__(self, workers: int = 0, on_failure: Callable[[], None] | None = None) -> None:
        if not 0 <= workers <= MAX_WORKERS:
            raise UsageError(f"{workers} transfers at once, expected 1 to {MAX_WORKERS}")
        self.workers = workers or WORKERS
        self._on_failure = on_failure
        self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="cai-store")

    def each(
        self, jobs: Iterable[_Job], work: Callable[[_Job], _Result]
    ) -> Iterator[tuple[_Job, _Result]]:
        """Do ``work`` on every job; yield each with its result, as they end.

        Jobs are taken only as fast as they are done, so that an endless iterator is fine. What a
        job raises is raised here, after those that run have ended; the others never start.
        """
        running: dict[Future[_Result], _Job] = {}
        source = iter(jobs)
        exhausted = False
        try:
            while True:
                while not exhausted and len(running) < self.workers + 1:
                    try:
                        job = next(source)
                    except StopIteration:
                        exhausted = True
                        break
                    running[self._pool.submit(work, job)] = job
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job = running.pop(future)
                    yield job, future.result()
        except BaseException:
            if self._on_failure:
                self._on_failure()
            raise
        finally:
            for future in running:
                future.cancel()
            wait(running)

    def all(self, jobs: Iterable[_Job], work: Callable[[_Job], _Result]) -> None:
        """Do ``work`` on every job."""
        for _ in self.each(jobs, work):
            pass

    def __enter__(self) -> Flow:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
