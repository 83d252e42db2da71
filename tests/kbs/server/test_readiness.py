"""Readiness follows the database; liveness does not. Verification has its own bounded threads."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from cai.errors import StorageError, TooBusy
from kbs.server import readiness
from kbs.server.crew import Crew
from kbs.server.settings import LimitSettings
from tests.kbs.world import Site


@pytest.mark.parametrize("app", ["main", "admin"])
def test_ready_only_while_the_database_answers(
    site: Site, monkeypatch: pytest.MonkeyPatch, app: str
) -> None:
    assert site.call("GET", "/readyz", app=app).json() == {"status": "ready"}

    @contextmanager
    def refused() -> Iterator[Any]:
        raise StorageError("gone")
        yield

    monkeypatch.setattr(site.broker.core.database, "read", refused)
    answer = site.call("GET", "/readyz", app=app)
    assert (answer.status_code, answer.json()["status"]) == (503, "the database does not answer")
    assert site.call("GET", "/healthz", app=app).status_code == 200
    monkeypatch.undo()
    assert site.call("GET", "/readyz", app=app).status_code == 200


def test_a_database_that_hangs_is_not_ready(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "READY_SECONDS", 0.2)
    ended = threading.Event()

    @contextmanager
    def hanging() -> Iterator[Any]:
        ended.wait(10)
        raise StorageError("late")
        yield

    monkeypatch.setattr(site.broker.core.database, "read", hanging)
    threading.Timer(1.0, ended.set).start()
    assert site.call("GET", "/readyz").status_code == 503


def test_verifications_are_bounded_and_releases_go_on() -> None:
    async def story() -> None:
        crew = Crew(LimitSettings(verifiers=1, waiting=1))
        hold = threading.Event()
        running = [asyncio.create_task(crew.verify(hold.wait, 10)) for _ in range(2)]
        await asyncio.sleep(0.05)
        with pytest.raises(TooBusy):
            await crew.verify(time.sleep, 0)
        # What is quick does not wait behind what is slow.
        assert await crew.quick(sum, [1, 2]) == 3
        hold.set()
        assert await asyncio.gather(*running) == [True, True]
        assert await crew.verify(sum, [2, 3]) == 5
        crew.close()

    asyncio.run(story())


def test_what_fails_in_a_thread_fails_here_and_makes_room() -> None:
    async def story() -> None:
        crew = Crew(LimitSettings(verifiers=1, waiting=0))
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                await crew.verify(divmod, 1, 0)
        crew.close()

    asyncio.run(story())
