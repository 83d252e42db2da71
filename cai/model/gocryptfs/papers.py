"""Manifest, index, header and signature beside a cipher directory (spec-gocryptfs §5, §6)."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from cai import __version__
from cai.model.content import content_root
from cai.model.gocryptfs.directory import CipherDirectory
from cai.model.gocryptfs.keys import CipherKeys
from cai.model.header import DekKeys, Header, wrap_dek
from cai.model.index import StoredFile, encode_index, index_digest
from cai.model.lanes import Lanes
from cai.model.layout import (
    DEFAULT_CHUNK,
    GOCRYPTFS,
    HEADER_FILE,
    INDEX_FILE,
    KEY_SIZE,
    MANIFEST_FILE,
    SIGNATURE_FILE,
)
from cai.model.manifest import Manifest, model_root, pad
from cai.model.object import SALT_SIZE, Shape
from cai.model.options import SealOptions, SealReport
from cai.model.stage import write_file
from cai.model.tree import EntryType
from cai.model.writer import write_object


class Papers:
    """Manifest, index, header and signature beside the cipher directory."""

    def __init__(
        self, target: Path, tree: CipherDirectory, keys: CipherKeys, options: SealOptions,
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
        return self._report(manifest, root, index, stored)

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

    def _report(self, manifest: Manifest, root: str, index: bytes, stored: int) -> SealReport:
        kinds = [entry.type for entry in manifest.entries.values()]
        files = [e for e in manifest.entries.values() if e.type is EntryType.FILE]
        return SealReport(
            model_id=manifest.model_id, revision=manifest.revision, root=root,
            content_root=manifest.content_root, index_sha256=index_digest(index),
            allow=manifest.allow, files=len(files), directories=kinds.count(EntryType.DIRECTORY),
            symlinks=kinds.count(EntryType.SYMLINK), objects=len(files),
            plaintext_bytes=sum(entry.size for entry in files), stored_bytes=stored,
            carried=self._tree.carried, written_bytes=stored - self._tree.carried_bytes,
        )
