r"""What an interrupted sealing had finished, so that the next run goes on (docs/spec-format.md §9).

The journal lies in ``OUT.partial-<random>`` and holds object keys, so it is encrypted. A line is
added when an object is on the disk. Going on never continues inside an object, and a new run begins
a new journal under a new key: nothing is ever encrypted twice under one nonce.

    "CAIJNL1\n" ‖ salt (32), then for each line: u32(length) ‖ AES-256-GCM(key, u96(number), line)
    key = Expand(Extract(salt, secret), "cai/1 journal")
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cai import jcs
from cai.errors import FormatError, LimitExceeded
from cai.model import derive
from cai.model.index import StoredFile
from cai.model.layout import KEY_SIZE, MAX_OBJECT_SIZE, OBJECT_NAME
from cai.model.manifest import Stored
from cai.model.members import Members
from cai.model.object import Shape
from cai.model.paths import MAX_PATH
from cai.model.stage import new_file, sync_directory
from cai.secret import Secret

JOURNAL_FILE = "journal"
_MAGIC = b"CAIJNL1\n"
_SALT = 32
_LABEL = b"cai/1 journal"

MAX_LINE = 32 * 1024 * 1024
"""Longest line, bytes: the digests of one object of 2^40 bytes fit."""

MAX_JOURNAL = 256 * 1024 * 1024
"""Largest journal that is read, bytes; a larger one is not gone on with."""


@dataclass(frozen=True, slots=True)
class Finished:
    """One object that is on the disk.

    Attributes:
        path: of the plain file.
        state: what tells that the plain file did not change: inode, size, times.
        sha256: of the plain file, hex.
        stored: where it is stored.
        listed: its line of the index.
    """

    path: str
    state: tuple[str, ...]
    sha256: str
    stored: Stored
    listed: StoredFile = field(repr=False)

    def encode(self) -> bytes:
        """The line's plain bytes."""
        stored = self.stored
        return jcs.canonical(
            {
                "path": self.path, "state": list(self.state), "sha256": self.sha256,
                "object": stored.name, "object_key": stored.key.hex(),
                "object_digest": stored.digest, "object_size": stored.shape.size,
                "chunk": stored.shape.chunk, "blake3": "".join(self.listed.pieces),
            }
        )

    @classmethod
    def parse(cls, data: bytes) -> Finished:
        """The line of its plain bytes; ``FormatError`` when it has another form."""
        value = jcs.parse_canonical(data, what="journal", limit=MAX_LINE)
        members = Members(value, where="journal")
        size = members.integer("object_size", least=1, most=MAX_OBJECT_SIZE)
        shape = Shape.read(members, size)
        name = members.text("object", most=32)
        if not OBJECT_NAME.fullmatch(name):
            raise members.wrong("object", "32 lower-case hex digits")
        pieces = members.text("blake3", most=MAX_LINE)
        line = cls(
            members.text("path", most=MAX_PATH),
            tuple(str(item) for item in members.list("state", most=16)),
            members.hex("sha256", 32),
            Stored(
                name, bytes.fromhex(members.hex("object_key", KEY_SIZE)),
                members.hex("object_digest", 32), shape,
            ),
            StoredFile(
                shape.stored, tuple(pieces[i : i + 64] for i in range(0, len(pieces), 64))
            ),
        )
        members.finish()
        return line


class Journal:
    """The journal of a running sealing; safe to use from several threads.

    Args:
        directory: the directory in the making.
        secret: encrypts it; whoever has it can go on.
        kek: kept in it, for a run whose key is on no disk otherwise.
        finished: objects of an earlier run that are gone on with.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(
        self, directory: Path, secret: Secret, *, kek: Secret | None = None,
        finished: Iterable[Finished] = (),
    ) -> None:
        self._lock = threading.Lock()
        self._path = directory / JOURNAL_FILE
        self._number = 0
        salt = os.urandom(_SALT)
        self._aead = _cipher(secret, salt)
        fresh = directory / f"{JOURNAL_FILE}.new"
        fresh.unlink(missing_ok=True)
        self._fd = new_file(fresh, mode=0o600)
        try:
            os.write(self._fd, _MAGIC + salt)
            head: dict[str, Any] = {"cai-journal": 1, "kek": kek.reveal().hex() if kek else ""}
            for line in (jcs.canonical(head), *(done.encode() for done in finished)):
                self._append(line)
            os.fsync(self._fd)
            fresh.replace(self._path)
            sync_directory(directory)
        except BaseException:
            self.close()
            raise

    def add(self, finished: Finished) -> None:
        """Note an object that is on the disk.

        Raises:
            OSError: it cannot be written.
        """
        line = finished.encode()
        with self._lock:
            self._append(line)
            os.fdatasync(self._fd)

    def remove(self) -> None:
        """Close and remove it: the sealing is complete.

        Raises:
            OSError: it cannot be removed.
        """
        self.close()
        self._path.unlink()

    def close(self) -> None:
        """Close it; what it holds stays."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _append(self, line: bytes) -> None:
        sealed = self._aead.encrypt(self._number.to_bytes(12, "big"), line, None)
        self._number += 1
        rest = memoryview(len(sealed).to_bytes(4, "big") + sealed)
        while rest:
            rest = rest[os.write(self._fd, rest) :]


def read_journal(directory: Path, secret: Secret) -> tuple[Secret | None, list[Finished]] | None:
    """The key and the finished objects that a dead run noted; ``None`` without a usable journal.

    A line that is cut off or does not verify ends it: everything before it stands.
    """
    try:
        with (directory / JOURNAL_FILE).open("rb") as file:
            data = file.read(MAX_JOURNAL + 1)
    except OSError:
        return None
    start = len(_MAGIC) + _SALT
    if len(data) > MAX_JOURNAL or len(data) < start or not data.startswith(_MAGIC):
        return None
    lines = _lines(data[start:], _cipher(secret, data[len(_MAGIC) : start]))
    try:
        head = Members(jcs.parse_canonical(lines[0], what="journal", limit=1024), where="journal")
        head.constant("cai-journal", 1)
        kek = head.text("kek", most=2 * KEY_SIZE)
        found = Secret(bytes.fromhex(head.hex("kek", KEY_SIZE))) if kek else None
        return found, [Finished.parse(line) for line in lines[1:]]
    except (FormatError, LimitExceeded, IndexError):
        return None


def _lines(data: bytes, aead: AESGCM) -> list[bytes]:
    lines: list[bytes] = []
    view = memoryview(data)
    while len(view) >= 4:
        length = int.from_bytes(view[:4], "big")
        if length > min(MAX_LINE, len(view) - 4):
            break
        try:
            lines.append(aead.decrypt(len(lines).to_bytes(12, "big"), view[4 : 4 + length], None))
        except InvalidTag:
            break
        view = view[4 + length :]
    return lines


def _cipher(secret: Secret, salt: bytes) -> AESGCM:
    return AESGCM(derive.expand(derive.extract(salt, secret.reveal()), _LABEL))
