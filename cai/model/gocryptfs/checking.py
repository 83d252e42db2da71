"""Checking a whole model of method gocryptfs, and a bare cipher directory (spec-gocryptfs §7, §9).

With the manifest, nothing can differ from what was sealed: every stored byte is compared. Without
it, every block is authenticated, and what stock cannot notice is not noticed.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from typing import Any

from cai.errors import FormatError, Tampered
from cai.model.content import content_root
from cai.model.files import SealedFiles, StoredFiles
from cai.model.gocryptfs.crew import Crew, workers_for
from cai.model.gocryptfs.layout import (
    CONF_FILE,
    DIRIV_FILE,
    DIRIV_SIZE,
    LONG_SUFFIX,
    MAX_CONF_FILE,
    MAX_LONG_NAME_FILE,
    stored_size,
)
from cai.model.gocryptfs.model import ROOT_FILES, CipherModel
from cai.model.gocryptfs.reading import SLOT, Unit, UnitReader, run_units
from cai.model.gocryptfs.stock import StockModel
from cai.model.index import PieceHasher, StoredFile
from cai.model.layout import (
    DATA_DIR,
    HEADER_FILE,
    INDEX_FILE,
    MANIFEST_FILE,
    SIGNATURE_FILE,
)
from cai.model.paths import name_bytes
from cai.model.progress import ProgressBar
from cai.model.tree import Entry, EntryType
from cai.terminal import Advance


class CipherCheck:
    """Checks the cipher directory of an opened model against manifest and index.

    Args:
        model: the opened model.
        index: its index, the one that ``cai.json`` names.
    """

    def __init__(self, model: CipherModel, index: dict[str, StoredFile]) -> None:
        self._model, self._index = model, index
        self._stored = {
            e.path: model.stored.path(e.path) for e in model.entries.values()
        }
        """Stored path by path."""

    def check_names(self) -> None:
        """Index and directories list exactly what the manifest says (C2, C3).

        Raises:
            Tampered: naming the file that is missing, additional or of another length.
        """
        model = self._model
        expected = {*ROOT_FILES, MANIFEST_FILE}
        for entry in model.entries.values():
            expected.update(model.stored.expected(entry))
        files = {path for path in expected if not path.endswith("/")}
        manifest = self._index.get(MANIFEST_FILE)
        if manifest is None or manifest.size != model.header.manifest.stored:
            raise _altered(INDEX_FILE, f"its line of {MANIFEST_FILE} is wrong")
        if set(self._index) != files:
            raise _altered(INDEX_FILE, "it does not list the files of the manifest")
        for entry in model.entries.values():
            listed = self._index.get(self._stored[entry.path], StoredFile(0, ()))
            size = stored_size(entry.size) if entry.type is EntryType.FILE else 0
            link = entry.type is EntryType.SYMLINK
            if listed.size != size or bool(listed.link) != link:
                raise _altered(INDEX_FILE, f"its line of {self._stored[entry.path]} is wrong")
        found = model.files.listing() - {SIGNATURE_FILE}
        wanted = expected | {HEADER_FILE, INDEX_FILE}
        for path in sorted(wanted - found):
            raise Tampered(f"{path} is missing", path=path)
        for path in sorted(found - wanted):
            raise Tampered(
                f"{path!r} does not belong to the sealed model", path=path,
                hint="remove it, or fetch the sealed model again",
            )

    def check_small(self) -> None:
        """Configuration, IVs, long names and links are the sealed ones.

        Raises:
            Tampered: naming the file that is not.
        """
        model, files = self._model, self._model.files
        self._compare(f"{DATA_DIR}/{CONF_FILE}", _read(files, f"{DATA_DIR}/{CONF_FILE}"))
        self._check_iv("", DATA_DIR)
        for entry in model.entries.values():
            stored = self._stored[entry.path]
            name = model.stored.name(entry.path)
            if name.long:
                text = _read(files, stored + LONG_SUFFIX)
                if text != name.long.encode("ascii"):
                    raise _altered(stored + LONG_SUFFIX, "it is not the name that was sealed")
                self._compare(stored + LONG_SUFFIX, text)
            if entry.type is EntryType.DIRECTORY:
                self._check_iv(entry.path, stored)
            elif entry.type is EntryType.SYMLINK:
                self._check_link(entry, stored)

    def check_files(self, crew: Crew[Unit], advance: Advance) -> None:
        """Every block verifies, and both digests are right (C4, C5).

        Raises:
            Tampered, StorageError: naming the file that is not what was sealed.
        """
        files = [e for e in self._model.entries.values() if e.type is EntryType.FILE]
        entries = {entry.path: entry for entry in files}
        digest, pieces = sha256(), PieceHasher()
        with ThreadPoolExecutor(1, thread_name_prefix="cai-hash") as beside:
            for unit, plain, stored in run_units(crew, files):
                if unit.group == 0 and unit.size:
                    pieces.update(_header(self._model, unit.path))
                hashing = beside.submit(pieces.update, stored)
                digest.update(plain)
                hashing.result()
                advance(len(plain))
                if not unit.last:
                    continue
                path = self._stored[unit.path]
                if digest.hexdigest() != entries[unit.path].sha256:
                    raise _altered(path, f"the SHA-256 of {unit.path!r} is not its content's")
                self._compare_pieces(path, pieces)
                digest, pieces = sha256(), PieceHasher()

    def _check_iv(self, path: str, stored: str) -> None:
        iv = _read(self._model.files, f"{stored}/{DIRIV_FILE}")
        if iv != self._model.tree.ivs[path]:
            raise _altered(f"{stored}/{DIRIV_FILE}", "it is not the IV that was sealed")
        self._compare(f"{stored}/{DIRIV_FILE}", iv)

    def _check_link(self, entry: Entry, stored: str) -> None:
        files = self._model.files
        text = files.readlink(stored) if isinstance(files, StoredFiles) else ""
        try:
            target = self._model.names.decrypt_target(text)
        except (Tampered, FormatError) as error:
            raise _altered(stored, error.message) from None
        if target != name_bytes(entry.target):
            raise _altered(stored, f"it is not the target of {entry.path!r} that was sealed")
        if text != self._index[stored].link:
            raise _altered(INDEX_FILE, f"its text of {stored} is not that of the link")

    def _compare(self, stored: str, data: bytes) -> None:
        pieces = PieceHasher()
        pieces.update(data)
        if self._index[stored].size != len(data):
            raise _altered(stored, "its length is not that of the index")
        self._compare_pieces(stored, pieces)

    def _compare_pieces(self, stored: str, pieces: PieceHasher) -> None:
        found = pieces.finish()
        for number, piece in enumerate(self._index[stored].pieces):
            if found.get(number) != piece:
                raise _altered(
                    stored, f"its BLAKE3, piece {number}, is not that of {INDEX_FILE}"
                )


def check_cipher(
    model: CipherModel, index: dict[str, StoredFile], *, workers: int, progress: ProgressBar
) -> None:
    """Check everything of an opened model but header, manifest and the index itself.

    Raises:
        Tampered, StorageError: naming the stored file that is not what was sealed.
    """
    check = CipherCheck(model, index)
    check.check_names()
    check.check_small()
    total = sum(e.size for e in model.entries.values() if e.type is EntryType.FILE)
    reader = UnitReader(model)
    try:
        with (
            Crew(reader.work, workers=workers_for(total, workers), slot_size=SLOT) as crew,
            progress("check", total) as advance,
        ):
            check.check_files(crew, advance)
    finally:
        reader.close()


def check_stock(model: StockModel, *, workers: int = 0, progress: ProgressBar) -> dict[str, Any]:
    """Authenticate every block of a bare cipher directory, as far as stock can.

    Returns:
        ``content_root`` (of what is there now), ``files``, ``plaintext_bytes``.

    Raises:
        Tampered: naming the stored file that does not verify, or does not belong there.
    """
    for stored in model.foreign:
        raise Tampered(f"{stored!r} is not a file of gocryptfs in this place", path=stored)
    files = [e for e in model.entries.values() if e.type is EntryType.FILE]
    total = sum(entry.size for entry in files)
    reader = UnitReader(model)
    digests: dict[str, str] = {}
    try:
        with (
            Crew(reader.work, workers=workers_for(total, workers), slot_size=SLOT) as crew,
            progress("check", total) as advance,
        ):
            digest = sha256()
            for unit, plain, _stored in run_units(crew, files):
                digest.update(plain)
                advance(len(plain))
                if unit.last:
                    digests[unit.path] = digest.hexdigest()
                    digest = sha256()
    finally:
        reader.close()
    hashed: Iterable[Entry] = (
        replace(entry, sha256=digests.get(entry.path, "")) for entry in model.entries.values()
    )
    return {
        "content_root": content_root(hashed), "files": len(files), "plaintext_bytes": total,
    }


def _header(model: CipherModel, path: str) -> bytes:
    reader = model.open(path)
    try:
        return reader.header()
    finally:
        reader.close()


def _read(files: SealedFiles, stored: str) -> bytes:
    limit = MAX_CONF_FILE if stored.endswith(CONF_FILE) else max(DIRIV_SIZE, MAX_LONG_NAME_FILE)
    return files.read(stored, limit=limit)


def _altered(stored: str, reason: str) -> Tampered:
    return Tampered(
        f"{stored} was altered: {reason}", path=stored,
        hint="fetch the sealed model again, or restore it from a copy",
    )
