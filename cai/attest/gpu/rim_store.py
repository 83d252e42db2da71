"""A set of reference files to compare devices with, and the directory they are kept in.

Files are chosen by the version they claim, never by their name. ``load_rims`` is the only part that
touches a disk.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import MappingProxyType

from cai import jcs
from cai.attest.gpu.rim import Rim, RimCache, claimed_version, verify_rim
from cai.attest.gpu.xml_signature import MAX_DOCUMENT
from cai.errors import EvidenceRefused, FormatError, InputMissing, LimitExceeded, from_os_error

MAX_FILES = 4096
"""Most files in a directory of reference files."""

MAX_ANSWER = 2 * MAX_DOCUMENT
"""Largest answer of NVIDIA's service that is parsed, bytes."""

SUFFIXES = (".xml", ".swidtag", ".json")
"""Names of files that are read: plain files, or answers of NVIDIA's service."""


@dataclass(frozen=True, slots=True)
class RimStore:
    """Reference files by the version they claim.

    Attributes:
        files: version in lower case to the files that claim it.
        if_available: a version without a file is *not asked* instead of refused; then facts say
            that nothing was compared, and a policy decides.
        cache: files verified before.
    """

    files: Mapping[str, tuple[bytes, ...]]
    if_available: bool = False
    cache: RimCache = field(default_factory=RimCache)

    @classmethod
    def of(cls, documents: Iterable[bytes], *, if_available: bool = False) -> RimStore:
        """A store of these files.

        Raises:
            LimitExceeded, FormatError: one of them is no reference file at all.
        """
        found: dict[str, tuple[bytes, ...]] = {}
        for document in documents:
            version = claimed_version(document).lower()
            found[version] = (*found.get(version, ()), document)
        return cls(MappingProxyType(found), if_available)

    def verified(
        self, version: str, *, root: bytes, now: datetime
    ) -> tuple[tuple[Rim, ...], tuple[str, ...]]:
        """The files of a version that verify, and why the others do not."""
        good: list[Rim] = []
        bad: list[str] = []
        for document in self.files.get(version.lower(), ()):
            try:
                rim = verify_rim(document, root=root, now=now, cache=self.cache)
            except (FormatError, LimitExceeded, EvidenceRefused) as error:
                bad.append(error.message)
            else:
                good.append(rim)
        return tuple(good), tuple(bad)


def load_rims(path: Path, *, if_available: bool = False) -> RimStore:
    """Read a directory of reference files, or one file.

    ``*.xml`` and ``*.swidtag`` hold the files themselves, ``*.json`` the answers of
    ``https://rim.attestation.nvidia.com/v1/rim/<id>``. Nothing is verified here.

    Raises:
        InputMissing, InputError, StorageError: it cannot be read.
        LimitExceeded, FormatError: a file is no reference file.
    """
    if not path.exists():
        raise InputMissing(f"reference files: {path} does not exist")
    try:
        names = sorted(path.iterdir()) if path.is_dir() else [path]
        names = [name for name in names if name.suffix in SUFFIXES and name.is_file()]
        if len(names) > MAX_FILES:
            raise LimitExceeded(f"{path}: more than {MAX_FILES} reference files")
        documents = [_document(name) for name in names]
    except OSError as error:
        raise from_os_error(error, f"read reference files {path}") from error
    return RimStore.of(documents, if_available=if_available)


def decode_answer(data: bytes) -> bytes:
    """The reference file inside an answer of NVIDIA's service.

    Raises:
        LimitExceeded, FormatError: not such an answer.
    """
    value = jcs.parse(data, what="RIM answer", limit=MAX_ANSWER)
    text = value.get("rim") if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise FormatError("RIM answer: no member rim")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise FormatError("RIM answer: rim is not base64") from error


def _document(path: Path) -> bytes:
    with path.open("rb") as file:
        data = file.read(MAX_ANSWER + 1)
    try:
        return decode_answer(data) if path.suffix == ".json" else data
    except (FormatError, LimitExceeded) as error:
        raise type(error)(f"{path.name}: {error.message}") from error
