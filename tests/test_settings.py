"""Strict settings: unknown names, wrong types, limits, env files."""

from __future__ import annotations

from pathlib import Path

import pytest

from cai.errors import CaiError, FormatError, InputMissing, LimitExceeded, SettingError
from cai.settings import MAX_SETTINGS_FILE, Section, parse_env, read_settings_file


def test_a_misspelt_name_is_refused_with_the_nearest() -> None:
    section = Section({"tcb_statis": []}, where="policy.toml [tdx]")
    with pytest.raises(SettingError, match="unknown setting 'tcb_statis'") as caught:
        section.finish({"tcb_status"})
    assert caught.value.hint == "did you mean 'tcb_status'?"


def test_an_unlike_name_is_refused_with_the_list() -> None:
    with pytest.raises(SettingError) as caught:
        Section({"zzz": 1}, where="x").finish({"alpha", "beta"})
    assert caught.value.hint == "known are: alpha, beta"


@pytest.mark.parametrize(
    ("method", "value"),
    [
        ("text", 1), ("text", None), ("flag", "yes"), ("flag", 1), ("texts", "a"), ("texts", [1]),
    ],
)
def test_wrong_types(method: str, value: object) -> None:
    with pytest.raises(SettingError):
        getattr(Section({"name": value}, where="x"), method)("name")


@pytest.mark.parametrize("value", [-1, 11, True, "5", 5.0, None])
def test_integers_have_limits(value: object) -> None:
    with pytest.raises(SettingError):
        Section({"name": value}, where="x").integer("name", least=0, most=10, unit="bytes")


def test_defaults_apply_to_absent_members_only() -> None:
    section = Section({"there": False}, where="x")
    assert section.flag("there", default=True) is False
    assert section.flag("absent", default=True) is True
    assert section.section("absent") is None
    section.finish()


def test_a_table_is_demanded() -> None:
    with pytest.raises(SettingError):
        Section([], where="x")  # type: ignore[arg-type]


ENV = b"""
# comment
A=1
B = "two words"
C='x'y'
D=
"""


def test_env_file() -> None:
    values = parse_env(ENV, ("A", "B", "C", "D"), where="cai.env")
    assert values == {"A": "1", "B": "two words", "C": "x'y", "D": ""}


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"A", FormatError), (b"\xff=1", FormatError), (b"A=1\nA=2", SettingError),
        (b"AA=1", SettingError), (b"=1", SettingError), (b"export A=1", SettingError),
    ],
)
def test_bad_env_files(data: bytes, kind: type[CaiError]) -> None:
    with pytest.raises(kind):
        parse_env(data, ("A",), where="cai.env")


def test_settings_files_are_bounded(tmp_path: Path) -> None:
    with pytest.raises(InputMissing):
        read_settings_file(tmp_path / "absent", what="settings")
    with pytest.raises(CaiError, match="directory"):
        read_settings_file(tmp_path, what="settings")
    large = tmp_path / "large"
    large.write_bytes(bytes(MAX_SETTINGS_FILE + 1))
    with pytest.raises(LimitExceeded):
        read_settings_file(large, what="settings")
