"""Key files: 64 lower-case hex digits and at most one newline, readable by their owner only."""

from __future__ import annotations

import os
import re
from pathlib import Path

from cai.errors import FormatError
from cai.model.layout import KEY_SIZE
from cai.secret import Secret, read_secret_file, write_secret_file

_KEY = re.compile(rb"([0-9a-f]{64})\n?")


def new_key() -> Secret:
    """A fresh random key of 32 bytes."""
    return Secret(os.urandom(KEY_SIZE))


def read_key_file(path: Path) -> Secret:
    """Read a key file.

    Raises:
        InputMissing, StorageError: it cannot be read.
        FormatError: it is not 64 lower-case hex digits and at most one newline.
    """
    match = _KEY.fullmatch(read_secret_file(path, what="key file").reveal())
    if not match:
        raise FormatError(
            f"key file {path} is not 64 lower-case hex digits",
            hint="give the file that 'cai encrypt --key-out' wrote",
        )
    return Secret(bytes.fromhex(match[1].decode("ascii")))


def write_key_file(path: Path, key: Secret) -> None:
    """Write a new key file, mode 0600.

    Raises:
        StorageError: it exists already, or cannot be written.
    """
    write_secret_file(path, Secret(key.reveal().hex().encode("ascii") + b"\n"), what="key file")
