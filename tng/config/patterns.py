"""Regular expressions of a configuration.

TNG's are those of Rust's ``regex``, which never backtrack. Python's may, so a pattern is bounded in
length and what it is matched against is bounded by the callers.
"""

from __future__ import annotations

import re

from cai.errors import SettingError

MAX_PATTERN = 1024
"""Longest pattern, characters."""


def compile_pattern(text: str, where: str, *, flags: int = 0) -> re.Pattern[str]:
    """A pattern of the configuration.

    Raises:
        SettingError: it is no regular expression, or too long.
    """
    if len(text) > MAX_PATTERN:
        raise SettingError(f"{where}: a pattern of {len(text)} characters, at most {MAX_PATTERN}")
    try:
        return re.compile(text, flags)
    except (re.error, RecursionError, OverflowError) as error:
        raise SettingError(f"{where}: {text!r} is not a regular expression: {error}") from error
