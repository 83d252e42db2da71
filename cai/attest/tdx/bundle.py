"""Bundles: collateral files in one uncompressed tar archive, for machines without a network.

A bundle comes from outside like everything else: only plain files with plain names are read, never
onto a disk, each within the limits of this module.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterable

from cai.errors import FormatError, LimitExceeded

MAX_MEMBERS = 1024
"""Most files in one bundle."""

MAX_MEMBER = 1024 * 1024
"""Largest file in a bundle, bytes."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\.json")

_ERRORS = (tarfile.TarError, ValueError, OverflowError, EOFError, OSError, RecursionError)
"""Everything that reading an archive from memory was seen or is documented to raise."""


def read_bundle(data: bytes, where: str) -> list[tuple[str, bytes]]:
    """The files of a bundle, by name.

    Args:
        data: the archive.
        where: names it in errors.

    Raises:
        FormatError: not a tar archive of plain ``*.json`` files, or a name stands twice.
        LimitExceeded: too many or too large.
    """
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            while (member := archive.next()) is not None:
                if len(found) == MAX_MEMBERS:
                    raise LimitExceeded(f"{where}: more than {MAX_MEMBERS} files")
                found |= _member(archive, member, where, found)
    except _ERRORS as error:
        raise FormatError(
            f"{where}: neither a directory nor a tar archive of collateral files"
        ) from error
    return sorted((f"{where}:{name}", content) for name, content in found.items())


def _member(
    archive: tarfile.TarFile, member: tarfile.TarInfo, where: str, found: dict[str, bytes]
) -> dict[str, bytes]:
    if not member.isreg() or member.issparse() or not _NAME.fullmatch(member.name):
        raise FormatError(f"{where}: {member.name[:80]!r} is not a plain *.json file")
    if member.name in found:
        raise FormatError(f"{where}: {member.name!r} stands twice")
    if not 0 <= member.size <= MAX_MEMBER:
        raise LimitExceeded(f"{where}: {member.name!r} has {member.size} bytes")
    file = archive.extractfile(member)
    content = b"" if file is None else file.read(MAX_MEMBER + 1)
    if len(content) != member.size:
        raise FormatError(f"{where}: {member.name!r} is cut off")
    return {member.name: content}


def write_bundle(files: Iterable[tuple[str, bytes]]) -> bytes:
    """An archive of these files: the same bytes for the same files, whoever makes it.

    Raises:
        FormatError: a name that ``read_bundle`` would refuse.
    """
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in sorted(files):
            if not _NAME.fullmatch(name):
                raise FormatError(f"{name[:80]!r} cannot be the name of a file in a bundle")
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o644
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()
