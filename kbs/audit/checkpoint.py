"""Checkpoints of one log: signed from the head row, stored before they are published.

For a size of a log there is one checkpoint, whichever replica signed it; a new one is signed at
most once a second (decisions §6), so those who wait for a proof share it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import Connection, Row, insert, select, update

from cai.attest.checkpoint import (
    ORIGIN_PREFIX,
    Checkpoint,
    CheckpointProof,
    open_checkpoint,
    sign_checkpoint,
    verify_consistency,
)
from cai.errors import InputMissing
from kbs.audit import tree
from kbs.audit.log import Head, node_hashes, read_head
from kbs.database.engine import Database
from kbs.database.tables import AUDIT_CHECKPOINT, AUDIT_HEAD

INTERVAL_SECONDS = 1.0
"""Least time between two checkpoints of a log, seconds (decisions §6)."""

Signers = Callable[[Connection], Sequence[Ed25519PrivateKey]]
"""Gives the keys of checkpoints: the one that signs now, then those that signed before."""


class Checkpoints:
    """Makes and finds the checkpoints of one database.

    Args:
        database: where the log is.
        instance: id of the database.
        signers: gives the keys.

    Attributes:
        interval: least time between two checkpoints, seconds.
    """

    def __init__(self, database: Database, *, instance: str, signers: Signers) -> None:
        self._database = database
        self._instance = instance
        self._signers = signers
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
            head = read_head(connection)
            newest = self._newest(connection, head)
            if newest is not None and 0 <= seq < newest.size:
                return _proof(connection, newest, seq)
        if not 0 <= seq < head.size:
            raise InputMissing(f"the audit log has no leaf {seq}")
        return self._make() or self.attempt(seq)

    def latest(self) -> bytes:
        """The newest checkpoint's note; signs one first where the log has grown and it is time.

        Raises:
            Tampered: the log is not an extension of what was signed before.
        """
        while True:
            wait = self._make()
            with self._database.read() as connection:
                newest = self._newest(connection, read_head(connection))
            if newest is not None:
                return bytes(newest.note)
            time.sleep(wait)

    def inclusion(self, seq: int, size: int | None = None) -> CheckpointProof:
        """Proof that leaf ``seq`` is in the stored checkpoint of ``size``, or in the newest.

        Raises:
            InputMissing: there is no such checkpoint, or it does not reach the leaf.
        """
        if size is None:
            return self.covering(seq)
        with self._database.read() as connection:
            row = self._stored(connection, read_head(connection), size)
            if not 0 <= seq < size:
                raise InputMissing(f"the checkpoint of {size} leaves does not reach leaf {seq}")
            return _proof(connection, row, seq)

    def consistency(self, old: int, new: int) -> tuple[bytes, ...]:
        """Proof that the log of ``new`` leaves extends that of ``old`` (RFC 6962 §2.1.2).

        Raises:
            InputMissing: the log is smaller, or the sizes are the wrong way round.
        """
        with self._database.read() as connection:
            size = read_head(connection).size
            if not 0 <= old <= new <= size:
                raise InputMissing(
                    f"no proof from {old} to {new} leaves: the audit log has {size}",
                    hint="a log that became smaller was rolled back",
                )
            return _consistency(connection, old, new)

    def origin(self, head: Head) -> str:
        """Name of the log as checkpoints give it."""
        return head.origin or ORIGIN_PREFIX + self._instance

    def public_keys(self) -> tuple[bytes, ...]:
        """Public keys under which a checkpoint of this log may be signed, the current one first."""
        with self._database.read() as connection:
            return tuple(key.public_key().public_bytes_raw() for key in self._signers(connection))

    def _make(self) -> float:
        """Sign a checkpoint of the whole log; or the seconds until that may be done."""
        with self._lock:  # of all threads that wait, one signs
            with self._database.read() as connection:
                wait = self._wait(self._newest(connection, read_head(connection)))
            if wait > 0:
                return wait
            with self._database.decide() as connection:
                head = read_head(connection, lock=True)
                newest = self._newest(connection, head)
                # Another replica may have signed since.
                wait = self._wait(newest)
                if wait > 0:
                    return wait
                if newest is not None and newest.size == head.size:
                    return 0.0
                checkpoint = self._sign(connection, head, newest)
            self._seen, self._since = (checkpoint.origin, checkpoint.size), time.monotonic()
        return 0.0

    def _sign(self, connection: Connection, head: Head, newest: Row[Any] | None) -> Checkpoint:
        """Sign the log as it is and store the note; never one that was rewritten."""
        keys = self._signers(connection)
        checkpoint = Checkpoint(self.origin(head), head.size, head.root)
        if newest is not None:
            public = [key.public_key().public_bytes_raw() for key in keys]
            before = open_checkpoint(bytes(newest.note), public, instance=self._instance)
            path = _consistency(connection, before.size, head.size)
            verify_consistency(before, checkpoint, path)
        note = sign_checkpoint(checkpoint, keys[0])
        connection.execute(
            insert(AUDIT_CHECKPOINT).values(
                origin=checkpoint.origin, size=checkpoint.size, note=note
            )
        )
        connection.execute(
            update(AUDIT_HEAD).where(AUDIT_HEAD.c.id == 1).values(checkpoint=checkpoint.size)
        )
        return checkpoint

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

    def _newest(self, connection: Connection, head: Head) -> Row[Any] | None:
        return self._stored(connection, head, head.checkpoint) if head.checkpoint else None

    def _stored(self, connection: Connection, head: Head, size: int) -> Row[Any]:
        row = connection.execute(
            select(AUDIT_CHECKPOINT).where(
                AUDIT_CHECKPOINT.c.origin == self.origin(head), AUDIT_CHECKPOINT.c.size == size
            )
        ).one_or_none()
        if row is None:
            raise InputMissing(
                f"the audit log has no checkpoint of {size} leaves", hint="kbs audit checkpoint"
            )
        return row


def _proof(connection: Connection, row: Row[Any], seq: int) -> CheckpointProof:
    spans = tree.inclusion_spans(seq, row.size)
    path = tree.span_hashes(spans, node_hashes(connection, tree.nodes_of(spans)))
    return CheckpointProof(bytes(row.note), seq, row.size, path)


def _consistency(connection: Connection, old: int, new: int) -> tuple[bytes, ...]:
    spans = tree.consistency_spans(old, new)
    return tree.span_hashes(spans, node_hashes(connection, tree.nodes_of(spans)))
