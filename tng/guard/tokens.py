"""API tokens in a file: only their hashes, with what each may do and until when.

A token is ``cai_ID_SECRET``: the id (public, in listings and logs) finds the row, the secret has
256 random bits, so that its plain SHA-256 is enough at rest. The file is 0600, replaced as a whole,
and read again whenever it changes: a revocation counts for the next request.
"""

from __future__ import annotations

import contextlib
import fcntl
import hmac
import json
import os
import secrets
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from cai import jcs
from cai.errors import (
    FormatError,
    InputMissing,
    LimitExceeded,
    SettingError,
    StorageError,
    from_os_error,
)
from cai.secret import Secret
from cai.settings import Section
from tng.guard.limits import NO_LIMITS, Limits, parse_limits

MAX_FILE = 4 * 1024 * 1024
"""Longest token file, bytes."""

MAX_TOKENS = 10_000
"""Most tokens of a file, revoked ones included."""

MAX_NAME = 64
"""Longest name of a token's holder, characters."""

ID_BYTES = 5
SECRET_BYTES = 32

PREFIX = "cai_"


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One token as the file holds it.

    Attributes:
        id: public name of the token, 10 hex digits.
        name: who holds it; limits and prompt cache are this holder's, whatever the token.
        sha256: of the secret, hex.
        created: Unix time, seconds.
        expires: Unix time, seconds; 0 never.
        revoked: Unix time, seconds; 0 when it is not.
        limits: of its holder.
    """

    id: str
    name: str
    sha256: str
    created: int
    expires: int = 0
    revoked: int = 0
    limits: Limits = NO_LIMITS

    def state(self, now: float) -> str:
        """``valid``, ``expired`` or ``revoked``."""
        if self.revoked:
            return "revoked"
        return "expired" if self.expires and now >= self.expires else "valid"

    @property
    def masked(self) -> str:
        """The token as listings show it."""
        return f"{PREFIX}{self.id}_…"

    def to_json(self) -> dict[str, object]:
        """The row as the file holds it."""
        return {
            "id": self.id,
            "name": self.name,
            "sha256": self.sha256,
            "created": self.created,
            "expires": self.expires,
            "revoked": self.revoked,
            "limits": self.limits.to_json(),
        }


def split_token(text: str) -> tuple[str, bytes] | None:
    """Id and SHA-256 of the secret of what looks like a token of ours; ``None`` for others."""
    if not text.startswith(PREFIX) or not text.isascii() or len(text) > 128:
        return None
    name, separator, secret = text.removeprefix(PREFIX).partition("_")
    if not separator or len(name) != 2 * ID_BYTES or not secret:
        return None
    return name, sha256(secret.encode("ascii")).digest()


class TokenFile:
    """The tokens of one file, as of its last change.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, ...] | None = None
        self._rows: dict[str, TokenRow] = {}

    def find(self, text: str, *, now: float) -> tuple[TokenRow, str] | None:
        """The row of a token, and its state; ``None`` when there is no such token.

        Args:
            text: the whole token.
            now: Unix time, seconds.

        Raises:
            InputMissing, StorageError, FormatError: the file cannot be used; nobody gets in then.
        """
        self._refresh()
        parts = split_token(text)
        if parts is None:
            return None
        row = self._rows.get(parts[0])
        known = bytes.fromhex(row.sha256) if row is not None else bytes(32)
        if not hmac.compare_digest(known, parts[1]) or row is None:
            return None
        return row, row.state(now)

    def _refresh(self) -> None:
        try:
            found = self._path.stat()
        except OSError as error:
            self._seen = None
            raise from_os_error(error, f"read token file {self._path}") from error
        # The change time moves with the mode too.
        seen = (found.st_ctime_ns, found.st_mtime_ns, found.st_size, found.st_ino)
        if seen != self._seen:
            self._rows = {row.id: row for row in read_tokens(self._path)}
            self._seen = seen


def read_tokens(path: Path) -> tuple[TokenRow, ...]:
    """Every row of a file.

    Raises:
        InputMissing, StorageError: it does not exist, cannot be read, or others can read it.
        FormatError, LimitExceeded, SettingError: it is no token file.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as file:
            mode = stat.S_IMODE(os.fstat(handle).st_mode)
            if mode & 0o077:
                raise StorageError(
                    f"token file {path} has mode {mode:04o}: others can read it",
                    hint=f"chmod 600 {path}",
                )
            data = file.read(MAX_FILE + 1)
    except FileNotFoundError as error:
        raise InputMissing(
            f"token file {path} does not exist", hint="`tng token create` makes it"
        ) from error
    except OSError as error:
        raise from_os_error(error, f"read token file {path}") from error
    value = jcs.parse(data, what=f"token file {path}", limit=MAX_FILE)
    top = Section(value, where=f"token file {path}")
    if top.integer("cai-tokens", least=1, most=1, unit="(version)") != 1:
        raise FormatError(f"token file {path}: of another version")
    rows = top.raw("tokens")
    top.finish()
    if not isinstance(rows, list):
        raise FormatError(f"token file {path}: tokens is not a list")
    if len(rows) > MAX_TOKENS:
        raise LimitExceeded(f"token file {path}: more than {MAX_TOKENS} tokens")
    parsed = tuple(_row(item, path) for item in rows)
    if len({row.id for row in parsed}) != len(parsed):
        raise FormatError(f"token file {path}: an id is given twice")
    return parsed


def create_token(
    path: Path, name: str, *, expires: int = 0, limits: Limits | None = None
) -> tuple[TokenRow, Secret]:
    """Add a token; the file is made when it does not exist.

    Args:
        path: of the file.
        name: who gets it.
        expires: Unix time, seconds; 0 never.
        limits: of its holder.

    Returns:
        The row, and the token, which is shown this once.

    Raises:
        StorageError, FormatError, LimitExceeded: the file cannot be used.
        SettingError: no such name.
    """
    demand_name(name)
    secret = secrets.token_urlsafe(SECRET_BYTES)
    with _changing(path, create=True) as rows:
        if len(rows) >= MAX_TOKENS:
            raise LimitExceeded(f"token file {path}: more than {MAX_TOKENS} tokens")
        taken = {row.id for row in rows}
        while (made := secrets.token_hex(ID_BYTES)) in taken:
            pass
        digest = sha256(secret.encode("ascii")).hexdigest()
        row = TokenRow(made, name, digest, int(time.time()), expires, 0, limits or NO_LIMITS)
        rows.append(row)
    return row, Secret(f"{PREFIX}{row.id}_{secret}".encode("ascii"))


def revoke_token(path: Path, which: str) -> tuple[TokenRow, ...]:
    """Revoke a token by its id, or every token of a name; the rows stay as a record.

    Raises:
        InputMissing: the file or the token does not exist.
        StorageError, FormatError: the file cannot be used.
    """
    with _changing(path, create=False) as rows:
        found = [row for row in rows if which in (row.id, row.name)]
        if not found:
            raise InputMissing(f"no token {which!r}", hint="`tng token list` shows ids and names")
        revoked = tuple(replace(row, revoked=row.revoked or int(time.time())) for row in found)
        changed = {row.id: row for row in revoked}
        rows[:] = [changed.get(row.id, row) for row in rows]
    return revoked


def demand_name(name: str) -> None:
    """Refuse a name that cannot be shown in a line.

    Raises:
        SettingError: it is empty, too long, or not printable.
    """
    if not 1 <= len(name) <= MAX_NAME or not name.isprintable() or name != name.strip():
        raise SettingError(f"a token's name has 1 to {MAX_NAME} printable characters")


@contextlib.contextmanager
def _changing(path: Path, *, create: bool) -> Iterator[list[TokenRow]]:
    """The rows, to be changed in place; written back as a whole, one writer at a time."""
    try:
        lock = os.open(
            path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
    except OSError as error:
        raise from_os_error(error, f"write token file {path}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = list(read_tokens(path)) if path.exists() or not create else []
        yield rows
        _write(path, rows)
    finally:
        os.close(lock)


def _write(path: Path, rows: list[TokenRow]) -> None:
    value = {"cai-tokens": 1, "tokens": [row.to_json() for row in rows]}
    data = json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n"
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise from_os_error(error, f"write token file {path}") from error


def _row(value: Any, path: Path) -> TokenRow:
    section = Section(value, where=f"token file {path}: token")
    most = jcs.MAX_INTEGER
    digest, name = section.text("sha256"), section.text("name")
    if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise FormatError(f"{section.where}: sha256 is not 64 hex digits")
    row = TokenRow(
        section.text("id"),
        name,
        digest,
        section.integer("created", least=0, most=most, unit="seconds"),
        section.integer("expires", 0, least=0, most=most, unit="seconds"),
        section.integer("revoked", 0, least=0, most=most, unit="seconds"),
        parse_limits(section.section("limits")),
    )
    section.finish()
    demand_name(name)
    return row
