"""The table ``[release]``: limits are limits, whatever a resource says."""

from __future__ import annotations

from typing import Any

import pytest

from cai.errors import SettingError
from cai.settings import Section
from kbs.release.model import ModelFacts, model_facts
from kbs.release.settings import ReleaseSettings
from tests.kbs.release.guests import MODEL_ID, MODEL_ROOT, record


def table(**members: Any) -> ReleaseSettings:
    return ReleaseSettings.from_table(Section(members, where="kbs.toml [release]"))


def test_defaults() -> None:
    assert ReleaseSettings.from_table(None) == table() == ReleaseSettings(900, 300, 86_400)


@pytest.mark.parametrize(
    ("settings", "ttl_s", "drain_s", "expected"),
    [
        ({}, None, None, (900, 300)), ({}, 60, 0, (60, 0)), ({}, 1, 1, (10, 1)),
        ({}, 10**9, 10**9, (86_400, 300)), ({"max_lease_ttl_s": 120}, 900, 300, (120, 300)),
        ({"lease_ttl_s": 30, "lease_drain_s": 5}, None, None, (30, 5)),
        ({"lease_ttl_s": 600, "max_lease_ttl_s": 60}, None, None, (60, 300)),
    ],
)
def test_lifetimes(
    settings: dict[str, int], ttl_s: int | None, drain_s: int | None, expected: tuple[int, int]
) -> None:
    assert table(**settings).lifetime(ttl_s, drain_s) == expected


@pytest.mark.parametrize(
    "members",
    [
        {"lease_ttl_s": 9}, {"lease_ttl_s": 86_401}, {"lease_ttl_s": "900"}, {"lease_ttl_s": True},
        {"lease_drain_s": -1}, {"lease_drain_s": 301}, {"max_lease_ttl_s": 1}, {"lease_ttl": 900},
    ],
)
def test_unsound_settings(members: dict[str, Any]) -> None:
    with pytest.raises(SettingError):
        table(**members)


def test_a_misspelt_name_gets_a_suggestion() -> None:
    with pytest.raises(SettingError) as caught:
        table(lease_tll_s=900)
    assert caught.value.hint == "did you mean 'lease_ttl_s'?"


def test_what_is_read_of_a_record() -> None:
    found = model_facts(record())
    assert (found.model_id, found.root) == (MODEL_ID, MODEL_ROOT)
    assert (found.ttl_s, found.drain_s) == (900, 120)


@pytest.mark.parametrize(
    "contents",
    [
        b"", b"password", b"{}", b"[]", b'{"a":1}', b"\xff" * 64, b'{"cai-key":1', b"{" * 5000,
        b'{ "cai-key":1}', b'{"cai-key":1}', b'{"cai-key":1,"model_id":7}',
        b'{"cai-key":1,"lease":[],"model_id":"AB"}', b'{"cai-key":1,"lease":{"ttl_s":"1"}}',
        b'{"cai-key":1,"lease":{"drain_s":-1,"ttl_s":true}}', record() + b" ",
    ],
)
def test_what_is_no_record_says_nothing(contents: bytes) -> None:
    assert model_facts(contents) == ModelFacts()
