"""A bare directory that stock gocryptfs wrote, without a manifest (spec-gocryptfs §9).

It is read as strictly as stock reads it and a little more: names must be spelt in the one right
way, and a long name must be the one that its hash says. What stock does not protect is not
protected here either, and ``UNPROTECTED`` says so.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path

from cai.errors import (
    CaiError,
    FormatError,
    InputError,
    InputMissing,
    LimitExceeded,
    StorageError,
    Tampered,
    from_os_error,
)
from cai.model.files import LocalHandles
from cai.model.gocryptfs.below import above, open_below
from cai.model.gocryptfs.blocks import BlockCipher
from cai.model.gocryptfs.config import Config
from cai.model.gocryptfs.keys import CipherKeys
from cai.model.gocryptfs.layout import (
    CONF_FILE,
    DIRIV_FILE,
    DIRIV_SIZE,
    LONG_NAME,
    LONG_PREFIX,
    LONG_SUFFIX,
    MAX_CONF_FILE,
    MAX_LONG_NAME_FILE,
    REVERSE_CONF_FILE,
    plain_size,
)
from cai.model.gocryptfs.names import ZERO_IV, NameCipher, long_name
from cai.model.gocryptfs.reader import BlockReader
from cai.model.layout import MAX_ENTRIES
from cai.model.paths import link_faults, name_bytes, path_fault
from cai.model.tree import Entry, EntryType
from cai.secret import Secret

UNPROTECTED = (
    "a gocryptfs directory without a manifest: zeroed blocks, files cut at a block, swapped, "
    "missing, additional or older files and changed modes pass unnoticed, and no root names it"
)

_DIRECTORY = os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY
_FILE = os.O_RDONLY | os.O_NONBLOCK


class CipherFiles(LocalHandles):
    """The stored files of a bare cipher directory, held open; paths begin at its root.

    Args:
        directory: the cipher directory.

    Raises:
        InputMissing, InputError, StorageError: it is not there, or cannot be opened.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            self.root = os.open(directory, _DIRECTORY)
        except OSError as error:
            raise from_os_error(error, f"open {directory}") from error

    def open(self, stored: str) -> int:
        """Open a stored file; ``Tampered`` when it is missing or is no regular file."""
        try:
            handle = open_below(self.root, stored, _FILE)
        except OSError as error:
            raise Tampered(f"{stored} is missing or not a regular file", path=stored) from error
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise Tampered(f"{stored} is not a regular file", path=stored)
        return handle

    def read(self, stored: str, *, limit: int) -> bytes:
        """A small stored file whole; ``LimitExceeded`` when it is longer."""
        handle = self.open(stored)
        try:
            with os.fdopen(handle, "rb") as file:
                data = file.read(limit + 1)
        except OSError as error:
            raise from_os_error(error, f"read {stored}") from error
        if len(data) > limit:
            raise LimitExceeded(f"{stored}: more than {limit} bytes")
        return data

    def listing(self) -> set[str]:
        """Names in the root of the cipher directory."""
        return set(os.listdir(self.root))  # noqa: PTH208 - a descriptor

    def close(self) -> None:
        """Close the directory."""
        handle, self.root = self.root, -1
        if handle >= 0:
            os.close(handle)


class StockModel:
    """A ``ModelTree`` over a bare cipher directory; made by ``open_stock``.

    Attributes:
        entries: every path but the root, parents before children; without digests.
        outside: symbolic links that lead out of the tree, and how; stock shows them too.
        foreign: stored paths that gocryptfs did not make, or not here; they are left out.
        files: the stored files.
        root: empty, as are the other names that only a manifest gives.
    """

    by_processes = True
    root = ""
    content_root = ""
    model_id = ""
    revision = 0
    allow: tuple[str, ...] = ()
    unprotected = UNPROTECTED

    def __init__(
        self, files: CipherFiles, config: Config, keys: CipherKeys, *, holes: bool
    ) -> None:
        self.files = files
        self._config, self._holes = config, holes
        self._names = NameCipher(keys, config.long_name_max)
        self._cipher = BlockCipher(keys)
        self._stored: dict[str, str] = {}
        self.foreign: list[str] = []
        found = self._scan()
        self.entries: Mapping[str, Entry] = {
            entry.path: entry for entry in sorted(found, key=lambda e: name_bytes(e.path))
        }
        links = {e.path: e.target for e in found if e.type is EntryType.SYMLINK}
        self.outside = dict(link_faults(links, any_bytes=True))

    def open(self, path: str) -> BlockReader:
        """Open a file of the tree.

        Raises:
            InputMissing: no such file.
            InputError: the path is not a file.
            Tampered: its stored file is missing, or its header is not one.
            StorageError: it cannot be read.
        """
        entry = self.entries.get(path)
        if entry is None:
            raise InputMissing(f"no file {path!r} in the model")
        if entry.type is not EntryType.FILE:
            raise InputError(f"{path!r} is not a file")
        return BlockReader(
            self.files, self._stored[path], self._cipher, path=path, size=entry.size,
            holes=self._holes,
        )

    def close(self) -> None:
        """Close the directory; readers that are open stay usable."""
        self.files.close()

    def __enter__(self) -> StockModel:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _scan(self) -> list[Entry]:
        found: list[Entry] = []
        waiting = [("", "")]
        while waiting:
            path, folder = waiting.pop()
            for entry in self._list(path, folder):
                found.append(entry)
                if entry.type is EntryType.DIRECTORY:
                    waiting.append((entry.path, self._stored[entry.path]))
            if len(found) > MAX_ENTRIES:
                raise LimitExceeded(f"more than {MAX_ENTRIES} files and folders")
        return found

    def _list(self, path: str, folder: str) -> list[Entry]:
        """The entries of one directory."""
        try:
            with above(self.files.root, f"{folder}/." if folder else ".") as (handle, _):
                iv = self._iv(folder)
                return [
                    entry
                    for name in sorted(os.listdir(handle))  # noqa: PTH208 - a descriptor
                    if not self._is_own(folder, name)
                    and (entry := self._entry(path, folder, name, iv, handle)) is not None
                ]
        except OSError as error:
            raise from_os_error(error, f"list {folder or self.files.directory}") from error

    def _is_own(self, folder: str, name: str) -> bool:
        """Whether it is a file of gocryptfs itself."""
        if not folder and name == CONF_FILE:
            return True
        if self._config.plaintext_names:
            return False
        if name == DIRIV_FILE:
            return self._config.directory_ivs
        return name.startswith(LONG_PREFIX) and name.endswith(LONG_SUFFIX)

    def _iv(self, folder: str) -> bytes:
        if not self._config.directory_ivs:
            return ZERO_IV
        stored = f"{folder}/{DIRIV_FILE}" if folder else DIRIV_FILE
        iv = self.files.read(stored, limit=DIRIV_SIZE)
        if len(iv) != DIRIV_SIZE or not any(iv):
            raise Tampered(f"{stored} is not an IV of 16 bytes", path=stored)
        return iv

    def _entry(
        self, above_path: str, folder: str, name: str, iv: bytes, handle: int
    ) -> Entry | None:
        stored = f"{folder}/{name}" if folder else name
        try:
            plain = self._plain_name(stored, name, iv)
        except CaiError:
            self.foreign.append(stored)
            return None
        path = f"{above_path}/{plain}" if above_path else plain
        found = os.lstat(name, dir_fd=handle)
        if path_fault(path, any_bytes=True) or path in self._stored:
            self.foreign.append(stored)
            return None
        self._stored[path] = stored
        mode = stat.S_IMODE(found.st_mode) & 0o777
        if stat.S_ISDIR(found.st_mode):
            return Entry(path, EntryType.DIRECTORY, 0, mode)
        if stat.S_ISREG(found.st_mode):
            return Entry(path, EntryType.FILE, plain_size(found.st_size), mode)
        if stat.S_ISLNK(found.st_mode):
            target = self._target(stored, os.readlink(name, dir_fd=handle))
            if not target or "\x00" in target:
                raise Tampered(f"{stored} was altered: it is a link to nothing", path=stored)
            return Entry(path, EntryType.SYMLINK, len(name_bytes(target)), 0o777, target)
        raise InputError(
            f"{stored} is a device, socket or pipe", hint="a model holds files, folders and links"
        )

    def _plain_name(self, stored: str, name: str, iv: bytes) -> str:
        if self._config.plaintext_names:
            return name
        long = LONG_NAME.fullmatch(name) is not None
        text = name
        if long:
            text = self.files.read(
                stored + LONG_SUFFIX, limit=MAX_LONG_NAME_FILE
            ).decode("ascii", "replace")
            if not text.isascii() or long_name(text) != name:
                raise FormatError(f"{stored}{LONG_SUFFIX} is not the name that its hash says")
        return self._names.decrypt(text, iv, long=long).decode("utf-8", "surrogateescape")

    def _target(self, stored: str, text: str) -> str:
        if self._config.plaintext_names:
            return text
        try:
            return self._names.decrypt_target(text).decode("utf-8", "surrogateescape")
        except (Tampered, FormatError) as error:
            raise Tampered(f"{stored} was altered: {error.message}", path=stored) from None


def open_stock(directory: Path, password: Secret, *, holes: bool = True) -> StockModel:
    """Open a bare cipher directory with its password.

    Args:
        directory: the cipher directory.
        password: its password.
        holes: blocks of zeros stand for zeros, as stock takes them; else they are refused.

    Raises:
        InputMissing, InputError: there is none, or one made in a way that is not read.
        WrongKey: the password is another one, or the configuration was altered.
        FormatError, LimitExceeded: the configuration, a name or a link breaks the format.
        Tampered: a directory IV or a link is not what was written.
        StorageError: the file system refused.
    """
    return _opened(directory, lambda config: CipherKeys.of(config.unlock(password)), holes=holes)


def open_stock_with_master_key(
    directory: Path, master_key: Secret, *, holes: bool = True
) -> StockModel:
    """Open a bare cipher directory with its master key; the configuration says the rest.

    Raises:
        CaiError: as ``open_stock``, but a wrong key shows only as names that do not decrypt.
    """
    return _opened(directory, lambda _: CipherKeys.of(master_key.reveal()), holes=holes)


def read_config(directory: Path) -> Config:
    """The configuration of a bare cipher directory; nothing in it is authenticated.

    Raises:
        CaiError: as ``open_stock``.
    """
    files = CipherFiles(directory)
    try:
        return _config(files)
    finally:
        files.close()


def is_cipher_directory(directory: Path) -> bool:
    """Whether this is a bare cipher directory; ``False`` also for what cannot be looked at."""
    return (directory / CONF_FILE).is_file()


def refuse_reverse(names: set[str]) -> None:
    """Refuse a plain directory that is shown encrypted.

    Raises:
        InputError: it is one.
    """
    if REVERSE_CONF_FILE in names:
        raise InputError(
            f"it holds {REVERSE_CONF_FILE}: the plain side of 'gocryptfs -reverse'",
            hint="its files are plain; seal them with 'cai encrypt'",
        )


def _config(files: CipherFiles) -> Config:
    names = files.listing()
    refuse_reverse(names)
    if CONF_FILE not in names:
        raise InputError(f"{files.directory} is not a gocryptfs directory: it has no {CONF_FILE}")
    return Config.parse(files.read(CONF_FILE, limit=MAX_CONF_FILE))


def _opened(
    directory: Path, keys_of: Callable[[Config], CipherKeys], *, holes: bool
) -> StockModel:
    files = CipherFiles(directory)
    try:
        config = _config(files)
        return StockModel(files, config, keys_of(config), holes=holes)
    except OSError as error:
        files.close()
        raise StorageError(f"read {directory}: {error.strerror}") from error
    except BaseException:
        files.close()
        raise
