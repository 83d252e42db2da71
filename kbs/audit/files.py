"""Files of the log on disk: read line by line with limits, written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from cai.attest.checkpoint import MAX_NOTE, parse_verifier_key
from cai.errors import FormatError, InputMissing, LimitExceeded, StorageError, from_os_error
from kbs.audit.proof import MAX_LINE

MAX_KEYS = 64 * 1024
"""Largest file of keys, bytes."""


def read_lines(path: Path) -> Iterator[bytes]:
    """Lines of an export or proof without their ends.

    Raises:
        InputMissing, StorageError: it cannot be read.
        LimitExceeded: a line is too long.
    """
    try:
        with path.open("rb") as file:
            while line := file.readline(MAX_LINE + 1):
                if len(line) > MAX_LINE:
                    raise LimitExceeded(f"{path}: a line of more than {MAX_LINE} bytes")
                yield line.removesuffix(b"\n")
    except OSError as error:
        raise from_os_error(error, f"read {path}") from error


def read_note(path: Path) -> bytes:
    """A checkpoint that was kept.

    Raises:
        InputMissing, StorageError: it cannot be read.
        LimitExceeded: it is too long for one.
    """
    return _read(path, MAX_NOTE)


def read_keys(texts: Iterable[str]) -> list[bytes]:
    """Public keys of a log: each text is a key, or a file with a key on each line.

    Raises:
        FormatError, LimitExceeded: not a key.
        InputMissing, StorageError: a file cannot be read.
    """
    keys: list[bytes] = []
    for text in texts:
        try:
            keys.append(parse_verifier_key(text))
            continue
        except FormatError:
            path = Path(text)
            if not path.exists():
                raise FormatError(
                    f"--key {text[:80]!r} is neither a key nor a file",
                    hint="64 hex digits, name+id+base64, or a file that `kbs audit key` wrote",
                ) from None
        lines = _read(path, MAX_KEYS).decode("utf-8", "replace").splitlines()
        keys += [parse_verifier_key(line) for line in lines if line.strip()]
    return keys


def write_new(path: Path, lines: Iterable[bytes]) -> None:
    """Write a new file; on any error none is left.

    Raises:
        InputMissing, StorageError: it exists already or cannot be written.
    """
    _write(path, (line + b"\n" for line in lines), replace=False)


def keep_note(path: Path, note: bytes) -> None:
    """Keep a checkpoint in place of the one before it.

    Raises:
        StorageError: it cannot be written.
    """
    _write(path, (note,), replace=True)


def _read(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise from_os_error(error, f"read {path}") from error
    if len(data) > limit:
        raise LimitExceeded(f"{path}: more than {limit} bytes")
    return data


def _write(path: Path, parts: Iterable[bytes], *, replace: bool) -> None:
    if not replace and path.exists():
        raise StorageError(f"{path} exists already", hint="name a new file")
    if not path.parent.is_dir():
        raise InputMissing(f"{path.parent} is not a directory")
    temporary: Path | None = None
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        with os.fdopen(descriptor, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            temporary.replace(path)
        else:
            path.hardlink_to(temporary)  # refuses a file that came meanwhile
    except OSError as error:
        raise from_os_error(error, f"write {path}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
