"""Opens a sealed model wherever it lies: a directory, or a store by its URI."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from cai.errors import UsageError
from cai.model.gocryptfs.stock import StockModel
from cai.model.header import Header
from cai.model.keys import read_key_file
from cai.model.layout import GOCRYPTFS, HEADER_FILE, MAX_HEADER_FILE
from cai.model.opening import AnyModel, open_any, read_key
from cai.model.sealed import open_model_files
from cai.secret import Secret

Key = Secret | bytes | str | os.PathLike[str]
"""The key itself (32 bytes, or the password of a gocryptfs model), or the path of its file."""

log = logging.getLogger("cai.loaders")


def in_a_store(uri: str | os.PathLike[str]) -> bool:
    """Whether a model is named by the URI of a store, and not by a directory of this machine."""
    from cai.store.uri import SCHEMES

    text = os.fspath(uri)
    if not isinstance(uri, str) or text.startswith("file:") or Path(text).exists():
        return False
    scheme, colon, rest = text.partition(":")
    return bool(colon) and (scheme.lower() in SCHEMES or rest.startswith("/"))


def open_tree(
    uri: str | os.PathLike[str], key: Key, *, expect_root: str | None = None, min_revision: int = 0
) -> AnyModel:
    """Open a sealed model of any method.

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
    if in_a_store(uri):
        return _from_store(str(uri), key, expect_root, min_revision)
    directory = Path(os.fspath(uri).removeprefix("file://").removeprefix("file:"))
    secret = _given(key) or read_key(directory, Path(_path(key)))
    model = open_any(directory, secret, expect_root=expect_root, min_revision=min_revision)
    if isinstance(model, StockModel):
        log.warning("%s is %s", directory, model.unprotected)
    return model


def _from_store(uri: str, key: Key, expect_root: str | None, min_revision: int) -> AnyModel:
    from cai.store import open_ranged

    files = open_ranged(uri)
    try:
        secret = _given(key)
        if secret is None:
            method = Header.parse(files.read(HEADER_FILE, limit=MAX_HEADER_FILE)).method
            secret = _from_file(Path(_path(key)), password=method == GOCRYPTFS)
    except BaseException:
        files.close()
        raise
    return open_model_files(files, secret, expect_root=expect_root, min_revision=min_revision)


def _from_file(path: Path, *, password: bool) -> Secret:
    from cai.model.gocryptfs.keys import read_password_file

    return read_password_file(path) if password else read_key_file(path)


def _given(key: Key) -> Secret | None:
    if isinstance(key, bytes):
        return Secret(key)
    return key if isinstance(key, Secret) else None


def _path(key: Key) -> str:
    assert not isinstance(key, bytes | Secret)  # noqa: S101 - those are given, not read
    return os.fspath(key)
