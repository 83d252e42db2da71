"""Worker threads with fixed memory that hand their results back in order.

Enciphering, reading and writing release the interpreter lock, so they run in threads; hashes need
the bytes in order, so they run where the results are taken. Memory is bounded by the slots,
whatever the size of the model.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

from cai.model.layout import MIN_CHUNK_LOG2, TAG_SIZE
from cai.model.object import Shape
from cai.model.reader import ObjectReader

BATCH = 4 * 1024 * 1024
"""Plaintext bytes of one unit of work; also the largest chunk."""

MAX_WORKERS = 4
"""Most threads: the ordered hashing behind them keeps up with no more."""

Job = TypeVar("Job")
Result = TypeVar("Result")


class Slot:
    """Memory of one unit of work: its plaintext, and its ciphertext with room for the tags."""

    def __init__(self) -> None:
        self.plain = memoryview(bytearray(BATCH))
        self.sealed = memoryview(bytearray(BATCH + (BATCH >> MIN_CHUNK_LOG2) * TAG_SIZE))


class Lanes:
    """A pool of threads and slots, to be used as a context manager.

    Args:
        workers: number of threads; 0 chooses by the machine.
    """

    def __init__(self, workers: int = 0) -> None:
        # One core is left to the hashing behind them; more threads than the other cores only wait
        # for each other's writes to one file.
        count = workers or min(MAX_WORKERS, max(1, (os.cpu_count() or 2) - 1))
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="cai-model")
        self._aside = ThreadPoolExecutor(1, thread_name_prefix="cai-model-aside")
        self._slots = [Slot() for _ in range(count + 2)]

    def aside(self, work: Callable[[], None]) -> Future[None]:
        """Do something beside the consumer, in the order of the calls, one after the other."""
        return self._aside.submit(work)

    def run(
        self, jobs: Iterable[Job], work: Callable[[Job, Slot], Result]
    ) -> Iterator[tuple[Job, Slot, Result]]:
        """Do ``work`` on every job; yield each with its slot, in the order of the jobs.

        A slot belongs to the consumer until it asks for the next result. Whatever a job raises is
        raised in its place; jobs behind it are cancelled or waited for.
        """
        pending: deque[tuple[Job, Slot, Future[Result]]] = deque()
        free = list(self._slots)
        source = iter(jobs)
        exhausted = False
        try:
            while True:
                while free and not exhausted:
                    try:
                        job = next(source)
                    except StopIteration:
                        exhausted = True
                        break
                    slot = free.pop()
                    pending.append((job, slot, self._pool.submit(work, job, slot)))
                if not pending:
                    return
                job, slot, future = pending[0]
                result = future.result()
                pending.popleft()
                yield job, slot, result
                free.append(slot)
        finally:
            for _, _, future in pending:
                future.cancel()
            wait([future for _, _, future in pending])

    def __enter__(self) -> Lanes:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._aside.shutdown(wait=True, cancel_futures=True)


def batches(shape: Shape) -> Iterator[tuple[int, int]]:
    """The object's chunks as units of work: (first chunk, number of chunks)."""
    step = BATCH // shape.chunk
    for first in range(0, shape.chunks, step):
        yield first, min(step, shape.chunks - first)


def opened(
    reader: ObjectReader, lanes: Lanes, sink: Callable[[int, memoryview], None] | None = None
) -> Iterator[tuple[int, memoryview, list[memoryview]]]:
    """Stream a whole object: (offset, plaintext, ciphertext of each chunk), verified, in order.

    Args:
        reader: the object.
        lanes: where it is decrypted.
        sink: called in the workers with the offset and each verified batch, in any order.

    Raises:
        Tampered, StorageError: as ``ObjectReader.read_chunks``, or what ``sink`` raises.
    """
    shape = reader.shape

    def work(job: tuple[int, int], slot: Slot) -> tuple[memoryview, list[memoryview]]:
        first, count = job
        length = min(count * shape.chunk, shape.size - first * shape.chunk)
        plain = slot.plain[:length]
        sealed = reader.read_chunks(first, count, slot.sealed, plain)
        if sink is not None:
            sink(first * shape.chunk, plain)
        return plain, sealed

    for (first, _), _slot, (plain, sealed) in lanes.run(batches(shape), work):
        offset = first * shape.chunk
        yield offset, plain, sealed
        reader.forget(offset, len(plain))
