"""Leaves: their bytes, what they refuse, and what they never hold."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from cai import jcs
from cai.errors import CaiError
from kbs.audit.leaf import Change, Entry, change_of, encode_time, parse_leaf, plain, time_of

NOW = datetime(2026, 1, 2, 3, 4, 5, 678999, tzinfo=UTC)


def encode(**members: Any) -> bytes:
    entry = Entry("test", {"kind": "system"}, "00" * 16, allowed=True, **members)
    return entry.encode(
        instance="ab" * 16, realm="production", seq=4, changes=2, checkpoint=3, at=NOW
    )


def test_a_leaf_says_what_it_was_given() -> None:
    change = Change("resource/a/b/c", 3, "cd" * 32)
    leaf = parse_leaf(encode(change=change, served=2, details={"count": 1}))
    assert (leaf["seq"], leaf["changes"], leaf["checkpoint"]) == (4, 2, 3)
    assert change_of(leaf) == change
    assert (leaf["served"], leaf["details"]) == (2, {"count": 1})
    assert time_of(leaf) == NOW.replace(microsecond=678000)
    plainest = parse_leaf(encode())
    assert change_of(plainest) is None
    assert not {"change", "served", "details"} & set(plainest)


def test_what_counts_as_administrative() -> None:
    change = Change("lease/x", 1, "")
    assert not Entry("release", {}, "", allowed=True).counts
    assert Entry("resource.set", {}, "", allowed=True, change=change).counts
    assert not Entry("lease", {}, "", allowed=True, change=change, administrative=False).counts
    assert Entry("settings", {}, "", allowed=True, administrative=True).counts


def test_text_from_outside_is_made_plain() -> None:
    assert plain("a\nb\x1b[31m\u202e") == "a\ufffdb\ufffd[31m\ufffd"
    assert len(plain("x" * 10_000)) == 512
    leaf = parse_leaf(encode(reason="\ud800" * 2, subject="a\x00b"))
    assert leaf["subject"] == "a\ufffdb"
    assert "\ud800" not in leaf["reason"]


def test_times_are_utc() -> None:
    east = NOW.astimezone(timezone(timedelta(hours=9)))
    assert encode_time(east) == encode_time(NOW) == "2026-01-02T03:04:05.678Z"


@pytest.mark.parametrize("change", [
    {"time": "2026-01-02T03:04:05Z"}, {"time": "2026-01-02T03:04:05.6780Z"}, {"time": 1},
    {"time": "2026-13-02T03:04:05.678Z"}, {"time": "yesterday"}, {"time": None},
])  # fmt: skip
def test_other_times_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(CaiError):
        time_of({**parse_leaf(encode()), **change})


@pytest.mark.parametrize("change", [
    {}, {"object": "a", "version": 1}, {"object": 1, "version": 1, "row_hash": ""},
    {"object": "a", "version": "1", "row_hash": ""}, {"object": "a", "version": 1, "row_hash": 2},
    {"object": "a", "version": True, "row_hash": ""}, [], "a",
    {"object": "a", "version": 1, "row_hash": "", "more": 1},
])  # fmt: skip
def test_other_changes_are_refused(change: Any) -> None:
    with pytest.raises(CaiError):
        change_of({"change": change})


@pytest.mark.parametrize("leaf", [
    b"", b"{}", b"[]", b"\xff", encode() + b"\n",
    encode().replace(b'"cai-audit":1', b'"cai-audit":2'),
    jcs.canonical({"cai-audit": 1, "x": "y"}).replace(b'"x"', b'"\\u0078"'),
])  # fmt: skip
def test_other_leaves_are_refused(leaf: bytes) -> None:
    with pytest.raises(CaiError):
        parse_leaf(leaf)
