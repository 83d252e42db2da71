"""The configuration: one file, strict, in either notation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cai.errors import CaiError, FormatError, SettingError
from kbs.server.config import ServeSettings, read_config, settings_from
from kbs.server.settings import Compat
from tests.kbs.program import run_kbs

TOML = """
data = "/var/lib/kbs"
listen = "0.0.0.0:8443"
kek = "/etc/kbs/kek"

[evidence]
collateral = "/var/lib/collateral"
rims = "/var/lib/rims"
ocsp = "/var/lib/ocsp"

[database]
url = "postgresql+psycopg://kbs@/kbs"

[admin]
listen = "unix:/run/kbs/admin.sock"

[attestation]
require_challenge = true
token_seconds = 60

[http]
prefix = "/cai-test/"
compat = "trustee"
allow = ["192.0.2.0/24", "2001:db8::/32"]

[limits]
rate = 0
verifiers = 3

[tls]
certificate = "/etc/kbs/tls.pem"
key = "/etc/kbs/tls.key"
"""

YAML = """
data: /var/lib/kbs
listen: 0.0.0.0:8443
kek: /etc/kbs/kek
evidence: {collateral: /var/lib/collateral, rims: /var/lib/rims, ocsp: /var/lib/ocsp}
database:
  url: postgresql+psycopg://kbs@/kbs
admin:
  listen: unix:/run/kbs/admin.sock
attestation: {require_challenge: true, token_seconds: 60}
http:
  prefix: /cai-test/
  compat: trustee
  allow: [192.0.2.0/24, "2001:db8::/32"]
limits: {rate: 0, verifiers: 3}
tls: {certificate: /etc/kbs/tls.pem, key: /etc/kbs/tls.key}
"""


def written(directory: Path, text: str | bytes, name: str = "kbs.toml") -> Path:
    path = directory / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_both_notations_say_the_same(tmp_path: Path) -> None:
    settings = read_config(written(tmp_path, TOML))
    assert settings == read_config(written(tmp_path, YAML, "kbs.yaml"))
    assert settings.http.prefix == "/cai-test"
    assert settings.http.compat is Compat.TRUSTEE
    assert settings.admin_address == "unix:/run/kbs/admin.sock"
    assert settings.attestation.require_challenge
    assert settings.limits.verifiers == 3
    assert settings.tls.pair == (Path("/etc/kbs/tls.pem"), Path("/etc/kbs/tls.key"))
    # Stock clients post where everybody is.
    assert settings.admin.on_main_listener


@pytest.mark.parametrize("name", ["kbs.toml", "kbs.yaml", "kbs.yml"])
def test_an_empty_file_is_the_default(tmp_path: Path, name: str) -> None:
    assert read_config(written(tmp_path, "", name)) == ServeSettings()


def test_the_default_is_the_safe_one() -> None:
    settings = ServeSettings()
    assert settings.http.compat is Compat.NONE
    assert not settings.admin.on_main_listener
    assert settings.listen.startswith("127.0.0.1:")
    assert settings.admin_address.startswith("127.0.0.1:")
    assert settings.limits.rate
    assert settings.unsafe_simulated_root is None


def test_the_administrators_stay_apart_unless_told_so() -> None:
    told = {"http": {"compat": "trustee"}, "admin": {"on_main_listener": False}}
    assert not settings_from(told, where="x").admin.on_main_listener


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ('dta = "x"', "data"), ("[limit]\nrate = 1", "limits"), ("[limits]\nratee = 1", "rate"),
        ("[http]\nprefx = '/x'", "prefix"), ("[tls]\ncert = 'x'", "certificate"),
        ("[evidence]\ncolateral = 'x'", "collateral"),
        ("[attestation]\nrequire_chalenge = true", "require_challenge"),
        ("[database]\nurll = 'x'", "url"),
    ],
)  # fmt: skip
def test_unknown_names_are_refused_with_the_nearest(tmp_path: Path, text: str, hint: str) -> None:
    with pytest.raises(SettingError) as refused:
        read_config(written(tmp_path, text))
    assert hint in (refused.value.hint or "")


@pytest.mark.parametrize(
    "value",
    [
        {"data": ""}, {"data": 1}, {"listen": 8080}, {"http": []}, {"http": {"compat": "x"}},
        {"http": {"prefix": "cai"}}, {"http": {"prefix": "/a b"}}, {"http": {"prefix": "/a/../b"}},
        {"http": {"prefix": "/" + "a" * 300}}, {"http": {"allow": ["x"]}},
        {"http": {"allow": ["192.0.2.1/24"]}}, {"http": {"allow": "192.0.2.0/24"}},
        {"http": {"trusted_proxies": [1]}}, {"limits": {"rate": -1}}, {"limits": {"rate": "1"}},
        {"limits": {"rate": True}}, {"limits": {"requests": 0}}, {"limits": {"verifiers": 0}},
        {"limits": {"request_bytes": 1}}, {"tls": {"certificate": "x"}}, {"tls": {"key": "x"}},
        {"attestation": {"token_seconds": 0}}, {"attestation": {"enabled": 1}},
        {"database": {"url": "mysql://x/y"}},
    ],
)  # fmt: skip
def test_values_out_of_range(value: dict[str, Any]) -> None:
    with pytest.raises(CaiError):
        settings_from(value, where="kbs.toml")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a = ", "kbs.toml"), ("a = 1\na = 2", "kbs.toml"), (b"\xff", "kbs.toml"),
        ("a: [", "kbs.yaml"), ("data: a\ndata: b", "kbs.yaml"), ("- a", "kbs.yaml"),
        ("a: &x {b: 1}\nc: *x", "kbs.yaml"), ("? [a]\n: b", "kbs.yaml"), ("a", "kbs.yaml"),
        ("!!python/object:os.system {}", "kbs.yaml"), ("[" * 5000, "kbs.yaml"),
        ("a: 2024-13-45", "kbs.yaml"),
    ],
)  # fmt: skip
def test_files_of_another_form(tmp_path: Path, text: str | bytes, name: str) -> None:
    with pytest.raises(FormatError):
        read_config(written(tmp_path, text, name))


def test_the_suffix_says_what_a_file_is(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="suffix"):
        read_config(written(tmp_path, TOML, "kbs.conf"))


def test_config_check(tmp_path: Path) -> None:
    written(tmp_path, 'listen = "127.0.0.1:0"\n[limits]\nrate = 7\n')
    done = run_kbs("config", "check", "kbs.toml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "limits.rate = 7" in done.stdout
    written(tmp_path, '[tls]\ncertificate = "missing.pem"\nkey = "missing.key"\n')
    done = run_kbs("config", "check", "kbs.toml", cwd=tmp_path)
    assert done.returncode == 3
    assert "missing.pem" in done.stderr
    written(tmp_path, '[admin]\nlisten = "0.0.0.0:8081"\n')
    done = run_kbs("config", "check", "kbs.toml", cwd=tmp_path)
    assert (done.returncode, "TLS" in done.stderr) == (2, True)
    # Nothing was started or made.
    assert sorted(item.name for item in tmp_path.iterdir()) == ["kbs.toml"]
