"""Forked workers: order, errors, and that none outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from cai.errors import CaiError, StorageError, Tampered
from cai.model.gocryptfs.crew import Crew, workers_for


def square(job: int, slot: memoryview) -> bytes:
    if job % 7 == 0:
        time.sleep(0.002)
    slot[:8] = (job * job).to_bytes(8, "big")
    return os.getpid().to_bytes(4, "big")


@pytest.mark.parametrize("workers", [0, 1, 2, 4])
def test_results_come_in_the_order_of_the_jobs(workers: int) -> None:
    with Crew(square, workers=workers, slot_size=64) as crew:
        seen, pids = [], set()
        for job, slot, result in crew.run(range(200)):
            assert int.from_bytes(slot[:8], "big") == job * job
            seen.append(job)
            pids.add(result)
        assert seen == list(range(200))
        assert len(pids) == max(1, workers)
        assert (os.getpid().to_bytes(4, "big") in pids) == (workers == 0)
        assert [job for job, _, _ in crew.run([3, 1])] == [3, 1]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_comes_in_the_place_of_its_job(workers: int) -> None:
    def work(job: int, slot: memoryview) -> bytes:
        if job == 5:
            raise Tampered("block 5", path="data/x", hint="h", code="c")
        return b""

    with Crew(work, workers=workers, slot_size=8) as crew:
        results = crew.run(range(50))
        assert [next(results)[0] for _ in range(5)] == [0, 1, 2, 3, 4]
        with pytest.raises(Tampered) as caught:
            next(results)
    error = caught.value
    assert (error.message, error.path, error.hint, error.machine_code) == (
        "block 5", "data/x", "h", "c",
    )


def test_other_errors_of_a_worker() -> None:
    def work(job: int, slot: memoryview) -> bytes:
        if job == 0:
            raise PermissionError(13, "Permission denied", "f")
        raise ZeroDivisionError

    for job, kind in ((0, StorageError), (1, CaiError)):
        with Crew(work, workers=1, slot_size=8) as crew, pytest.raises(kind):
            list(crew.run([job]))


def test_a_killed_worker_is_an_error_and_no_endless_wait() -> None:
    def work(job: int, slot: memoryview) -> bytes:
        os.kill(os.getpid(), signal.SIGKILL)
        return b""

    with Crew(work, workers=2, slot_size=8) as crew, pytest.raises(CaiError, match="worker"):
        list(crew.run(range(10)))


def test_what_the_source_of_jobs_raises_is_raised() -> None:
    def jobs() -> Iterator[int]:
        yield 1
        raise StorageError("gone")

    with Crew(square, workers=2, slot_size=8) as crew, pytest.raises(StorageError):
        list(crew.run(jobs()))


def test_workers_end_with_a_killed_parent() -> None:
    program = (
        "import os, sys, time\n"
        "from cai.model.gocryptfs.crew import Crew\n"
        "def work(job, slot):\n"
        "    os.write(1, b'%d\\n' % os.getpid())\n"
        "    time.sleep(60)\n"
        "    return b''\n"
        "list(Crew(work, workers=2, slot_size=8).run([1, 2]))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout is not None
    pids = [int(process.stdout.readline()) for _ in range(2)]
    process.kill()
    process.wait()
    end = time.monotonic() + 5
    while time.monotonic() < end and any(os.path.exists(f"/proc/{pid}") for pid in pids):  # noqa: PTH110
        time.sleep(0.02)
    assert not [pid for pid in pids if alive(pid)]


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False


def test_how_many() -> None:
    assert workers_for(1000) == 0
    assert workers_for(1 << 30, 3) == 3
    assert workers_for(1 << 30) >= 2
    assert workers_for(1 << 30, 100) == 8
