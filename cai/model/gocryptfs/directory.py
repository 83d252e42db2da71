"""The cipher directory in the making: folders, names, links, and files by workers.

Workers read, encrypt and write; SHA-256 of the plaintext and BLAKE3 of what is stored need the
bytes in order and are taken from the workers' memory, each by a thread of its own. So a file is
read once, and what is hashed is what was encrypted.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from cai.model.gocryptfs.below import above, mode_below, open_below, write_below
from cai.model.gocryptfs.blocks import BlockCipher, encode_header, new_file_id
from cai.model.gocryptfs.carrying import OlderCipher
from cai.model.gocryptfs.config import Config
from cai.model.gocryptfs.crew import Crew, workers_for
from cai.model.gocryptfs.encrypting import SLOT, UNIT_GROUPS, SealUnit, UnitWriter
from cai.model.gocryptfs.entries import CipherTree, FileTags
from cai.model.gocryptfs.keys import CipherKeys
from cai.model.gocryptfs.layout import (
    CONF_FILE,
    DIRIV_FILE,
    DIRIV_SIZE,
    LONG_SUFFIX,
    groups_in,
    stored_size,
)
from cai.model.gocryptfs.model import StoredTree
from cai.model.gocryptfs.names import NameCipher
from cai.model.gocryptfs.origins import Begun, CipherOrigin
from cai.model.index import PieceHasher, StoredFile, listed
from cai.model.layout import DATA_DIR
from cai.model.paths import name_bytes
from cai.model.progress import ProgressBar
from cai.model.tree import Entry, EntryType
from cai.terminal import Advance

_MAX_SYNCS = 32


@dataclass(slots=True)
class _Open:
    """A file that is being sealed."""

    entry: Entry
    stored: str
    source: Begun
    file_id: bytes
    sha: Any = field(default_factory=sha256)
    pieces: PieceHasher = field(default_factory=PieceHasher)
    groups: bytearray = field(default_factory=bytearray)


class CipherDirectory:
    """Writes ``data``; collects what manifest and index say of it.

    Args:
        origin: gives the plaintext.
        target: the sealed model in the making.
        keys: of the cipher directory.
        config: its ``gocryptfs.conf``.
        older: the revision before, under the same master key, for what did not change since.

    Attributes:
        entries: by path, with digests; whole after ``write``.
        index: stored files by stored path.
        files: what pins the blocks of each file.
        carried: files that were taken from the revision before.
        carried_bytes: their stored bytes.
    """

    def __init__(
        self, origin: CipherOrigin, target: Path, keys: CipherKeys, config: Config, *,
        older: OlderCipher | None = None,
    ) -> None:
        self._origin, self._older = origin, older
        self._all = origin.scan()
        self._names, self._cipher = NameCipher(keys), BlockCipher(keys)
        self.entries: dict[str, Entry] = {}
        self.index: dict[str, StoredFile] = {}
        self.files: dict[str, FileTags] = {}
        self.carried = self.carried_bytes = 0
        known = older.ivs if older else {}
        folders = ["", *(e.path for e in self._all if e.type is EntryType.DIRECTORY)]
        self._ivs = {path: known.get(path) or os.urandom(DIRIV_SIZE) for path in folders}
        self._tree = StoredTree(self._names, self._ivs)
        self._stored: dict[str, str] = {}
        self._root = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.mkdir(DATA_DIR, 0o700, dir_fd=self._root)
            self._small(f"{DATA_DIR}/{CONF_FILE}", config.encode(), 0o400)
            self._small(f"{DATA_DIR}/{DIRIV_FILE}", self._ivs[""], 0o444)
            for entry in self._all:
                self._stored[entry.path] = self._named(entry)
                if entry.type is not EntryType.FILE:
                    self._place(entry)
        except BaseException:
            self.close()
            raise

    @property
    def cipher(self) -> CipherTree:
        """What the manifest says of the cipher directory."""
        return CipherTree(self._ivs, self.files)

    def write(self, progress: ProgressBar, workers: int) -> None:
        """Write every file, then the modes of the directories.

        Raises:
            CaiError, OSError: as ``seal_gocryptfs``.
        """
        files = [entry for entry in self._all if entry.type is EntryType.FILE]
        total = sum(entry.size for entry in files)
        writer = UnitWriter(self._origin, self._cipher, self._root)
        try:
            with (
                Crew(writer.work, workers=workers_for(total, workers), slot_size=SLOT) as crew,
                progress("seal", total) as advance,
            ):
                self._carry(files, advance)
                self._write([e for e in files if e.path not in self.entries], crew, advance)
        finally:
            writer.close()
        self.entries = {e.path: self.entries.get(e.path, e) for e in self._all}
        with above(self._root, f"{DATA_DIR}/{CONF_FILE}") as (data, _):
            os.chmod(data, 0o755)  # noqa: PTH101, S103 - a descriptor, ciphertext
        for entry in reversed(self._all):
            if entry.type is EntryType.DIRECTORY:
                # Readable by its owner at least, so that it can be checked and published.
                mode_below(self._root, self._stored[entry.path], entry.mode | 0o500)

    def close(self) -> None:
        """Close what is open in this process."""
        root, self._root = self._root, -1
        if root >= 0:
            os.close(root)

    def _write(self, files: list[Entry], crew: Crew[SealUnit], advance: Advance) -> None:
        opened: dict[int, _Open] = {}
        syncs: deque[Future[None]] = deque()
        with ThreadPoolExecutor(4, thread_name_prefix="cai-sync") as syncing, ThreadPoolExecutor(
            1, thread_name_prefix="cai-hash"
        ) as hashing:
            try:
                for unit, slot, digests in crew.run(self._units(files, opened)):
                    self._hash(opened[unit.file], unit, slot, digests, hashing)
                    advance(unit.length)
                    if unit.last:
                        self._finish(opened.pop(unit.file))
                        syncs.append(syncing.submit(self._sync, unit.stored))
                    while len(syncs) > _MAX_SYNCS:
                        syncs.popleft().result()
                for sync in syncs:
                    sync.result()
            finally:
                for file in opened.values():
                    file.source.close()

    def _carry(self, files: list[Entry], advance: Advance) -> None:
        """Take over what the revision before has, several files side by side."""
        older = self._older
        if older is None:
            return
        alike = [entry for entry in files if older.may_have(entry)]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:

            def take(entry: Entry) -> None:
                found = older.take(
                    entry, self._plain_digest(entry), self._root, self._stored[entry.path]
                )
                if found is not None:
                    sha, self.files[entry.path], listed_as = found
                    self.index[self._stored[entry.path]] = listed_as
                    self.entries[entry.path] = replace(entry, sha256=sha)
                    advance(entry.size)

            for _ in pool.map(take, alike):
                pass
        self.carried = len(self.entries)
        self.carried_bytes = sum(self.index[self._stored[path]].size for path in self.entries)

    def _plain_digest(self, entry: Entry) -> str:
        """SHA-256 of a file of the origin, which must not change meanwhile."""
        begun = self._origin.begin(entry)
        try:
            file = self._origin.open(entry.path, begun.token)
            try:
                digest, room = sha256(), memoryview(bytearray(min(1 << 20, entry.size)))
                for offset in range(0, entry.size, len(room)):
                    part = room[: entry.size - offset]
                    file.readinto(offset, part)
                    digest.update(part)
            finally:
                file.close()
            begun.finish(digest.hexdigest())
        finally:
            begun.close()
        return digest.hexdigest()

    def _place(self, entry: Entry) -> None:
        """Make a directory, or a symbolic link."""
        stored = self._stored[entry.path]
        with above(self._root, stored) as (folder, name):
            if entry.type is EntryType.DIRECTORY:
                os.mkdir(name, 0o700, dir_fd=folder)
            else:
                text = self._names.encrypt_target(name_bytes(entry.target))
                os.symlink(text, name, dir_fd=folder)
                self.index[stored] = StoredFile(0, (), text)
        if entry.type is EntryType.DIRECTORY:
            self._small(f"{stored}/{DIRIV_FILE}", self._ivs[entry.path], 0o444)

    def _named(self, entry: Entry) -> str:
        """The stored path; a long name gets its ``.name`` file."""
        stored = self._tree.path(entry.path)
        name = self._tree.name(entry.path)
        if name.long:
            self._small(stored + LONG_SUFFIX, name.long.encode("ascii"), 0o444)
        return stored

    def _small(self, stored: str, data: bytes, mode: int) -> None:
        write_below(self._root, stored, data, mode)
        self._sync(stored)
        self.index[stored] = listed(data)

    def _units(self, files: list[Entry], opened: dict[int, _Open]) -> Iterator[SealUnit]:
        """Every unit of every file; begins each file and makes its stored one when it begins."""
        for number, entry in enumerate(files):
            stored = self._stored[entry.path]
            begun = self._origin.begin(entry)
            opened[number] = _Open(entry, stored, begun, new_file_id() if entry.size else b"")
            handle = open_below(self._root, stored, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            try:
                os.ftruncate(handle, stored_size(entry.size))
            finally:
                os.close(handle)
            if not entry.size:
                self._finish(opened.pop(number))
            for group in range(0, groups_in(entry.size), UNIT_GROUPS):
                yield SealUnit(
                    number, entry.path, stored, begun.token, opened[number].file_id, entry.size,
                    group,
                )

    def _hash(
        self, file: _Open, unit: SealUnit, slot: memoryview, digests: bytes,
        hashing: ThreadPoolExecutor,
    ) -> None:
        if unit.group == 0:
            file.pieces.update(encode_header(unit.file_id))
        stored = hashing.submit(file.pieces.update, unit.blocks(slot))
        file.sha.update(unit.plain(slot))
        file.groups += digests
        stored.result()

    def _finish(self, file: _Open) -> None:
        digest = file.sha.hexdigest()
        try:
            file.source.finish(digest)
        finally:
            file.source.close()
        path = file.entry.path
        mode_below(self._root, file.stored, file.entry.mode | 0o400)
        self.entries[path] = replace(file.entry, sha256=digest)
        self.files[path] = FileTags(file.file_id, bytes(file.groups))
        digests = file.pieces.finish()
        self.index[file.stored] = StoredFile(
            stored_size(file.entry.size), tuple(digests[number] for number in sorted(digests))
        )

    def _sync(self, stored: str) -> None:
        handle = open_below(self._root, stored, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
