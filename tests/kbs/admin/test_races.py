"""Administrators who act at the same moment, on SQLite and on PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kbs.admin.settings import AdminSettings, TwoPerson
from kbs.server.config import ServeSettings
from kbs.server.service import open_broker
from tests.kbs.admin.crew import Person, first, hire, switch
from tests.kbs.world import SECRET_TEXT, Clock, Site

ROUNDS = 4


@pytest.fixture(params=["sqlite", "postgresql"])
def either(
    request: pytest.FixtureRequest, tmp_path: Path, platform_dir: Path, clock: Clock
) -> Iterator[Site]:
    """A broker on either engine."""
    settings = ServeSettings(
        tmp_path / "data", "127.0.0.1:0", "127.0.0.1:0",
        unsafe_simulated_root=platform_dir / "anchors",
    )  # fmt: skip
    if request.param == "postgresql":
        cluster = request.getfixturevalue("postgres")
        settings = replace(settings, database=cluster.settings(cluster.create()))
    broker = open_broker(settings, clock=clock)
    yield Site(broker, settings, clock)
    broker.close()


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(calls)) as pool:
        return [task.result() for task in [pool.submit(call) for call in calls]]


def test_the_last_signature_applies_a_change_once(either: Site) -> None:
    people = [first(either), *(hire(either, name, "resource") for name in ("alice", "bob"))]
    switch(either, AdminSettings(two_person=TwoPerson()))
    for number in range(ROUNDS):
        path = f"models/race/{number}"
        shown = people[0].call("POST", f"resource/{path}", SECRET_TEXT).json()
        answers = at_once(*(partial(who.sign, shown) for who in people))
        applied = [answer for answer in answers if answer.json().get("applied") is True]
        assert len(applied) == 1, [answer.text for answer in answers]
        # The third came too late: there is nothing left to sign.
        assert sorted(answer.status_code for answer in answers) == [200, 200, 404]
        rows = [row for row in either.audit()
                if row["action"] == "resource.set" and row["subject"] == path]  # fmt: skip
        assert len(rows) == 1


def test_of_two_proposals_about_one_object_one_is_void(either: Site) -> None:
    alice, bob = (hire(either, name, "resource") for name in ("alice", "bob"))
    switch(either, AdminSettings(two_person=TwoPerson()))
    for number in range(ROUNDS):
        path = f"models/race/{number}"
        one, two = (
            alice.call("POST", f"resource/{path}", text).json() for text in (b"one", b"two")
        )
        for shown in (one, two):
            alice.sign(shown)
        answers = at_once(partial(bob.sign, one), partial(bob.sign, two))
        assert sorted(answer.status_code for answer in answers) == [200, 409]
        assert either.last("resource.set")["change"]["version"] == 1


def test_two_who_take_the_same_key_are_not_both_added(either: Site) -> None:
    boss = first(either)
    for number in range(ROUNDS):
        key = Person(either, "x").public
        record = {"key": key, "roles": ["auditor"]}
        answers = at_once(
            *(
                partial(boss.call, "POST", f"admin/{name}{number}", record)
                for name in ("alice", "bob")
            )
        )
        assert sorted(answer.status_code for answer in answers) == [200, 409]


def test_the_last_two_do_not_remove_each_other(either: Site) -> None:
    boss, other = first(either), hire(either, "other", "admin")
    answers = at_once(
        partial(boss.call, "DELETE", "admin/other"), partial(other.call, "DELETE", "admin/admin")
    )
    assert sorted(answer.status_code for answer in answers) in ([200, 401], [200, 409])
    left = [p for p in (boss, other) if p.call("GET", "whoami").status_code == 200]
    assert len(left) == 1
