"""CAI: sealed models, attested key release and attested channels for confidential inference."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cai.loaders.filesystem import SealedFileSystem
    from cai.loaders.opening import Key

__version__ = "0.1.0"

__all__ = ["__version__", "open"]


def open(  # noqa: A001 - cai.open is meant to read like it
    uri: str | os.PathLike[str], key: Key, *, expect_root: str | None = None, min_revision: int = 0
) -> SealedFileSystem:
    """Open a sealed model as a read-only file system, without a mount.

        with cai.open("model.sealed", "model.key") as files:
            print(files.ls("", detail=False))
            weights = files.load_safetensors(framework="pt")

    Args:
        uri: a directory, or the URI of a store, which is then read on demand.
        key: the key, 32 bytes, or the path of its file.
        expect_root: the ``model_root`` to insist on, 64 hex digits.
        min_revision: the oldest revision to accept.

    Returns:
        An fsspec file system, which is also a context manager.

    Raises:
        CaiError: it cannot be opened; or, as a ``UsageError``, fsspec is not installed.
    """
    from cai.errors import UsageError

    try:
        from cai.loaders.filesystem import SealedFileSystem
    except ImportError as error:
        raise UsageError("fsspec is not installed", hint="install the extra: fsspec") from error
    from cai.loaders.opening import open_tree

    return SealedFileSystem(
        tree=open_tree(uri, key, expect_root=expect_root, min_revision=min_revision)
    )
