"""Strict settings: unknown names are refused with the nearest suggestion; numbers have limits.

The three programs read their settings through this module, so that a misspelt key never silently
loosens anything, whichever file it stands in.

    >>> section = Section({"tcb_statis": ["UpToDate"]}, where="policy.toml [tdx]")
    >>> section.finish({"tcb_status"})
    Traceback (most recent call last):
    cai.errors.SettingError: policy.toml [tdx]: unknown setting 'tcb_statis'
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cai.errors import FormatError, InputMissing, LimitExceeded, SettingError, from_os_error

MAX_SETTINGS_FILE = 1024 * 1024
"""Largest settings file that is read, bytes."""


def suggestion(name: str, known: Iterable[str]) -> str | None:
    """A hint that names the known setting nearest to ``name``, if one is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else None


def refuse_unknown(names: Iterable[str], known: Iterable[str], *, where: str) -> None:
    """Refuse the first name that is not known.

    Raises:
        SettingError: with the nearest known name as hint.
    """
    allowed = set(known)
    for name in names:
        if name not in allowed:
            hint = suggestion(name, allowed) or f"known are: {', '.join(sorted(allowed))}"
            raise SettingError(f"{where}: unknown setting {name!r}", hint=hint)


class Section:
    """One table of settings that is read member by member, then closed.

    Args:
        values: the parsed table.
        where: names the table in errors, e.g. ``"policy.toml [tdx]"``.
    """

    def __init__(self, values: Mapping[str, Any], *, where: str) -> None:
        if not isinstance(values, Mapping):
            raise SettingError(f"{where}: expected a table")
        self._values = values
        self._read: set[str] = set()
        self.where = where

    def has(self, name: str) -> bool:
        """Whether the member is present (an explicit null counts as absent)."""
        self._read.add(name)
        return self._values.get(name) is not None

    def text(self, name: str, default: str | None = None) -> str:
        """A string member."""
        value: str = self._typed(name, str, default, "a string")
        return value

    def flag(self, name: str, *, default: bool | None = None) -> bool:
        """A boolean member."""
        value: bool = self._typed(name, bool, default, "true or false")
        return value

    def integer(
        self, name: str, default: int | None = None, *, least: int, most: int, unit: str
    ) -> int:
        """An integer member within its limits."""
        value: int = self._typed(name, int, default, f"a whole number of {unit}")
        if isinstance(value, bool) or not least <= value <= most:
            raise SettingError(
                f"{self.where}: {name} is {value}, expected {least} to {most} {unit}"
            )
        return value

    def texts(self, name: str, default: list[str] | None = None) -> list[str]:
        """A list of strings."""
        value = self._typed(name, list, default, "a list of strings")
        if not all(isinstance(item, str) for item in value):
            raise SettingError(f"{self.where}: {name} must be a list of strings")
        return list(value)

    def section(self, name: str) -> Section | None:
        """A nested table, or ``None`` when it is absent."""
        if not self.has(name):
            return None
        return Section(self._values[name], where=f"{self.where}.{name}")

    def raw(self, name: str) -> Any:
        """A member as parsed, or ``None``."""
        self._read.add(name)
        return self._values.get(name)

    def holds(self, name: str) -> bool:
        """Whether the member is written at all, be it null."""
        self._read.add(name)
        return name in self._values

    @property
    def read_names(self) -> frozenset[str]:
        """The members that were asked for."""
        return frozenset(self._read)

    def unread(self, also_known: Iterable[str] = ()) -> tuple[str, ...]:
        """The members that nobody asked for, where a format ignores unknown ones."""
        known = self._read | set(also_known)
        return tuple(name for name in self._values if name not in known)

    def finish(self, also_known: Iterable[str] = ()) -> None:
        """Refuse every member that nobody asked for.

        Raises:
            SettingError: with the nearest known name as hint.
        """
        refuse_unknown(self._values, self._read | set(also_known), where=self.where)

    def _typed(self, name: str, kind: type, default: Any, expected: str) -> Any:
        self._read.add(name)
        value = self._values.get(name)
        if value is None:
            if default is None:
                raise SettingError(f"{self.where}: {name} is missing", hint=f"give {expected}")
            return default
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            raise SettingError(f"{self.where}: {name} must be {expected}")
        return value


def read_settings_file(path: Path, *, what: str) -> bytes:
    """Read a settings file whole.

    Raises:
        InputMissing, InputError, StorageError: it cannot be read.
        LimitExceeded: it is longer than ``MAX_SETTINGS_FILE``.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_SETTINGS_FILE + 1)
    except FileNotFoundError as error:
        raise InputMissing(f"{what} {path} does not exist", hint="check the path") from error
    except OSError as error:
        raise from_os_error(error, f"read {what} {path}") from error
    if len(data) > MAX_SETTINGS_FILE:
        raise LimitExceeded(f"{what} {path}: more than {MAX_SETTINGS_FILE} bytes")
    return data


def parse_env(data: bytes, known: Iterable[str], *, where: str) -> dict[str, str]:
    """Parse ``NAME=value`` lines as Compose reads an env file, names strictly.

    Blank lines and lines that start with ``#`` are skipped; one pair of equal quotes around a value
    is taken off; there is no expansion.

    Raises:
        FormatError: not UTF-8, or a line without ``=``.
        SettingError: an unknown or repeated name.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{where}: not UTF-8") from error
    allowed = set(known)
    values: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        name, equals, value = stripped.partition("=")
        name, value = name.strip(), value.strip()
        if not equals:
            raise FormatError(f"{where} line {number}: expected NAME=value")
        refuse_unknown([name], allowed, where=f"{where} line {number}")
        if name in values:
            raise SettingError(f"{where} line {number}: {name} is set twice")
        if len(value) >= 2 and value[0] == value[-1] and value[0] in "'\"":
            value = value[1:-1]
        values[name] = value
    return values
