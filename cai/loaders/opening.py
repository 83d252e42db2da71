"""Opens a sealed model wherever it lies: a directory, or a store by its URI."""

from __future__ import annotations

import os
import re
from pathlib import Path

from cai.errors import UsageError
from cai.model import SealedModel, open_model, read_key_file
from cai.secret import Secret

Key = Secret | bytes | str | os.PathLike[str]
"""The key itself, 32 bytes, or the path of a key file."""

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*):", re.ASCII)


def open_tree(
    uri: str | os.PathLike[str], key: Key, *, expect_root: str | None = None, min_revision: int = 0
) -> SealedModel:
    """Open a sealed model.

    Args:
        uri: a directory, ``file:PATH``, or the URI of a store, which is then read on demand.
        key: the key, or the path of its file.
        expect_root: the ``model_root`` to insist on, 64 hex digits.
        min_revision: the oldest revision to accept.

    Raises:
        CaiError: as ``cai.model.open_model`` and the stores raise it.
    """
    if expect_root is not None and not re.fullmatch(r"[0-9a-f]{64}", expect_root):
        raise UsageError("expect_root is not 64 lower-case hex digits", hint="see cai inspect")
    text = os.fspath(uri)
    scheme = _SCHEME.match(text)
    if scheme is None or scheme[1] == "file" or Path(text).exists():
        directory = Path(text.removeprefix("file://").removeprefix("file:"))
        return open_model(directory, _key(key), expect_root=expect_root, min_revision=min_revision)
    from cai.model.sealed import open_model_files
    from cai.store import open_ranged

    return open_model_files(
        open_ranged(text), _key(key), expect_root=expect_root, min_revision=min_revision
    )


def _key(key: Key) -> Secret:
    if isinstance(key, Secret):
        return key
    if isinstance(key, bytes):
        return Secret(key)
    return read_key_file(Path(key))
