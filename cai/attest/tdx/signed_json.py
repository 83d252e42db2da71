"""Reading the JSON that Intel signs: what is missing or of another type is refused by name."""

from __future__ import annotations

from typing import Any

from cai import jcs
from cai.errors import FormatError

MAX_SIGNED_JSON = 1024 * 1024
"""Longest signed text that is parsed, bytes."""

MAX_LEVELS = 256
"""Most levels in one list."""


class Members:
    """Reads a signed JSON object; whatever is missing or of another type is a ``FormatError``."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise FormatError(f"{where}: expected an object")
        self._value, self.where = value, where

    @classmethod
    def parse(cls, text: str, where: str) -> Members:
        """Parse a text strictly."""
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise FormatError(f"{where}: lone surrogate") from error
        return cls(jcs.parse(data, what=where, limit=MAX_SIGNED_JSON), where)

    def text(self, name: str) -> str:
        """A string."""
        value = self._value.get(name)
        if not isinstance(value, str):
            raise FormatError(f"{self.where}: {name} is not a string")
        return value

    def integer(self, name: str, most: int) -> int:
        """A whole number from 0 to ``most``."""
        value = self._value.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
            raise FormatError(f"{self.where}: {name} is not a number from 0 to {most}")
        return value

    def hex(self, name: str, size: int) -> bytes:
        """Bytes in hex of either case."""
        text = self.text(name)
        if len(text) != 2 * size or not set(text) <= set("0123456789abcdefABCDEF"):
            raise FormatError(f"{self.where}: {name} is not {2 * size} hex digits")
        return bytes.fromhex(text)

    def member(self, name: str) -> Members:
        """An object."""
        return Members(self._value.get(name), f"{self.where}.{name}")

    def objects(self, name: str, *, optional: bool = False) -> list[Members]:
        """A list of objects."""
        value = self._value.get(name)
        if value is None and optional:
            return []
        if not isinstance(value, list) or len(value) > MAX_LEVELS:
            raise FormatError(f"{self.where}: {name} is not a list of at most {MAX_LEVELS}")
        return [Members(item, f"{self.where}.{name}") for item in value]

    def texts(self, name: str) -> tuple[str, ...]:
        """An optional list of strings."""
        value = self._value.get(name, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise FormatError(f"{self.where}: {name} is not a list of strings")
        return tuple(value)

    def word(self, name: str, known: tuple[str, ...]) -> str:
        """A string that is one of the known ones."""
        text = self.text(name)
        if text not in known:
            raise FormatError(f"{self.where}: {name} is {text[:40]!r}, which is unknown")
        return text
