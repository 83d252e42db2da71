"""``[keys]`` and ``[resources]`` of the configuration."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from cai.errors import CaiError, InputMissing, SettingError
from cai.settings import Section
from kbs.keys.settings import KeySettings
from kbs.names import ResourceName
from kbs.resources.settings import ResourceSettings
from tests.kbs.keys.conftest import secret_file
from tests.kbs.keys.vault_simulator import VaultSimulator
from tests.kbs.world import Site, Visitor


def keys(text: str) -> KeySettings:
    return KeySettings.from_table(Section(tomllib.loads(text), where="keys"))


def resources(value: dict[str, Any]) -> ResourceSettings:
    return ResourceSettings.from_table(Section(value, where="resources"))


def test_without_configuration_there_is_the_file(tmp_path: Path) -> None:
    for settings in (KeySettings.from_table(None), keys("")):
        ring = settings.open(tmp_path / "kek" / "kek", data=tmp_path / "data", create=True)
        assert ring.default == "file"
        assert list(ring.names) == ["file"]
    with pytest.raises(InputMissing):
        KeySettings().open(tmp_path / "none", data=tmp_path / "data", create=False)


def test_every_kind_is_read(tmp_path: Path, vault: VaultSimulator) -> None:
    secret_file(tmp_path, "two", "ab" * 32)
    for name in ("words", "pin", "token", "id", "secret", "client", "password"):
        secret_file(tmp_path, name, "correct horse battery staple")
    settings = keys(
        f"""
        provider = "hsm"
        [providers.two]
        kind = "file"
        path = "{tmp_path}/two"
        [providers.words]
        kind = "passphrase"
        passphrase_file = "{tmp_path}/words"
        [providers.hsm]
        kind = "pkcs11"
        module = "/usr/lib/softhsm/libsofthsm2.so"
        token = "kbs"
        key = "kek"
        mechanism = "aes-key-wrap"
        pin_file = "{tmp_path}/pin"
        unsafe_extractable_key = true
        [providers.vault]
        kind = "vault-transit"
        url = "{vault.url}"
        key = "kek"
        token_file = "{tmp_path}/token"
        [providers.cloud]
        kind = "aliyun-kms"
        endpoint = "kms.cn-hangzhou.aliyuncs.com"
        key = "key-x"
        access_key_id_file = "{tmp_path}/id"
        access_key_secret_file = "{tmp_path}/secret"
        [providers.instance]
        kind = "aliyun-kms"
        instance = "kst-x"
        key = "key-y"
        client_key_file = "{tmp_path}/client"
        password_file = "{tmp_path}/password"
        ca_file = "{tmp_path}/ca.pem"
        python = "/opt/dkms/bin/python"
        """
    )
    ring = settings.open(tmp_path / "kek" / "kek", data=tmp_path / "data", create=False)
    assert ring.default == "hsm"
    kinds = {name: provider.partition(":")[0] for name, provider in ring.names.items()}
    assert kinds == {
        "two": "file", "words": "passphrase", "hsm": "pkcs11", "vault": "vault-transit",
        "cloud": "aliyun-kms", "instance": "aliyun-kms",
    }
    assert settings.unsafe == ("unsafe_extractable_key",)
    ring.close()


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ('providr = "x"', "provider"),
        ('provider = "x"', "providers"),
        ('[providers.x]\nkind = "fil"', "file"),
        ("[providers.x]\nkind = 1", None),
        ('[providers.x]\nkind = "file"', None),
        ('[providers.x]\nkind = "file"\npath = "k"\npth = "k"', "path"),
        ('[providers.x]\nkind = "passphrase"', "configuration"),
        ('[providers.x]\nkind = "passphrase"\npassphrase = "in clear"', None),
        ('[providers.x]\nkind = "passphrase"\npassphrase_file = "a"\npassphrase_fd = 3', None),
        ('[providers.x]\nkind = "passphrase"\npassphrase_fd = -1', None),
        ('[providers.x]\nkind = "pkcs11"\nmodule = "m"\ntoken = "t"\nkey = "k"\npin_file = "p"\n'
         'mechanism = "aes-ecb"', "aes-gcm"),
        ('[providers.x]\nkind = "vault-transit"\nurl = "http://vault"\nkey = "k"\n'
         'token_file = "t"', "https"),
        ('[providers.x]\nkind = "vault-transit"\nurl = "https://vault"\nkey = "../k"\n'
         'token_file = "t"', None),
        ('[providers.x]\nkind = "vault-transit"\nurl = "https://vault"\nkey = "k"\n'
         'token_file = "t"\nskip_verify = true', None),
    ],
)
def test_what_is_misspelt_or_unsound_is_refused(text: str, hint: str | None) -> None:
    with pytest.raises(SettingError) as caught:
        keys(text)
    assert hint is None or hint in (caught.value.hint or "") + caught.value.message
    assert "in clear" not in caught.value.message or "keys" in caught.value.message


def test_a_key_or_passphrase_in_the_data_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    secret_file(tmp_path / "data", "words", "correct horse battery staple")
    settings = keys(
        f'provider = "w"\n[providers.w]\nkind = "passphrase"\n'
        f'passphrase_file = "{tmp_path}/data/words"'
    )
    with pytest.raises(SettingError, match="inside the data directory"):
        settings.open(tmp_path / "kek", data=tmp_path / "data", create=True)
    settings = keys(f'[providers.k]\nkind = "file"\npath = "{tmp_path}/data/kek"')
    with pytest.raises(SettingError, match="inside the data directory"):
        settings.open(tmp_path / "kek" / "kek", data=tmp_path / "data", create=True)


@pytest.mark.parametrize(
    "value",
    [
        {"max_bytes": 0}, {"max_bytes": 1 << 40}, {"keep_days": -1}, {"keep_versions": 0},
        {"max_byte": 1}, {"external": 1}, {"external": {"x": {}}},
        {"external": {"x": {"prefix": "a", "kind": "vault"}}},
        {"external": {"x": {"prefix": "../a", "kind": "vault-kv"}}},
        {"external": {"x": {"prefix": "a/b/c/d", "kind": "vault-kv"}}},
    ],
)
def test_unsound_resource_settings_are_refused(value: dict[str, Any]) -> None:
    with pytest.raises(SettingError):
        resources(value)


def external(vault: VaultSimulator, directory: Path, **members: Any) -> dict[str, Any]:
    token = secret_file(directory, f"token-{len(list(directory.iterdir()))}", vault.token)
    return {"kind": "vault-kv", "url": vault.url, "token_file": str(token), **members}


def test_two_tables_of_one_prefix_are_refused(vault: VaultSimulator, tmp_path: Path) -> None:
    tables = {name: external(vault, tmp_path, prefix="a") for name in ("one", "two")}
    with pytest.raises(SettingError, match="same prefix"):
        resources({"external": tables})


def test_a_misspelt_member_of_a_source_is_refused(vault: VaultSimulator, tmp_path: Path) -> None:
    for name, value in (("feild", "x"), ("unsafe_plain_http", True), ("lease", "never"),
                        ("name", "both"), ("encoding", "rot13"), ("kv_version", 3)):
        table = external(vault, tmp_path, prefix="a", **{name: value})
        with pytest.raises(SettingError):
            resources({"external": {"x": table}})


# Resources that live elsewhere, all the way to a guest.


@pytest.fixture
def elsewhere(allowed: Site, vault: VaultSimulator, tmp_path: Path) -> Site:
    allowed.broker.core.resources.settings = resources(
        {
            "external": {
                "vault": external(vault, tmp_path, prefix="models/minilm"),
                "deep": external(vault, tmp_path, prefix="models/minilm/deep", mount="kv1",
                                 kv_version=1, lease="required"),
            }
        }
    )
    return allowed


def test_a_guest_gets_a_secret_from_vault(
    elsewhere: Site, visitor: Visitor, vault: VaultSimulator
) -> None:
    vault.kv2["key"] = [{"value": "from vault"}]
    _, cookie = visitor.attested(elsewhere)
    assert visitor.open(elsewhere.get(cookie)) == b"from vault"
    row = elsewhere.last("release")
    assert row["decision"] == "allow"
    assert "from vault" not in str(row)
    del vault.kv2["key"]
    assert elsewhere.get(cookie).status_code == 404


def test_vault_away_is_503_and_logged(
    elsewhere: Site, visitor: Visitor, vault: VaultSimulator
) -> None:
    _, cookie = visitor.attested(elsewhere)
    vault.stop()
    assert elsewhere.get(cookie).status_code == 503
    assert elsewhere.last("release")["decision"] == "deny"


def test_without_a_policy_vault_is_not_even_asked(
    site: Site, visitor: Visitor, vault: VaultSimulator, tmp_path: Path
) -> None:
    table = external(vault, tmp_path, prefix="")
    site.broker.core.resources.settings = resources({"external": {"vault": table}})
    vault.kv2["key"] = [{"value": "from vault"}]
    _, cookie = visitor.attested(site)
    assert site.get(cookie).status_code == 403
    assert vault.requests == []


def test_the_longest_prefix_wins(elsewhere: Site) -> None:
    store = elsewhere.broker.core.resources
    assert [
        found.prefix if (found := store.external(path)) else None
        for path in ("models/minilm/key", "models/minilm/deep", "models/minilmx/key", "a/b/c")
    ] == ["models/minilm", "models/minilm/deep", None, None]


def test_a_record_from_elsewhere_requires_a_lease(
    elsewhere: Site, visitor: Visitor, vault: VaultSimulator
) -> None:
    vault.kv2["key"] = [{"value": '{"cai-key":1}'}]
    core = elsewhere.broker.core
    with core.database.read() as connection:
        sealed = core.resources.sealed(connection, "models/minilm/key")
    assert sealed is not None
    assert core.resources.open(sealed).lease.value == "required"
    _, cookie = visitor.attested(elsewhere)
    answer = elsewhere.get(cookie)
    assert answer.status_code == 403
    assert "cai-key" not in answer.text


def test_what_lives_elsewhere_is_not_written_here(elsewhere: Site) -> None:
    for method, route, body in (
        ("POST", "resource/models/minilm/key", b"x"), ("DELETE", "resource/models/minilm/key", b""),
        ("POST", "resource-new/models/minilm/key", b""),
        ("POST", "resource-lease/models/minilm/key", b"optional"),
        ("POST", "resource-restore/models/minilm/key", b'{"version":1}'),
    ):
        answer = elsewhere.admin(method, route, body)
        assert answer.status_code == 403, (route, answer.text)
    shown = elsewhere.admin("GET", "resource-info/models/minilm/key").json()
    assert shown["external"] == "vault-kv:secret"


def test_an_empty_or_huge_secret_is_refused(
    elsewhere: Site, vault: VaultSimulator
) -> None:
    core = elsewhere.broker.core
    for text in ("", "x" * (core.resources.settings.max_bytes + 1)):
        vault.kv2["key"] = [{"value": text}]
        with core.database.read() as connection:
            sealed = core.resources.sealed(connection, "models/minilm/key")
        assert sealed is not None
        with pytest.raises(CaiError):
            core.resources.open(sealed)


def test_names_at_the_source_are_the_tag_or_the_path(
    vault: VaultSimulator, tmp_path: Path
) -> None:
    vault.kv2["a/b/c"] = [{"value": "by path"}]
    settings = resources(
        {"external": {"x": external(vault, tmp_path, prefix="a", name="path")}}
    )
    found = settings.external[0].source.read(ResourceName("a", "b", "c"))
    assert found is not None
    assert found.contents == b"by path"
