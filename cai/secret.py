"""Secret bytes that do not show themselves, and files that only their owner can read."""

from __future__ import annotations

import hmac
import os
from pathlib import Path

from cai.errors import FormatError, InputMissing, StorageError, from_os_error

MAX_SECRET_FILE = 64 * 1024
"""Largest secret file that is read, bytes."""


class Secret:
    """Bytes without a ``repr``, without pickling, compared in constant time."""

    __slots__ = ("_value",)

    def __init__(self, value: bytes) -> None:
        self._value = bytes(value)

    def reveal(self) -> bytes:
        """The bytes themselves; every call of this is a place to review."""
        return self._value

    def __len__(self) -> int:
        return len(self._value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and hmac.compare_digest(self._value, other._value)

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return f"<{len(self._value)} secret bytes>"

    def __reduce__(self) -> str:
        raise TypeError("a secret is not pickled")


def read_secret_file(path: Path, *, what: str) -> Secret:
    """Read a small secret file whole.

    Raises:
        InputMissing, StorageError: it cannot be read.
        FormatError: it is empty or longer than ``MAX_SECRET_FILE``.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_SECRET_FILE + 1)
    except FileNotFoundError as error:
        raise InputMissing(f"{what} {path} does not exist", hint="check the path") from error
    except OSError as error:
        raise from_os_error(error, f"read {what} {path}") from error
    if not data or len(data) > MAX_SECRET_FILE:
        raise FormatError(f"{what} {path}: {len(data)} bytes, expected 1 to {MAX_SECRET_FILE}")
    return Secret(data)


def write_secret_file(path: Path, value: Secret, *, what: str, mode: int = 0o600) -> None:
    """Write a new secret file: never over another one, never readable by others.

    Raises:
        StorageError: it exists already, or cannot be written.
    """
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    except FileExistsError as error:
        raise StorageError(
            f"{what} {path} exists already", hint="choose another name; keys are never overwritten"
        ) from error
    except OSError as error:
        raise from_os_error(error, f"write {what} {path}") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(value.reveal())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        path.unlink(missing_ok=True)
        raise from_os_error(error, f"write {what} {path}") from error
