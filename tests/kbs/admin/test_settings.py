"""The section ``[admin]``: what is read, and every way to get it wrong."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from cai.errors import SettingError
from kbs.admin import settings as module
from kbs.admin.changes import Role
from kbs.admin.settings import AdminSettings, IdentityProvider, LegacyKey, TwoPerson

PROVIDER = {"name": "corp", "issuer": "https://x", "key": "/k"}
LEGACY = {"name": "old", "key": "/k"}


def test_nothing_is_the_safe_default() -> None:
    settings = AdminSettings.from_table({})
    assert settings == AdminSettings()
    assert settings.listen == "127.0.0.1:8081"
    assert not settings.on_main_listener
    assert not settings.legacy_keys
    assert not settings.identity_providers
    assert settings.two_person is None


def test_the_example_of_the_module_is_read() -> None:
    text = (module.__doc__ or "").partition(".. code-block:: toml")[2]
    table = tomllib.loads("\n".join(line.removeprefix("    ") for line in text.splitlines()))
    settings = AdminSettings.from_table(table["admin"])
    assert settings.listen == "unix:/run/kbs/admin.sock"
    assert settings.identity_providers == (
        IdentityProvider(
            "corp", "https://login.example.org", "KBS", Path("/etc/kbs/corp.jwks"),
            {"kbs-auditors": frozenset({Role.AUDITOR}),
             "kbs-owners": frozenset({Role.RESOURCE, Role.POLICY})},
        ),
    )  # fmt: skip
    assert settings.legacy_keys == (
        LegacyKey("keyprovider", Path("/etc/kbs/keyprovider.pub"), frozenset({Role.RESOURCE})),
    )
    assert settings.two_person == TwoPerson(2)


def test_the_examples_of_the_guide_are_read() -> None:
    guide = (Path(__file__).parents[3] / "docs" / "kbs-administration.md").read_text("utf-8")
    blocks = guide.split("```toml\n")[1:]
    assert len(blocks) == 3
    for block in blocks:
        AdminSettings.from_table(tomllib.loads(block.partition("```")[0])["admin"])


def test_compat_only_sets_a_default() -> None:
    assert AdminSettings.from_table({}, compat=True).on_main_listener
    assert not AdminSettings.from_table({"on_main_listener": False}, compat=True).on_main_listener


@pytest.mark.parametrize(
    "table",
    [
        {"on_main_listner": True}, {"on_main_listener": "yes"}, {"listen": 8081},
        {"max_token_seconds": 0}, {"max_token_seconds": 86401}, {"max_token_seconds": True},
        {"certificate": "/c"}, {"private_key": "/k"}, {"certificate": "", "private_key": "/k"},
        {"legacy_keys": {}}, {"legacy_keys": ["/k"]}, {"legacy_keys": [{}]},
        {"legacy_keys": [{"name": "old"}]}, {"legacy_keys": [{**LEGACY, "name": "Old"}]},
        {"legacy_keys": [{**LEGACY, "name": "a:b"}]}, {"legacy_keys": [{**LEGACY, "roles": []}]},
        {"legacy_keys": [{**LEGACY, "roles": ["owner"]}]},
        {"legacy_keys": [{**LEGACY, "role": ["admin"]}]}, {"legacy_keys": [LEGACY, LEGACY]},
        {"legacy_keys": [LEGACY], "identity_providers": [{**PROVIDER, "name": "old"}]},
        {"identity_providers": [{"name": "corp"}]}, {"identity_providers": [1]},
        {"identity_providers": [{**PROVIDER, "issuer": ""}]},
        {"identity_providers": [{**PROVIDER, "key": ""}]},
        {"identity_providers": [{**PROVIDER, "public_key_uri": "/k"}]},
        {"identity_providers": [{**PROVIDER, "roles": ["admin"]}]},
        {"identity_providers": [{**PROVIDER, "roles": {"a": "admin"}}]},
        {"identity_providers": [{**PROVIDER, "roles": {"a": ["owner"]}}]},
        {"identity_providers": [{**PROVIDER, "roles": {"a": []}}]},
        {"identity_providers": [{**PROVIDER, "roles": {}}]},
        {"identity_providers": [PROVIDER, {**PROVIDER, "name": "other"}]},
        {"two_person": True}, {"two_person": {"required": 1}}, {"two_person": {"required": 17}},
        {"two_person": {"persons": 2}}, {"two_person": {"approvers": ["a"]}},
        {"two_person": {"approvers": ["a", "a"]}}, {"two_person": {"hours": 0}},
        {"two_person": {"approvers": "ab"}},
    ],
)  # fmt: skip
def test_unsound_settings_are_refused(table: dict[str, Any]) -> None:
    with pytest.raises(SettingError):
        AdminSettings.from_table(table)


def test_a_misspelt_name_is_suggested() -> None:
    with pytest.raises(SettingError) as refused:
        AdminSettings.from_table({"two_persons": {}})
    assert "two_person" in str(refused.value.hint)
