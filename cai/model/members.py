"""Strict reading of the members of our JSON documents: form, range, nothing missing, nothing extra.

``cai.settings`` does this for what people write and suggests names; documents that programs write
give a ``FormatError`` that names the document instead.
"""

from __future__ import annotations

import re
from typing import Any

from cai.errors import FormatError
from cai.jcs import MAX_INTEGER

_HEX = re.compile(r"(?:[0-9a-f]{2})*")
_FLAG = re.compile(r"[a-z][a-z0-9-]{0,31}")

MAX_FLAGS = 32
"""Most flags in one ``allow`` list."""


class Members:
    """The members of one JSON object, read one by one, then closed.

    Args:
        value: the parsed JSON value; anything but an object is refused.
        where: names the object in errors.
    """

    def __init__(self, value: Any, *, where: str) -> None:
        if not isinstance(value, dict):
            raise FormatError(f"{where}: expected a JSON object")
        self._values = value
        self._read: set[str] = set()
        self.where = where

    def has(self, name: str) -> bool:
        """Whether the member is present; does not count as reading it."""
        return name in self._values

    def raw(self, name: str) -> Any:
        """A member of any form."""
        self._read.add(name)
        if name not in self._values:
            raise FormatError(f"{self.where}: member {name!r} is missing")
        return self._values[name]

    def text(self, name: str, *, most: int) -> str:
        """A string of at most ``most`` bytes in UTF-8."""
        value = self.raw(name)
        if not isinstance(value, str):
            raise self.wrong(name, "a string")
        if len(value.encode("utf-8", "surrogatepass")) > most:
            raise self.wrong(name, f"a string of at most {most} bytes")
        return value

    def constant(self, name: str, expected: str | int) -> None:
        """A member with one allowed value."""
        value = self.raw(name)
        if type(value) is not type(expected) or value != expected:
            raise self.wrong(name, repr(expected))

    def integer(self, name: str, *, least: int, most: int = MAX_INTEGER) -> int:
        """An integer in its range."""
        value = self.raw(name)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self.wrong(name, f"an integer from {least} to {most}")
        return value

    def hex(self, name: str, size: int, *, empty: bool = False) -> str:
        """Lower-case hex of ``size`` bytes, or ``""`` where that is allowed."""
        value = self.raw(name)
        if empty and value == "":
            return ""
        if not isinstance(value, str) or len(value) != 2 * size or not _HEX.fullmatch(value):
            raise self.wrong(name, f"{2 * size} lower-case hex digits")
        return value

    def list(self, name: str, *, most: int) -> list[Any]:
        """A list of at most ``most`` items."""
        value = self.raw(name)
        if not isinstance(value, list) or len(value) > most:
            raise self.wrong(name, f"a list of at most {most} items")
        return value

    def object(self, name: str) -> Members:
        """A nested object."""
        return Members(self.raw(name), where=f"{self.where}.{name}")

    def flags(self, name: str) -> tuple[str, ...]:
        """An ``allow`` list (§5.1)."""
        value = self.list(name, most=MAX_FLAGS)
        if not valid_flags(value):
            raise self.wrong(name, "sorted, different flags of the form [a-z][a-z0-9-]*")
        return tuple(value)

    def finish(self) -> None:
        """Refuse members that nobody read."""
        unknown = sorted(set(self._values) - self._read)
        if unknown:
            raise FormatError(f"{self.where}: unknown member {unknown[0]!r}")

    def wrong(self, name: str, expected: str) -> FormatError:
        """The error for a member of another form than expected."""
        return FormatError(f"{self.where}: member {name!r} must be {expected}")


def valid_flags(flags: list[Any]) -> bool:
    """Whether these are flags, sorted and all different."""
    if len(flags) > MAX_FLAGS or not all(isinstance(flag, str) for flag in flags):
        return False
    return flags == sorted(set(flags)) and all(_FLAG.fullmatch(flag) for flag in flags)
