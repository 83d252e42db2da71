"""How a diagnosis collects what it finds: checks whose reason says what to do."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from cai.attest.verdict import Check, check, not_asked
from cai.errors import CaiError

_VERSION = re.compile(r"(\d{1,6})\.(\d{1,6})")

_T = TypeVar("_T")


@dataclass
class Findings:
    """The checks so far."""

    checks: list[Check]

    def add(
        self, name: str, *, passed: bool, observed: object = None, expected: object = None,
        fix: str = "",
    ) -> bool:  # fmt: skip
        """A check that was made; ``fix`` says how a failure is set right."""
        self.checks.append(
            check(name, passed=passed, observed=observed, expected=expected, reason=fix)
        )
        return passed

    def skip(self, reason: str, *names: str) -> None:
        """Checks that cannot be made yet."""
        self.checks += [not_asked(name, reason=reason) for name in names]

    def attempt(self, name: str, action: Callable[[], str]) -> bool:
        """Do something that says what it saw, or fails with an error that says what to do."""
        try:
            return self.add(name, passed=True, observed=action())
        except CaiError as error:
            fix = error.message if error.hint is None else f"{error.message}; {error.hint}"
            return self.add(name, passed=False, fix=fix)


def asked(question: Callable[[], _T], otherwise: _T) -> _T:
    """An answer, or ``otherwise`` when asking fails."""
    try:
        return question()
    except CaiError:
        return otherwise


def version_of(text: str) -> tuple[int, int] | None:
    """Major and minor number at the start of a text."""
    match = _VERSION.match(text)
    return None if match is None else (int(match[1]), int(match[2]))
