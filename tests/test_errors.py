"""The error tree: documented, complete, and never losing what happened."""

from __future__ import annotations

import errno
import re

import pytest

import cai.errors
from cai.attest.verdict import Outcome, Verdict, check, not_asked
from cai.errors import (
    CaiError,
    EvidenceRefused,
    InputMissing,
    NoSpace,
    Refused,
    StorageError,
    from_exit_status,
    from_os_error,
)

CLASSES = [
    item for item in vars(cai.errors).values()
    if isinstance(item, type) and issubclass(item, CaiError)
]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_the_tree_in_the_docstring_is_the_tree(kind: type[CaiError]) -> None:
    documentation = cai.errors.__doc__ or ""
    line = re.search(rf"{kind.__name__}\s+(\S+)\s+exit\s+(\d+)\s+HTTP\s+(\d+)", documentation)
    assert line, f"{kind.__name__} is not in the tree"
    assert line.groups() == (kind.code, str(kind.exit_status), str(kind.http_status))


def test_codes_are_unique() -> None:
    assert len({kind.code for kind in CLASSES}) == len(CLASSES)


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, NoSpace), (errno.EDQUOT, NoSpace), (errno.ENOENT, InputMissing),
        (errno.EACCES, StorageError), (errno.EIO, StorageError),
    ],
)
def test_os_errors_keep_their_reason(number: int, kind: type[CaiError]) -> None:
    error = from_os_error(OSError(number, "the reason"), "write OUT")
    assert type(error) is kind
    assert error.message == "write OUT: the reason"


@pytest.mark.parametrize("status", [2, 3, 4, 5, 6, 7, 8, 20, 130])
def test_exit_statuses_lead_back_to_the_tree(status: int) -> None:
    assert from_exit_status(status, "x").exit_status == status


def test_an_unknown_exit_status_is_a_fault_of_ours() -> None:
    assert from_exit_status(99, "x").exit_status == 1


def test_a_verdict_passes_only_when_something_was_checked() -> None:
    good, bad = check("a", passed=True), check("b", passed=False, reason="why", observed="x")
    assert Verdict("s", (good, not_asked("c"))).require().passed
    for checks in ((), (not_asked("c"),), (good, bad)):
        with pytest.raises(EvidenceRefused) as caught:
            Verdict("s", checks).require()
        assert caught.value.verdict is not None
    assert "b: why" in caught.value.message


def test_reasons_are_kept_for_failures_only() -> None:
    assert check("a", passed=True, reason="why").reason is None
    assert check("a", passed=False, reason="why").outcome is Outcome.FAIL


def test_refusals_carry_their_verdict_in_json() -> None:
    verdict = Verdict("s", (check("a", passed=False, reason="why"),))
    body = Refused("no", verdict=verdict, hint="do this").to_json()
    assert body["hint"] == "do this"
    assert body["verdict"] == verdict.to_json()
