"""Checkpoints of one log: signed from the head row, stored before they are published.

For a size of a log there is one checkpoint, whichever replica signed it; a new one is signed at
most once a second (decisions §6), so those who wait for a proof share it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import Connection, Row, insert, select

from cai.attest.checkpoint import (
    ORIGIN_PREFIX,
    Checkpoint,
    CheckpointProof,
    sign_checkpoint,
)
from cai.errors import InputMissing, Tampered
from kbs.audit import tree
from kbs.audit.log import Head, node_hashes, read_head
from kbs.database.engine import Database
from kbs.database.tables import AUDIT_CHECKPOINT

INTERVAL_SECONDS = 1.0
"""Least time between two checkpoints of a log, seconds (decisions §6)."""

Signer = Callable[[Connection], Ed25519PrivateKey]
"""Gives the key that signs checkpoints now."""


class Checkpoints:
    """Makes and finds the checkpoints of one database.

    Args:
        database: where the log is.
        instance: id of the database.
        signer: gives the key.

    Attributes:
        interval: least time between two checkpoints, seconds.
    """

    def __init__(self, database: Database, *, instance: str, signer: Signer) -> None:
        self._database = database
        self._instance = instance
        self._signer = signer
        self.interval = INTERVAL_SECONDS
        self._lock = threading.Lock()
        self._seen: tuple[str, int] | None = None
        self._since = 0.0

    def covering(self, seq: int) -> CheckpointProof:
        """Proof that leaf ``seq`` is in a checkpoint; waits at most about ``interval`` for it.

        Blocks; to be called outside any transaction, after the leaf was committed.

        Raises:
            InputMissing: there is no such leaf.
            Tampered: the log does not fit itself.
        """
        while True:
            found = self.attempt(seq)
            if isinstance(found, CheckpointProof):
                return found
            time.sleep(found)

    def attempt(self, seq: int) -> CheckpointProof | float:
        """``covering`` for those who wait elsewhere: the proof, or the seconds to wait."""
        with self._database.read() as connection:
            newest, head = self._newest(connection), read_head(connection)
            if newest is not None and seq < newest.size:
                return self._proof(connection, newest, seq)
        if not 0 <= seq < head.size:
            raise InputMissing(f"the audit log has no leaf {seq}")
        return self._make() or self.attempt(seq)

    def latest(self) -> bytes:
        """The newest checkpoint's note; signs one first where the log has grown and it is time.

        Raises:
            InputMissing: the log is empty.
        """
        with self._database.read() as connection:
            newest, head = self._newest(connection), read_head(connection)
        if newest is None or newest.size != head.size:
            self._make()
            with self._database.read() as connection:
                newest = self._newest(connection)
        if newest is None:
            raise InputMissing("the audit log has no checkpoint yet")
        return bytes(newest.note)

    def inclusion(self, seq: int, size: int | None = None) -> CheckpointProof:
        """Proof that leaf ``seq`` is in the stored checkpoint of ``size``, or in the newest.

        Raises:
            InputMissing: there is no such checkpoint, or it does not reach the leaf.
        """
        if size is None:
            return self.covering(seq)
        with self._database.read() as connection:
            row = self._stored(connection, size)
            if not 0 <= seq < size:
                raise InputMissing(f"the checkpoint of {size} leaves does not reach leaf {seq}")
            return self._proof(connection, row, seq)

    def consistency(self, old: int, new: int) -> tuple[bytes, ...]:
        """Proof that the log of ``new`` leaves extends that of ``old`` (RFC 6962 §2.1.2).

        Raises:
            InputMissing: the log is smaller, or the sizes are the wrong way round.
        """
        with self._database.read() as connection:
            head = read_head(connection)
            if not 0 <= old <= new <= head.size:
                raise InputMissing(
                    f"no proof from {old} to {new}: the audit log has {head.size} leaves"
                )
            spans = tree.consistency_spans(old, new)
            return tree.span_hashes(spans, node_hashes(connection, tree.nodes_of(spans)))

    def origin(self, head: Head) -> str:
        """Name of the log as checkpoints give it."""
        return head.origin or ORIGIN_PREFIX + self._instance

    def _make(self) -> float:
        """Sign a checkpoint of the whole log; or the seconds until that may be done."""
        with self._lock:  # of all threads that wait, one signs
            with self._database.read() as connection:
                wait = self._wait(self._newest(connection))
            if wait > 0:
                return wait
            with self._database.decide() as connection:
                newest, head = self._newest(connection), read_head(connection, lock=True)
                # Another replica may have signed since.
                wait = self._wait(newest)
                if wait > 0:
                    return wait
                if newest is not None and newest.size == head.size:
                    return 0.0
                checkpoint = Checkpoint(self.origin(head), head.size, head.root)
                self._require_growth(newest, checkpoint)
                note = sign_checkpoint(checkpoint, self._signer(connection))
                connection.execute(
                    insert(AUDIT_CHECKPOINT).values(
                        origin=checkpoint.origin, size=checkpoint.size, note=note
                    )
                )
            self._seen, self._since = (checkpoint.origin, checkpoint.size), time.monotonic()
        return 0.0

    def _wait(self, newest: Row[Any] | None) -> float:
        """Seconds until a successor of ``newest`` may be signed.

        Counted from when this process first saw it, which is later than when it was made: no clock
        of another replica is trusted.
        """
        if newest is None:
            return 0.0
        if self._seen != (newest.origin, newest.size):
            self._seen, self._since = (newest.origin, newest.size), time.monotonic()
        return max(0.0, self._since + self.interval - time.monotonic())

    def _newest(self, connection: Connection) -> Row[Any] | None:
        origin = self.origin(read_head(connection))
        return connection.execute(
            select(AUDIT_CHECKPOINT)
            .where(AUDIT_CHECKPOINT.c.origin == origin)
            .order_by(AUDIT_CHECKPOINT.c.size.desc())
            .limit(1)
        ).one_or_none()

    def _stored(self, connection: Connection, size: int) -> Row[Any]:
        origin = self.origin(read_head(connection))
        row = connection.execute(
            select(AUDIT_CHECKPOINT).where(
                AUDIT_CHECKPOINT.c.origin == origin, AUDIT_CHECKPOINT.c.size == size
            )
        ).one_or_none()
        if row is None:
            raise InputMissing(f"the audit log has no checkpoint of {size} leaves")
        return row

    def _proof(self, connection: Connection, row: Row[Any], seq: int) -> CheckpointProof:
        spans = tree.inclusion_spans(seq, row.size)
        path = tree.span_hashes(spans, node_hashes(connection, tree.nodes_of(spans)))
        return CheckpointProof(bytes(row.note), seq, row.size, path)

    def _require_growth(self, newest: Row[Any] | None, checkpoint: Checkpoint) -> None:
        """Refuse to sign a log that is not an extension of what was signed before."""
        if newest is not None and newest.size > checkpoint.size:
            raise Tampered(
                f"the audit log has {checkpoint.size} leaves, a checkpoint names {newest.size}",
                hint="the database was edited; restore it from a backup",
            )
