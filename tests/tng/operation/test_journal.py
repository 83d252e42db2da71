"""Lines: one a request, in both formats, without content, and never in the way of the traffic."""

from __future__ import annotations

import asyncio
import io
import json
import threading
import time

import pytest

from cai.errors import PeerError, UsageError
from tng.operation.accesslog import Access
from tng.operation.journal import MAX_LINE, MAX_WAITING, Journal, LogFormat, log_format

ACCESS = Access(
    "ingress[0]", "POST", "127.0.0.1:4000", "guest:8080", 200, 12, 5, 700, "cai/1", "alice"
)


def test_an_access_line_for_machines() -> None:
    out = io.StringIO()
    Journal(out, form=LogFormat.JSON).access(ACCESS)
    assert out.getvalue().count("\n") == 1
    told = json.loads(out.getvalue())
    assert told.pop("time").endswith("Z")
    assert told == {
        "kind": "access", "entry": "ingress[0]", "what": "POST", "client": "127.0.0.1:4000",
        "peer": "guest:8080", "status": 200, "ms": 12, "sent": 5, "received": 700,
        "attested": "cai/1", "caller": "alice",
    }  # fmt: skip


def test_an_access_line_for_people() -> None:
    out = io.StringIO()
    Journal(out).access(ACCESS)
    assert out.getvalue().count("\n") == 1
    for part in ("ingress[0] 127.0.0.1:4000 POST guest:8080 -> 200", "12 ms", "caller alice"):
        assert part in out.getvalue()


@pytest.mark.parametrize("form", list(LogFormat))
def test_nothing_that_comes_from_outside_breaks_a_line(form: LogFormat) -> None:
    out = io.StringIO()
    journal = Journal(out, form=form)
    journal.line("a\r\nb\x1b[2J" + "x" * 5000)
    journal.access(Access("e", "GET\n", peer="\x00\u202e", status=1, message="m" * 5000))
    assert out.getvalue().count("\n") == 2
    for bad in ("\r", "\x1b", "\x00", "\u202e"):
        assert bad not in out.getvalue()
    assert all(len(line) < 2 * MAX_LINE for line in out.getvalue().splitlines())


def test_what_is_told_is_counted() -> None:
    journal = Journal(io.StringIO())
    journal.access(ACCESS)
    journal.refused("ingress[0]", PeerError("x", code="odd"))
    assert journal.meters.requests.value("ingress[0]", "200") == 1
    assert journal.meters.refusals.value("ingress[0]", "odd") == 1


def test_a_closed_log_stops_nothing() -> None:
    out = io.StringIO()
    out.close()
    Journal(out).line("nobody reads")


class Stuck(io.StringIO):
    """A reader that takes nothing until it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.free = threading.Event()

    def write(self, text: str) -> int:
        self.free.wait(10)
        return super().write(text)


@pytest.mark.anyio
async def test_a_slow_reader_holds_up_nothing_and_loses_the_newest() -> None:
    out = Stuck()
    journal = Journal(out)
    journal.start()
    started = time.monotonic()
    for number in range(MAX_WAITING + 30):
        journal.line(str(number))
        if number % 1000 == 0:
            await asyncio.sleep(0.001)
    assert time.monotonic() - started < 5
    assert journal.meters.lines_dropped.value() == 30
    out.free.set()
    await asyncio.to_thread(journal.close)
    lines = out.getvalue().splitlines()
    assert len(lines) == MAX_WAITING
    assert lines[-1].endswith(str(MAX_WAITING - 1))


@pytest.mark.anyio
async def test_lines_leave_soon_and_the_last_ones_at_the_end() -> None:
    out = io.StringIO()
    journal = Journal(out)
    journal.start()
    journal.line("first")
    assert out.getvalue() == ""
    async with asyncio.timeout(5):
        while "first" not in out.getvalue():
            await asyncio.sleep(0.01)
    journal.line("last")
    journal.close()
    assert "last" in out.getvalue()


def test_an_unknown_format_is_refused() -> None:
    assert log_format("json") is LogFormat.JSON
    with pytest.raises(UsageError, match="log format"):
        log_format("jsonl")
