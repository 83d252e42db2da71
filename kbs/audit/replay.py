"""The log replayed leaf by leaf, from a file or a database: what must hold at each step. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from cai.attest.checkpoint import ORIGIN_PREFIX, Checkpoint, open_checkpoint, read_checkpoint
from cai.errors import CaiError
from cai.merkle import leaf_hash
from kbs.audit import report, tree
from kbs.audit.leaf import ORIGIN_ACTION, change_of, parse_leaf, time_of

__all__ = ["ORIGIN_ACTION", "Replay", "opened"]


class Replay:
    """One pass over a log.

    Args:
        instance: id of its key broker.
        realm: its realm; empty takes that of the first leaf.
        start: place of the first leaf that is given.
        frontier: maximal complete subtrees over the leaves before it. They are believed only as far
            as a checkpoint over later leaves confirms them.
        origin: of checkpoints at ``start``; empty is the instance's own.
        report: collects what is found.

    Attributes:
        size: leaves so far.
        origin: of checkpoints at this size.
        changes: administrative changes so far; ``None`` where that is not known.
        named: origin and size of every checkpoint that a leaf names.
        simulated: whether the log is of the simulated realm.
    """

    def __init__(
        self,
        instance: str,
        *,
        found: report.Report,
        realm: str = "",
        start: int = 0,
        frontier: Sequence[bytes] = (),
        origin: str = "",
    ) -> None:
        self.report = found
        self.size = start
        self.origin = origin or ORIGIN_PREFIX + instance
        self.changes: int | None = 0 if start == 0 else None
        self.named: set[tuple[str, int]] = set()
        self._instance = instance
        self._realm = realm
        self._frontier = list(frontier)
        self._signed = 0

    @property
    def simulated(self) -> bool:
        """Whether the log is of the simulated realm."""
        return self._realm == "simulated"

    @property
    def root(self) -> bytes:
        """Root over the leaves so far."""
        return tree.fold(self._frontier)

    @property
    def frontier(self) -> tuple[bytes, ...]:
        """Hashes of the maximal complete subtrees so far."""
        return tuple(self._frontier)

    def take(self, data: bytes) -> tuple[dict[str, Any] | None, list[tuple[tree.Node, bytes]]]:
        """The next leaf.

        Returns:
            Its members, ``None`` when it has another form; and the nodes that it completes.
        """
        place, self.size = self.size, self.size + 1
        self._frontier, completed = tree.appended(self._frontier, place, leaf_hash(data))
        try:
            leaf = parse_leaf(data)
            change_of(leaf)
            time_of(leaf)
        except CaiError as error:
            self.report.fail(report.LEAF_FORM, f"leaf {place}: {error.message}")
            return None, completed
        self.report.made(report.LEAF_FORM)
        self._check(place, leaf)
        return leaf, completed

    def checkpoint(self, note: bytes, keys: Iterable[bytes]) -> Checkpoint | None:
        """Check a checkpoint over exactly the leaves so far.

        Returns:
            The checkpoint, or ``None`` when something about it is wrong.
        """
        name = f"checkpoint of {self.size} leaves"
        found = opened(note, keys, self.report, name=name)
        if found is None:
            return None
        same_log = self.report.require(
            report.CHECKPOINT_ORIGIN, found.origin == self.origin, f"{name}: of another log",
            observed=found.origin, expected=self.origin,
        )  # fmt: skip
        same_size = self.report.require(
            report.CHECKPOINT_SIZE, found.size == self.size,
            f"{name}: it says {found.size}", observed=found.size, expected=self.size,
        )  # fmt: skip
        same_root = same_size and self.report.require(
            report.CHECKPOINT_ROOT, found.root == self.root, f"{name}: these leaves give another",
            observed=self.root.hex(), expected=found.root.hex(),
        )  # fmt: skip
        return found if same_log and same_root else None

    def _check(self, place: int, leaf: dict[str, Any]) -> None:
        name = f"leaf {place}"
        self.report.require(
            report.LEAF_PLACE, leaf.get("seq") == place,
            f"{name}: it says that it is leaf {leaf.get('seq')}",
        )  # fmt: skip
        self._realm = self._realm or str(leaf.get("realm"))
        self.report.require(
            report.LEAF_LOG,
            leaf.get("instance") == self._instance and leaf.get("realm") == self._realm,
            f"{name}: of another key broker or realm",
            observed=f"{leaf.get('instance')} {leaf.get('realm')}",
            expected=f"{self._instance} {self._realm}",
        )
        count, before = leaf.get("changes"), self.changes
        steps = count - before if type(count) is int and before is not None else 0
        # A change that every decision depends on moves the counter; a lease row does not.
        self.report.require(
            report.LEAF_CHANGES, type(count) is int and steps in (0, 1),
            f"{name}: the count of changes goes from {before} to {count}",
        )  # fmt: skip
        self.changes = count if type(count) is int else before
        signed = leaf.get("checkpoint")
        if self.report.require(
            report.LEAF_CHECKPOINT, type(signed) is int and self._signed <= signed <= place,
            f"{name}: it names a checkpoint of {signed} leaves after one of {self._signed}",
        ):  # fmt: skip
            self._signed = int(str(signed))
        if self._signed:
            self.named.add((self.origin, self._signed))
        if leaf.get("action") == ORIGIN_ACTION:
            details = leaf.get("details")
            origin = details.get("origin") if isinstance(details, dict) else None
            if isinstance(origin, str) and origin.startswith(f"{ORIGIN_PREFIX}{self._instance}/"):
                self.origin, self._signed = origin, 0
            else:
                self.report.fail(report.LEAF_FORM, f"{name}: it names no origin")


def opened(
    note: bytes, keys: Iterable[bytes], found: report.Report, *, name: str
) -> Checkpoint | None:
    """A checkpoint, if its form and a signature are right; ``name`` is what failures call it."""
    try:
        read_checkpoint(note)
    except CaiError as error:
        found.fail(report.CHECKPOINT_FORM, f"{name}: {error.message}")
        return None
    found.made(report.CHECKPOINT_FORM)
    try:
        checkpoint = open_checkpoint(note, keys)
    except CaiError as error:
        found.fail(report.CHECKPOINT_SIGNATURE, f"{name}: {error.message}")
        return None
    found.made(report.CHECKPOINT_SIGNATURE)
    return checkpoint
