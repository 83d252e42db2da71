"""Where the database may be said to be."""

from __future__ import annotations

from pathlib import Path

import pytest

from cai.errors import SettingError
from cai.settings import Section
from kbs.database.settings import DatabaseSettings

GOOD = "postgresql+psycopg://kbs@db.example/kbs"


def read(**values: object) -> DatabaseSettings:
    return DatabaseSettings.from_table(Section(values, where="kbs.toml [database]"))


def test_nothing_said_is_sqlite() -> None:
    assert DatabaseSettings.from_table(None) == DatabaseSettings() == read()
    assert DatabaseSettings().parsed is None


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg://kbs:secret@localhost/kbs",
        "postgresql+psycopg://kbs:@localhost/kbs",
        "postgresql://kbs:secret@localhost/kbs",
        "postgresql+psycopg://kbs@localhost/kbs?password=secret",
        "postgresql+psycopg://kbs@localhost/kbs?options=-csearch_path%3Dx",
        "postgresql+psycopg://kbs@localhost/kbs?sslmod=disable",
        "postgresql+psycopg://kbs@localhost/kbs?sslmode=a&sslmode=b",
        "postgresql+psycopg://kbs@localhost",
        "postgresql+psycopg2://kbs@localhost/kbs",
        "postgresql+psycopg://kbs@localhost:port/kbs",
        "mysql://kbs@localhost/kbs",
        "sqlite:///kbs.sqlite",
        "kbs",
        "://",
        "host=localhost password=secret",
    ],
)
def test_other_addresses_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(SettingError) as caught:
        DatabaseSettings(url)
    assert "secret" not in str(caught.value) + str(caught.value.hint)


@pytest.mark.parametrize("mode", ["disable", "allow", "prefer", "require"])
def test_a_server_elsewhere_is_verified(mode: str) -> None:
    parsed = DatabaseSettings(GOOD).parsed
    assert parsed is not None
    assert dict(parsed.query) == {"sslmode": "verify-full", "sslrootcert": "system"}
    own = DatabaseSettings(f"{GOOD}?sslrootcert=/ca.pem").parsed
    assert own is not None
    assert dict(own.query) == {"sslmode": "verify-full", "sslrootcert": "/ca.pem"}
    for where in (GOOD, "postgresql+psycopg://kbs@/kbs?host=10.0.0.1"):
        with pytest.raises(SettingError, match="does not check"):
            DatabaseSettings(f"{where}{'&' if '?' in where else '?'}sslmode={mode}")
    loose = DatabaseSettings(f"{GOOD}?sslmode={mode}", unsafe_unverified_tls=True)
    assert loose.unsafe == ("unsafe_unverified_tls",)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", ""])
def test_a_server_here_needs_no_certificate(host: str) -> None:
    parsed = DatabaseSettings(f"postgresql://kbs@{host}/kbs").parsed
    assert parsed is not None
    assert parsed.drivername == "postgresql+psycopg"
    assert "sslmode" not in parsed.query


@pytest.mark.parametrize(
    "values",
    [
        {"url": 5}, {"pool": 0}, {"pool": 201}, {"pool": True}, {"pools": 5}, {"password": "x"},
        {"password_file": "p"}, {"url": GOOD, "unsafe_unverified_tls": "yes"},
    ],
)  # fmt: skip
def test_settings_of_another_form_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(SettingError):
        read(**values)


def test_settings() -> None:
    found = read(url=GOOD, password_file="/run/credentials/db", pool=3)
    assert (found.password_file, found.pool) == (Path("/run/credentials/db"), 3)
    assert found.unsafe == ()
