"""Failures that anybody can cause: counted, and written as at most one leaf a minute.

A leaf for each would let strangers fill the log; no leaf would hide that they try.
"""

from __future__ import annotations

import threading
import uuid
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from typing import Final

from sqlalchemy import Connection, select

from cai.errors import CaiError
from kbs.audit.leaf import Entry, parse_leaf, time_of
from kbs.audit.log import FAILURE_ACTION, AuditLog, read_head
from kbs.database.engine import Database
from kbs.database.tables import AUDIT

FAILURE_SECONDS: Final = 60.0
"""Least time between two such leaves of all replicas together, seconds (decisions §6)."""


class Failures:
    """Counts for one process; what one replica wrote makes the others wait.

    Args:
        database: where the log is.
        log: the log.
        clock: the broker's time.
    """

    def __init__(self, database: Database, log: AuditLog, clock: Callable[[], datetime]) -> None:
        self._database = database
        self._log = log
        self._clock = clock
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._written: datetime | None = None
        self._timer: threading.Timer | None = None
        self._closed = False

    def count(self, kind: str) -> None:
        """Count one failure; its leaf is written now, or when the minute is over.

        Raises:
            StorageError: the leaf cannot be written; the count is kept.
        """
        with self._lock:
            self._counts[kind] += 1
            wait = self._wait()
            if wait > 0:
                self._later(wait)
                return
        self._write()

    def close(self) -> None:
        """Write what is not written yet, also before its time."""
        with self._lock:
            self._closed = True
            timer = self._timer
        if timer is not None:
            timer.cancel()
            timer.join()
        self._write(at_once=True)

    def _wait(self) -> float:
        """Seconds until this process may write, as far as it knows itself."""
        if self._written is None:
            return 0.0
        age = (self._clock() - self._written).total_seconds()
        return FAILURE_SECONDS - age if abs(age) < FAILURE_SECONDS else 0.0

    def _later(self, seconds: float) -> None:
        if self._timer is None and not self._closed:
            self._timer = threading.Timer(seconds, self._due)
            self._timer.daemon = True
            self._timer.start()

    def _due(self) -> None:
        with self._lock:
            self._timer = None
        try:
            self._write()
        except CaiError:
            # The counts are kept; the next failure, or the end of the program, tries again.
            return

    def _write(self, *, at_once: bool = False) -> None:
        with self._lock:
            counts, self._counts = self._counts, Counter()
        if not counts:
            return
        try:
            with self._database.decide() as connection:
                now = self._clock()
                last = None if at_once else _newest(connection)
                age = None if last is None else (now - last).total_seconds()
                if age is None or abs(age) >= FAILURE_SECONDS:
                    self._log.append(connection, _entry(counts), now)
                    counts, last = Counter(), now
        finally:
            with self._lock:
                self._counts.update(counts)
        with self._lock:
            self._written = last
            if counts and last is not None:
                self._later(self._wait())


def _newest(connection: Connection) -> datetime | None:
    """When the newest such leaf was written, by any replica."""
    seq = read_head(connection).failures
    leaf = connection.execute(select(AUDIT.c.leaf).where(AUDIT.c.seq == seq)).scalar()
    return None if leaf is None else time_of(parse_leaf(bytes(leaf)))


def _entry(counts: Counter[str]) -> Entry:
    return Entry(
        FAILURE_ACTION, {"kind": "unknown"}, uuid.uuid4().hex, allowed=False,
        reason="no session, token or signature that this broker knows", details=dict(counts),
    )  # fmt: skip
