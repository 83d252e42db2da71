"""Writing a model of method gocryptfs: cipher directory, manifest, index (spec-gocryptfs §8).

Workers read, encrypt and write; SHA-256 of the plaintext and BLAKE3 of what is stored need the
bytes in order and are taken from the workers' memory, each by a thread of its own. So a file is
read once, and what is hashed is what was encrypted.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from cai import __version__
from cai.errors import CaiError, InputError, UsageError
from cai.model.content import content_root
from cai.model.gocryptfs.below import above, mode_below, open_below, write_below
from cai.model.gocryptfs.blocks import BlockCipher, encode_header, new_file_id, tag_digest
from cai.model.gocryptfs.config import PASSWORD_LOG2_N, Config, check_password
from cai.model.gocryptfs.crew import Crew, workers_for
from cai.model.gocryptfs.entries import CipherTree, FileTags
from cai.model.gocryptfs.keys import CipherKeys
from cai.model.gocryptfs.layout import (
    CONF_FILE,
    DIRIV_FILE,
    DIRIV_SIZE,
    GROUP,
    GROUP_PLAIN,
    GROUP_STORED,
    HEADER_SIZE,
    LONG_SUFFIX,
    MASTER_KEY_SIZE,
    block_offset,
    groups_in,
    stored_size,
)
from cai.model.gocryptfs.model import StoredTree
from cai.model.gocryptfs.names import NameCipher
from cai.model.header import DekKeys, Header, wrap_dek
from cai.model.index import PieceHasher, StoredFile, encode_index, index_digest
from cai.model.lanes import Lanes
from cai.model.layout import (
    DATA_DIR,
    DEFAULT_CHUNK,
    GOCRYPTFS,
    HEADER_FILE,
    INDEX_FILE,
    KEY_SIZE,
    MANIFEST_FILE,
    SIGNATURE_FILE,
)
from cai.model.manifest import Manifest, model_root, pad
from cai.model.members import valid_flags
from cai.model.object import SALT_SIZE, Shape
from cai.model.options import PICKLE_FLAG, SealOptions, SealReport
from cai.model.paths import name_bytes
from cai.model.progress import ProgressBar, silent
from cai.model.sealing import check_places, refuse_pickles
from cai.model.source import SourceFile, scan
from cai.model.stage import Stage, output_error, write_all, write_file
from cai.model.tree import Entry, EntryType
from cai.model.writer import write_object
from cai.secret import Secret
from cai.terminal import Advance

UNIT_GROUPS = 4
"""Groups in one unit of work: 4 MiB of plaintext."""

UNIT_PLAIN = UNIT_GROUPS * GROUP_PLAIN
_SLOT = UNIT_PLAIN + UNIT_GROUPS * GROUP_STORED
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_MAX_SYNCS = 32
_FLUSH_GROUPS = 64


def seal_gocryptfs(
    source: Path, out: Path, password: Secret, *, options: SealOptions | None = None,
    progress: ProgressBar = silent, before_commit: Callable[[SealReport], None] | None = None,
    sign: Callable[[str], bytes] | None = None,
    review: Callable[[Manifest], None] | None = None, log2_n: int = PASSWORD_LOG2_N,
) -> SealReport:
    """Seal the tree at ``source`` into ``out``, whose ``data`` stock gocryptfs mounts.

    Args:
        source: the plain tree.
        out: where the sealed model shall appear; missing or an empty directory.
        password: of the cipher directory.
        options: what a writer may choose; ``chunk`` and ``pad`` mean nothing here.
        progress: shows the plaintext bytes done.
        before_commit: called when everything is written and before it appears.
        sign: gives the bytes of ``manifest.sig`` for the model root.
        review: called with the manifest before it is written.
        log2_n: cost of scrypt.

    Raises:
        UsageError: ``out`` is inside ``source``, or occupied.
        InputMissing, InputError: the source is missing or cannot be sealed.
        Refused: it holds a Python pickle and ``allow`` does not hold ``pickle``.
        LimitExceeded: more than the format holds.
        StorageError, NoSpace: the file system refused.
    """
    chosen = options or SealOptions()
    check_password(password)
    if not valid_flags(list(chosen.allow)):
        raise UsageError(f"allow flags {list(chosen.allow)} are not sorted, different flags")
    check_places(source, out)
    entries = scan(source, any_bytes=True)
    if PICKLE_FLAG not in chosen.allow:
        refuse_pickles(source, entries)
    total = sum(entry.size for entry in entries if entry.type is EntryType.FILE)
    master_key = os.urandom(MASTER_KEY_SIZE)
    config = Config.create(password, master_key, log2_n=log2_n)
    keys = CipherKeys.of(master_key)
    with Stage(out) as stage:
        try:
            tree = _Tree(source, stage.path, entries, keys, config)
            try:
                with (
                    Crew(
                        tree.work, workers=workers_for(total, chosen.workers), slot_size=_SLOT
                    ) as crew,
                    progress("seal", total) as advance,
                ):
                    tree.write(crew, advance)
            finally:
                tree.close()
            report = _Papers(stage.path, tree, keys, chosen, sign, review).write()
        except OSError as error:
            raise output_error(error, f"write {out}") from error
        if before_commit is not None:
            before_commit(report)
        stage.commit()
    return report


@dataclass(frozen=True, slots=True)
class _Unit:
    """One unit of work: up to four groups of one file."""

    file: int
    path: str
    stored: str
    identity: tuple[int, int]
    file_id: bytes
    size: int
    group: int


@dataclass(slots=True)
class _Open:
    """A file that is being sealed."""

    entry: Entry
    stored: str
    source: SourceFile
    file_id: bytes
    sha: Any = field(default_factory=sha256)
    pieces: PieceHasher = field(default_factory=PieceHasher)
    groups: bytearray = field(default_factory=bytearray)


class _Tree:
    """The cipher directory in the making; collects what manifest and index say of it."""

    def __init__(
        self, source: Path, target: Path, entries: list[Entry], keys: CipherKeys, config: Config
    ) -> None:
        self._source, self._entries = source, entries
        self._blocks, self._names = BlockCipher(keys), NameCipher(keys)
        self._in = (-1, -1)
        self._out = (-1, -1)
        self._root = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.entries: dict[str, Entry] = {}
        self.index: dict[str, StoredFile] = {}
        folders = [e.path for e in entries if e.type is EntryType.DIRECTORY]
        self._ivs = {path: os.urandom(DIRIV_SIZE) for path in ["", *folders]}
        self.files: dict[str, FileTags] = {}
        self._stored = StoredTree(self._names, self._ivs)
        try:
            os.mkdir(DATA_DIR, 0o700, dir_fd=self._root)
            self._small(f"{DATA_DIR}/{CONF_FILE}", config.encode(), 0o400)
            self._small(f"{DATA_DIR}/{DIRIV_FILE}", self._ivs[""], 0o444)
            for entry in entries:
                if entry.type is not EntryType.FILE:
                    self._place(entry)
        except BaseException:
            self.close()
            raise

    @property
    def cipher(self) -> CipherTree:
        """What the manifest says of the cipher directory."""
        return CipherTree(self._ivs, self.files)

    def write(self, crew: Crew[_Unit], advance: Advance) -> None:
        """Write every file, then the modes of the directories.

        Raises:
            CaiError, OSError: as ``seal_gocryptfs``.
        """
        opened: dict[int, _Open] = {}
        syncs: deque[Future[None]] = deque()
        with ThreadPoolExecutor(4, thread_name_prefix="cai-sync") as syncing, ThreadPoolExecutor(
            1, thread_name_prefix="cai-hash"
        ) as hashing:
            try:
                for unit, slot, digests in crew.run(self._units(opened)):
                    file = opened[unit.file]
                    self._hash(file, unit, slot, digests, hashing)
                    advance(min(UNIT_PLAIN, unit.size - unit.group * GROUP_PLAIN))
                    if (unit.group + UNIT_GROUPS) * GROUP_PLAIN >= unit.size:
                        self._finish(opened.pop(unit.file))
                        syncs.append(syncing.submit(self._sync, unit.stored))
                    while len(syncs) > _MAX_SYNCS:
                        syncs.popleft().result()
                for sync in syncs:
                    sync.result()
            finally:
                for file in opened.values():
                    file.source.close()
        self.entries = {e.path: self.entries.get(e.path, e) for e in self._entries}
        with above(self._root, f"{DATA_DIR}/{CONF_FILE}") as (data, _):
            os.chmod(data, 0o755)  # noqa: PTH101, S103 - a descriptor, ciphertext
        for entry in reversed(self._entries):
            if entry.type is EntryType.DIRECTORY:
                # Readable by its owner at least, so that it can be checked and published.
                mode_below(self._root, self._stored.path(entry.path), entry.mode | 0o500)

    def work(self, unit: _Unit, slot: memoryview) -> bytes:
        """Read, encrypt and write one unit, in a worker; gives the tag digests of its groups."""
        source, target = self._descriptors(unit)
        offset = unit.group * GROUP_PLAIN
        plain = slot[: min(UNIT_PLAIN, unit.size - offset)]
        done = 0
        while done < len(plain):
            got = os.preadv(source, [plain[done:]], offset + done)
            if not got:
                raise _changed(self._source / unit.path)
            done += got
        digests = b""
        for i in range(groups_in(len(plain))):
            at = UNIT_PLAIN + i * GROUP_STORED
            stored = self._blocks.encrypt(
                unit.file_id, (unit.group + i) * GROUP,
                plain[i * GROUP_PLAIN : (i + 1) * GROUP_PLAIN], slot[at : at + GROUP_STORED],
            )
            digests += tag_digest(stored)
        stored = _stored_part(unit, slot)
        start = block_offset(unit.group * GROUP)
        if unit.group == 0:
            write_all(target, [memoryview(encode_header(unit.file_id)), stored], 0)
        else:
            write_all(target, [stored], start)
        if unit.group and unit.group % _FLUSH_GROUPS == 0:
            # Starts writing back, so that the sync at the end does not have to wait for everything.
            # Seldom, because the kernel looks at every page, and may wait for its other CPUs.
            behind = _FLUSH_GROUPS * GROUP_STORED
            os.posix_fadvise(target, start - behind, behind, os.POSIX_FADV_DONTNEED)
        return digests

    def close(self) -> None:
        """Close what is open in this process."""
        for handle in (self._root, self._in[1], self._out[1]):
            if handle >= 0:
                os.close(handle)
        self._root, self._in, self._out = -1, (-1, -1), (-1, -1)

    def _place(self, entry: Entry) -> None:
        """Make a directory, or a symbolic link."""
        stored = self._named(entry)
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
        stored = self._stored.path(entry.path)
        name = self._stored.name(entry.path)
        if name.long:
            self._small(stored + LONG_SUFFIX, name.long.encode("ascii"), 0o444)
        return stored

    def _small(self, stored: str, data: bytes, mode: int) -> None:
        write_below(self._root, stored, data, mode)
        self._sync(stored)
        self.index[stored] = _listed(data)

    def _units(self, opened: dict[int, _Open]) -> Iterator[_Unit]:
        """Every unit of every file; opens each file and makes its stored one when it begins."""
        for number, entry in enumerate(self._entries):
            if entry.type is not EntryType.FILE:
                continue
            stored = self._named(entry)
            source = SourceFile(self._source, entry)
            opened[number] = _Open(entry, stored, source, new_file_id() if entry.size else b"")
            handle = open_below(self._root, stored, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            try:
                os.ftruncate(handle, stored_size(entry.size))
            finally:
                os.close(handle)
            if not entry.size:
                self._finish(opened.pop(number))
            for group in range(0, groups_in(entry.size), UNIT_GROUPS):
                yield _Unit(
                    number, entry.path, stored, source.identity, opened[number].file_id,
                    entry.size, group,
                )

    def _descriptors(self, unit: _Unit) -> tuple[int, int]:
        """The worker's own descriptors of a file; those of the last one are kept."""
        if self._in[0] != unit.file:
            if self._in[1] >= 0:
                os.close(self._in[1])
                os.close(self._out[1])
            self._in, self._out = (-1, -1), (-1, -1)
            source = os.open(self._source / unit.path, _READ)
            found = os.fstat(source)
            if (found.st_dev, found.st_ino) != unit.identity:
                os.close(source)
                raise _changed(self._source / unit.path)
            self._in = unit.file, source
            self._out = unit.file, open_below(self._root, unit.stored, os.O_WRONLY)
        return self._in[1], self._out[1]

    def _hash(
        self, file: _Open, unit: _Unit, slot: memoryview, digests: bytes,
        hashing: ThreadPoolExecutor,
    ) -> None:
        if unit.group == 0:
            file.pieces.update(encode_header(unit.file_id))
        stored = hashing.submit(file.pieces.update, _stored_part(unit, slot))
        file.sha.update(slot[: min(UNIT_PLAIN, unit.size - unit.group * GROUP_PLAIN)])
        file.groups += digests
        stored.result()

    def _finish(self, file: _Open) -> None:
        try:
            file.source.finish()
        finally:
            file.source.close()
        path = file.entry.path
        mode_below(self._root, file.stored, file.entry.mode | 0o400)
        self.entries[path] = replace(file.entry, sha256=file.sha.hexdigest())
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


class _Papers:
    """Manifest, index, header and signature beside the cipher directory."""

    def __init__(
        self, target: Path, tree: _Tree, keys: CipherKeys, options: SealOptions,
        sign: Callable[[str], bytes] | None, review: Callable[[Manifest], None] | None,
    ) -> None:
        self._target, self._tree, self._kek = target, tree, keys.kek
        self._options, self._sign, self._review = options, sign, review

    def write(self) -> SealReport:
        """Write them.

        Raises:
            CaiError, OSError: as ``seal_gocryptfs``.
        """
        model_id = self._options.model_id or os.urandom(32).hex()
        manifest = self._manifest(model_id)
        if self._review is not None:
            self._review(manifest)
        canonical = manifest.encode()
        # A writer never makes what its own reader refuses.
        Manifest.parse(canonical)
        dek = os.urandom(KEY_SIZE)
        keys = DekKeys.of(dek, model_id)
        files = self._tree.index
        shape, digest, files[MANIFEST_FILE] = self._write_manifest(
            pad(canonical), keys.manifest_key
        )
        index = encode_index(files)
        write_file(self._target / INDEX_FILE, index)
        revision = self._options.revision
        wrapped = wrap_dek(
            dek, self._kek, model_id=model_id, revision=revision, nonce=os.urandom(12)
        )
        header = Header(
            model_id, revision, wrapped, keys.commitment, shape, digest, index_digest(index),
            len(index), method=GOCRYPTFS,
        )
        header_bytes = replace(header, mac=keys.mac(header)).encode()
        write_file(self._target / HEADER_FILE, header_bytes)
        root = model_root(canonical)
        if self._sign is not None:
            write_file(self._target / SIGNATURE_FILE, self._sign(root))
        stored = sum(file.size for file in files.values()) + len(index) + len(header_bytes)
        return _report(manifest, root, index, stored)

    def _manifest(self, model_id: str) -> Manifest:
        options = self._options
        created = (options.created or datetime.now(UTC)).astimezone(UTC)
        return Manifest(
            model_id=model_id, revision=options.revision, previous=options.previous,
            content_root=content_root(self._tree.entries.values()), name=options.name,
            created=created.strftime("%Y-%m-%dT%H:%M:%SZ"), allow=options.allow,
            licence=options.licence,
            provenance={"tool": f"cai {__version__}"} | dict(options.provenance),
            entries=self._tree.entries, storage={}, cipher=self._tree.cipher,
        )

    def _write_manifest(self, padded: bytes, key: bytes) -> tuple[Shape, str, StoredFile]:
        shape = Shape(len(padded), DEFAULT_CHUNK)
        plain = memoryview(padded)

        def read(offset: int, view: memoryview) -> None:
            view[:] = plain[offset : offset + len(view)]

        with Lanes(1) as lanes:
            digest, listed = write_object(
                self._target / MANIFEST_FILE, shape, key, os.urandom(SALT_SIZE), lanes,
                read=read, done=lambda _offset, _plain: None,
            )
        return shape, digest, listed


def _report(manifest: Manifest, root: str, index: bytes, stored: int) -> SealReport:
    kinds = [entry.type for entry in manifest.entries.values()]
    files = [e for e in manifest.entries.values() if e.type is EntryType.FILE]
    return SealReport(
        model_id=manifest.model_id, revision=manifest.revision, root=root,
        content_root=manifest.content_root, index_sha256=index_digest(index),
        allow=manifest.allow, files=len(files), directories=kinds.count(EntryType.DIRECTORY),
        symlinks=kinds.count(EntryType.SYMLINK), objects=len(files),
        plaintext_bytes=sum(entry.size for entry in files), stored_bytes=stored,
        written_bytes=stored,
    )


def _stored_part(unit: _Unit, slot: memoryview) -> memoryview:
    """The stored blocks of a unit in its slot."""
    plain = min(UNIT_PLAIN, unit.size - unit.group * GROUP_PLAIN)
    return slot[UNIT_PLAIN : UNIT_PLAIN + stored_size(plain) - HEADER_SIZE]


def _listed(data: bytes) -> StoredFile:
    pieces = PieceHasher()
    pieces.update(data)
    digests = pieces.finish()
    return StoredFile(len(data), tuple(digests[number] for number in sorted(digests)))


def _changed(path: Path) -> CaiError:
    return InputError(
        f"{path} changed while it was read", hint="stop what writes it and try again"
    )
