"""Packages that only some key providers need, and that come with an extra of their own."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from cai.errors import SettingError


def load(module: str, *, extra: str) -> Any:
    """Import a module of an optional package.

    Raises:
        SettingError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise SettingError(
            f"the package {module.partition('.')[0]} is not installed",
            hint=f"pip install 'cai-confidential[{extra}]'",
        ) from error
