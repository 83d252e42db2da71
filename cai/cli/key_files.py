"""Files with keys: never written over, never where they would be published, safe before use.

A new key is on the disk as ``KEY.partial`` before anything is sealed under it, so that a run that
was killed can be gone on with, and gets its name before the model appears.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from cai.errors import CaiError, StorageError, UsageError

if TYPE_CHECKING:
    from cai.secret import Secret

_CUT_OFF = re.compile(rb"[0-9a-f]{0,64}")


def staged_path(key_out: Path) -> Path:
    """Where a new key is before it gets its name."""
    return key_out.with_name(f"{key_out.name}.partial")


def read_staged(key_out: Path) -> Secret | None:
    """The key that an interrupted run made; one that was cut off while it was written is removed.

    Nothing can be sealed under a key that was not whole on the disk.
    """
    staged = staged_path(key_out)
    if not os.path.lexists(staged):
        return None
    key = key_in(staged)
    if key is None:
        if not staged.is_file() or not _CUT_OFF.fullmatch(staged.read_bytes()[:70]):
            refuse_existing(staged)
        staged.unlink()
    return key


def drop_staged(key_out: Path | None) -> None:
    """Remove the second name of a key that a run left which was killed at its very end."""
    if key_out is None or not os.path.lexists(staged_path(key_out)):
        return
    key = key_in(staged_path(key_out))
    if key is not None and key_in(key_out) == key:
        staged_path(key_out).unlink()


def name_staged(staged: Path, path: Path, key: Secret) -> None:
    """Give a staged key its name, in one step where the file system can; never over a file."""
    from cai.model import write_key_file

    try:
        os.link(staged, path, follow_symlinks=False)
    except OSError:
        write_key_file(path, key)


def key_in(path: Path) -> Secret | None:
    """The key of a file, if it holds one."""
    from cai.model import read_key_file

    try:
        return read_key_file(path)
    except CaiError:
        return None


def refuse_public_place(path: Path, source: Path, target: Path) -> None:
    """Refuse to put a secret into what is sealed or published.

    Raises:
        UsageError: it would be there.
    """
    place = path.parent.resolve() / path.name
    for directory in (source.resolve(), target.parent.resolve() / target.name):
        if place == directory or directory in place.parents:
            raise UsageError(
                f"{path} is inside {directory}, which is sealed or published",
                hint="choose a place outside of it",
            )


def refuse_existing(path: Path) -> None:
    """Refuse to write over anything.

    Raises:
        StorageError: something is there.
    """
    if path.is_symlink() or os.path.lexists(path):
        raise StorageError(
            f"{path} exists already", hint="choose another name; keys are never overwritten"
        )


def remove_empty(path: Path) -> None:
    """What a run left that was killed between making a file and writing it."""
    if path.is_file() and not path.is_symlink() and not path.stat().st_size:
        path.unlink()


def sync_folder(directory: Path) -> None:
    """Make a new name durable, where the file system can."""
    from cai.model.stage import sync_directory

    with suppress(OSError):
        sync_directory(directory)
