"""Forked workers with shared memory that hand their results back in order.

Blocks of 4 KiB keep the interpreter's lock too busy for threads, so the work goes to processes:
forked, because keys cannot be passed on in any other way, and with shared memory, because what they
read and encrypt is hashed in order where the results are taken. Memory is bounded by the slots.

Example::

    def work(job: tuple[str, int], slot: memoryview) -> bytes: ...   # runs in a worker

    with Crew(work, workers=2, slot_size=1 << 20) as crew:
        for job, slot, result in crew.run(jobs):   # in the order of the jobs
            ...
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import os
import pickle
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, Generic, TypeVar

from cai import errors
from cai.errors import CaiError, Tampered, from_os_error

MAX_WORKERS = 8
"""Most workers: the ordered hashing behind them keeps up with no more."""

AHEAD = 2
"""Jobs that a worker has at once, so that it need not wait for the next."""

_PR_SET_PDEATHSIG = 1

Job = TypeVar("Job")
Work = Callable[[Job, memoryview], bytes]


class Crew(Generic[Job]):
    """Workers that do one kind of work, to be used as a context manager.

    They are forked when it is made: everything that the work needs must be there by then, and no
    display's threads should be. They end with this process, however it ends.

    Args:
        work: does a job with a slot's memory and gives a short result; runs in a worker, and may
            raise ``CaiError`` and ``OSError``.
        workers: processes; 0 does the work in this one.
        slot_size: bytes of a slot.
    """

    def __init__(self, work: Work[Job], *, workers: int, slot_size: int) -> None:
        self._work = work
        count = AHEAD * workers + 1
        self._memory = memoryview(mmap.mmap(-1, max(1, count * slot_size)))
        self._slots = [self._memory[i * slot_size : (i + 1) * slot_size] for i in range(count)]
        self._workers: list[tuple[int, Connection[Any, Any]]] = []
        try:
            for _ in range(workers):
                self._workers.append(self._start())
        except OSError as error:
            self.close()
            raise from_os_error(error, "start a worker") from error

    def run(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, memoryview, bytes]]:
        """Do every job; yield each with its slot and its result, in the order of the jobs.

        A slot belongs to the consumer until it asks for the next result. After an exception the
        crew can only be closed.

        Raises:
            CaiError: what a job raised, in its place.
        """
        if not self._workers:
            for job in jobs:
                yield job, self._slots[0], self._done_here(job)
            return
        source = enumerate(jobs)
        exhausted = False
        waiting: deque[tuple[int, Job, int]] = deque()
        free = list(range(len(self._slots)))
        load = {connection: 0 for _, connection in self._workers}
        results: dict[int, tuple[bytes, tuple[Any, ...] | None]] = {}
        while True:
            while free and not exhausted:
                connection = min(load, key=lambda item: load[item])
                if load[connection] >= AHEAD:
                    break
                item = next(source, None)
                if item is None:
                    exhausted = True
                    break
                slot = free.pop()
                waiting.append((item[0], item[1], slot))
                _send(connection, (item[0], slot, item[1]))
                load[connection] += 1
            if not waiting:
                return
            number, job, slot = waiting[0]
            if number not in results:
                busy = [one for one, jobs_of in load.items() if jobs_of]
                ready = wait(busy)
                for connection in (one for one in busy if one in ready):
                    done, result, failure = _receive(connection)
                    results[done] = result, failure
                    load[connection] -= 1
                continue
            result, failure = results.pop(number)
            if failure is not None:
                raise _unpacked(failure)
            waiting.popleft()
            yield job, self._slots[slot], result
            free.append(slot)

    def close(self) -> None:
        """End the workers, whatever they do."""
        workers, self._workers = self._workers, []
        for _, connection in workers:
            connection.close()
        for pid, _ in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)

    def __enter__(self) -> Crew[Job]:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _done_here(self, job: Job) -> bytes:
        try:
            return self._work(job, self._slots[0])
        except OSError as error:
            raise _from_os_error(error) from error

    def _start(self) -> tuple[int, Connection[Any, Any]]:
        ours, theirs = Pipe()
        parent = os.getpid()
        pid = os.fork()
        if pid:
            theirs.close()
            return pid, ours
        try:
            # A later worker must not keep an earlier one's pipe open.
            for _, connection in self._workers:
                connection.close()
            ours.close()
            self._serve(theirs, parent)
        except BaseException:  # noqa: S110 - nothing of the parent's stack may run in here
            pass
        finally:
            os._exit(0)

    def _serve(self, connection: Connection[Any, Any], parent: int) -> None:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # They are for the parent, which ends its workers.
            signal.signal(number, signal.SIG_IGN)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            return
        gc.freeze()
        while True:
            try:
                number, slot, job = connection.recv()
            except EOFError:
                return
            failure: tuple[Any, ...] | None = None
            result = b""
            try:
                result = self._work(job, self._slots[slot])
            except CaiError as error:
                failure = _packed(error)
            except OSError as error:
                failure = _packed(_from_os_error(error))
            except Exception as error:
                failure = _packed(CaiError(f"a worker failed: {type(error).__name__}"))
            connection.send((number, result, failure))


def workers_for(size: int, wanted: int = 0) -> int:
    """How many workers suit a total of ``size`` bytes; none for what is done before they start."""
    if size < 8 * 1024 * 1024:
        return 0
    return min(MAX_WORKERS, wanted or max(2, len(os.sched_getaffinity(0))))


def _send(connection: Connection[Any, Any], message: tuple[Any, ...]) -> None:
    try:
        connection.send(message)
    except OSError as error:
        raise CaiError("a worker ended before its work was done") from error


def _receive(connection: Connection[Any, Any]) -> tuple[int, bytes, tuple[Any, ...] | None]:
    try:
        number, result, failure = connection.recv()
    except (EOFError, OSError, pickle.UnpicklingError) as error:
        raise CaiError("a worker ended before its work was done") from error
    return number, result, failure


def _from_os_error(error: OSError) -> CaiError:
    return from_os_error(error, f"use {error.filename or 'a file'}")


def _packed(error: CaiError) -> tuple[Any, ...]:
    path = error.path if isinstance(error, Tampered) else None
    return type(error).__name__, error.message, error.hint, error.machine_code, path


def _unpacked(packed: tuple[Any, ...]) -> CaiError:
    name, message, hint, code, path = packed
    if name == Tampered.__name__:
        return Tampered(message, path=path, hint=hint, code=code)
    kind: type[CaiError] = getattr(errors, str(name), CaiError)
    return kind(message, hint=hint, code=code)
