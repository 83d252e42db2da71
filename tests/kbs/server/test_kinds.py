"""Kinds of errors: documented, reachable, and the right one for each error of ours."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cai import errors
from cai.errors import CaiError, PolicyDenied, Refused, Tampered, Unauthenticated, WrongKey
from kbs.server.kinds import KINDS, kind_of, page, status_of

PAGE = (Path(__file__).parents[3] / "docs" / "kbs-errors.md").read_text()


def test_each_kind_has_its_section() -> None:
    anchors = re.findall(r'<a id="([^"]+)"></a>\n### (\S+)\n', PAGE)
    assert [name for name, _ in anchors] == list(KINDS)
    assert all(anchor == heading for anchor, heading in anchors)


@pytest.mark.parametrize("name", KINDS)
def test_a_section_says_what_the_broker_says(name: str) -> None:
    kind = KINDS[name]
    section = PAGE.split(f'<a id="{name}"></a>')[1].split("<a id=")[0]
    assert kind.meaning in section
    assert kind.remedy in section
    assert page(kind).startswith(f"{name}\n")
    assert (f"called {kind.trustee}." in section) is bool(kind.trustee)


def every_class(root: type[CaiError]) -> list[type[CaiError]]:
    return [root, *(found for cls in root.__subclasses__() for found in every_class(cls))]


@pytest.mark.parametrize("cls", [item for item in every_class(CaiError)
                                 if item.__module__ == errors.__name__])  # fmt: skip
@pytest.mark.parametrize("admin", [False, True])
def test_every_error_has_a_kind_and_a_status(cls: type[CaiError], admin: bool) -> None:
    error = cls("what happened")
    kind = kind_of(error, admin=admin)
    assert kind.name in KINDS
    assert 400 <= status_of(error, kind) <= 599


def test_no_fault_of_the_store_is_put_on_the_client() -> None:
    for error in (Tampered("row"), WrongKey("row")):
        kind = kind_of(error, admin=False)
        assert (status_of(error, kind), kind.name) == (500, "StorageBackendInitialization")


def test_who_may_not_and_who_is_not_known_differ() -> None:
    for error, status in ((Unauthenticated("x"), 401), (Refused("x"), 403)):
        kind = kind_of(error, admin=True)
        assert (kind.name, status_of(error, kind)) == ("AdminAuthAccess", status)
    assert kind_of(PolicyDenied("x"), admin=True).name == "PolicyDeny"
    assert kind_of(Unauthenticated("x", code="token-expired"), admin=False).name == (
        "TokenVerifierError"
    )
    assert kind_of(PolicyDenied("x", code="lease-required"), admin=False).name == "LeaseRequired"
