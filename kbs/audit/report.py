"""What a verification of the log found: each check by name, each failure with its place. Pure.

The names are stable; docs/spec-audit.md §8 lists them, and the test vectors match on them.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

from cai.attest.verdict import Check, Verdict, check
from cai.errors import Tampered

MAX_FINDINGS = 100
"""Most failures that are listed one by one; the others are counted."""

FILE_FORM: Final = "file.form"
LEAF_FORM: Final = "leaf.form"
LEAF_PLACE: Final = "leaf.place"
LEAF_LOG: Final = "leaf.log"
LEAF_CHANGES: Final = "leaf.changes"
LEAF_CHECKPOINT: Final = "leaf.checkpoint"
CHECKPOINT_FORM: Final = "checkpoint.form"
CHECKPOINT_SIGNATURE: Final = "checkpoint.signature"
CHECKPOINT_ORIGIN: Final = "checkpoint.origin"
CHECKPOINT_SIZE: Final = "checkpoint.size"
CHECKPOINT_ROOT: Final = "checkpoint.root"
CHECKPOINT_HELD: Final = "checkpoint.held"
PROOF_INCLUSION: Final = "proof.inclusion"
PROOF_CONSISTENCY: Final = "proof.consistency"
HEAD: Final = "database.head"
INDEX: Final = "database.index"
NODE: Final = "database.node"
STORED_CHECKPOINT: Final = "database.checkpoint"
ROW: Final = "database.row"


class Report:
    """Collects what was checked."""

    def __init__(self) -> None:
        self._made: Counter[str] = Counter()
        self._failures: list[Check] = []
        self._more = 0

    def made(self, name: str, count: int = 1) -> None:
        """Note that ``count`` things were checked under this name."""
        self._made[name] += count

    def fail(
        self, name: str, reason: str, *, observed: object = None, expected: object = None
    ) -> None:
        """Note a failure."""
        self._made[name] += 1
        if len(self._failures) < MAX_FINDINGS:
            self._failures.append(
                check(name, passed=False, observed=observed, expected=expected, reason=reason)
            )
        else:
            self._more += 1

    def require(
        self,
        name: str,
        passed: bool,  # noqa: FBT001 - reads as an assertion does
        reason: str,
        *,
        observed: object = None,
        expected: object = None,
    ) -> bool:
        """Note a check and its outcome, which is returned."""
        if passed:
            self.made(name)
        else:
            self.fail(name, reason, observed=observed, expected=expected)
        return passed

    @property
    def failed(self) -> bool:
        """Whether anything failed."""
        return bool(self._failures)

    def verdict(self, subject: str, *, simulated: bool = False) -> Verdict:
        """Every kind of check that was made, then every failure."""
        wrong = {item.name for item in self._failures}
        checks = [
            check(name, passed=True, observed=f"{count} checked")
            for name, count in self._made.items()
            if name not in wrong
        ]
        checks += self._failures
        if self._more:
            checks.append(
                check("more", passed=False, reason=f"{self._more} further failures are not listed")
            )
        return Verdict(subject=subject, checks=tuple(checks), simulated=simulated)


def require_sound(verdict: Verdict) -> None:
    """Refuse a log that is not what it was.

    Raises:
        Tampered: naming every failure.
    """
    if verdict.passed:
        return
    reasons = "; ".join(f"{item.name}: {item.reason}" for item in verdict.failures)
    raise Tampered(f"{verdict.subject}: {reasons or 'nothing was checked'}")
