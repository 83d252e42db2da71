"""Rotation: another key-encryption key for a sealed model, without touching weights (spec §2).

Only ``cai.json`` changes, in one step: at every moment the model opens under the old key or under
the new one. The new key must be safe before that step; the caller sees to it in ``before_commit``.
"""

from __future__ import annotations

import fcntl
import hmac
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cai.errors import CaiError, FormatError, StorageError, UsageError
from cai.model.header import Header, kek_commitment, unlock, wrap_dek
from cai.model.layout import GOCRYPTFS, HEADER_FILE, KEY_SIZE
from cai.model.sealed import SealedModel, open_model, read_header
from cai.model.stage import (
    leftovers,
    locked_directory,
    output_error,
    remove_tree,
    sync_directory,
    write_file,
)
from cai.secret import Secret


@dataclass(frozen=True, slots=True)
class RotateReport:
    """A model under its new key; nothing in it is secret.

    Attributes:
        model_id: of the model line, hex.
        revision: from 1; a rotation does not change it.
        root: ``model_root``, hex; a rotation does not change it.
        content_root: hex.
        index_sha256: hex.
        allow: flags of the manifest.
        kek_commitment: which key opens it now, hex.
        already: it was under the new key before this run.
    """

    model_id: str
    revision: int
    root: str
    content_root: str
    index_sha256: str
    allow: tuple[str, ...]
    kek_commitment: str
    already: bool = False

    def to_json(self) -> dict[str, object]:
        """The report as ``--json`` prints it."""
        return asdict(self) | {"allow": list(self.allow)}


def rotate(
    directory: Path, kek: Secret, new_kek: Secret, *,
    before_commit: Callable[[RotateReport], None] | None = None,
) -> RotateReport:
    """Wrap a model's data key under another KEK, rewriting ``cai.json`` alone.

    Whoever holds the old KEK and the old ``cai.json`` keeps what it had: ``reseal`` is for a key
    that leaked. A run that was killed after the step is finished by the next one.

    Args:
        directory: the sealed model.
        kek: the key that opens it now.
        new_kek: the one that shall.
        before_commit: called before the step, so that the new key is safe; what it raises leaves
            everything as it was.

    Raises:
        WrongKey: ``kek`` does not open the model.
        Tampered, FormatError: the model is not what was sealed.
        UsageError: the two keys are the same, or the method has no KEK of its own.
        StorageError, NoSpace: ``cai.json`` cannot be written, or another rotation runs.
    """
    if len(new_kek) != KEY_SIZE:
        raise FormatError(f"the new key has {len(new_kek)} bytes, expected {KEY_SIZE}")
    if kek == new_kek:
        raise UsageError("the new key is the old key")
    place = directory.resolve()
    with only_one(place):
        header = read_header(place)
        if header.method == GOCRYPTFS:
            raise UsageError(
                "a gocryptfs model is opened by its password, not by a key",
                hint="rotate its password",
            )
        clear(place)
        already = is_under(header, new_kek)
        with open_model(place, new_kek if already else kek) as model:
            told = report(model, new_kek, already=already)
        if before_commit is not None:
            before_commit(told)
        if not already:
            replace_files(place, {HEADER_FILE: _rewrapped(header, kek, new_kek).encode()})
    return told


def is_under(header: Header, kek: Secret) -> bool:
    """Whether a model's data key is wrapped under this KEK."""
    return hmac.compare_digest(kek_commitment(kek, header.model_id), header.dek.kek_commitment)


def opens(directory: Path, kek: Secret) -> bool:
    """Whether a directory holds a sealed model under this KEK; ``False`` on any doubt."""
    try:
        return is_under(read_header(directory), kek)
    except CaiError:
        return False


def _rewrapped(header: Header, kek: Secret, new_kek: Secret) -> Header:
    dek, keys = unlock(header, kek)
    wrapped = wrap_dek(
        dek, new_kek, model_id=header.model_id, revision=header.revision, nonce=os.urandom(12)
    )
    unsigned = replace(header, dek=wrapped, mac="")
    return replace(unsigned, mac=keys.mac(unsigned))


def replace_files(directory: Path, files: Mapping[str, bytes], *, mode: int = 0o644) -> None:
    """Replace stored files in their order, each in one step.

    They are written beside the model, then renamed into it: it holds nothing else at any moment.

    Raises:
        StorageError, NoSpace: one cannot be written.
    """
    try:
        path, handle = locked_directory(directory)
        try:
            for stored, data in files.items():
                new = path / Path(stored).name
                write_file(new, data)
                new.chmod(mode)
                new.replace(directory / stored)
                sync_directory((directory / stored).parent)
        finally:
            remove_tree(path)
            os.close(handle)
    except OSError as error:
        raise output_error(error, f"write {', '.join(files)}") from error


def clear(directory: Path) -> None:
    """Remove what a killed rotation left beside the model."""
    for path, handle in leftovers(directory):
        remove_tree(path)
        os.close(handle)


@contextmanager
def only_one(directory: Path) -> Iterator[None]:
    """Hold the model's directory locked against another rotation."""
    try:
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        yield  # reading it gives the better error
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageError(
                f"{directory} is being rotated by another process", hint="wait for it"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)


def report(model: SealedModel, kek: Secret, *, already: bool) -> RotateReport:
    """What is to be told of a model that is, or will be, under a KEK."""
    return RotateReport(
        model.model_id, model.revision, model.root, model.content_root,
        model.header.index_sha256, model.allow, kek_commitment(kek, model.model_id), already,
    )
