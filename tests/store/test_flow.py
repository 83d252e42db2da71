"""Many transfers at once: bounded, the first error ends them all."""

from __future__ import annotations

import itertools
import threading
import time

import pytest

from cai.errors import Tampered, UsageError
from cai.store.flow import Flow


def test_results_come_with_their_jobs() -> None:
    with Flow(3) as flow:
        assert sorted(flow.each(range(50), lambda n: n * n)) == [(n, n * n) for n in range(50)]


def test_jobs_are_taken_only_as_fast_as_they_are_done() -> None:
    taken = itertools.count()
    with Flow(2) as flow:
        for number, (_job, _result) in enumerate(flow.each(taken, lambda n: n)):
            if number == 20:
                break
    assert next(taken) < 30


def test_the_first_error_ends_everything() -> None:
    started: list[int] = []
    stopped = threading.Event()

    def work(number: int) -> None:
        started.append(number)
        if number == 3:
            raise Tampered("piece 3")
        stopped.wait(0.05)

    with Flow(2, stopped.set) as flow, pytest.raises(Tampered, match="piece 3"):
        flow.all(range(1000), work)
    assert stopped.is_set()
    assert len(started) < 10
    known = len(started)
    time.sleep(0.1)
    assert len(started) == known


def test_limits() -> None:
    for workers in (-1, 65):
        with pytest.raises(UsageError):
            Flow(workers)
