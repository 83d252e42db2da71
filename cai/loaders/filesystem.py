"""A sealed model as a read-only fsspec file system (extra ``fsspec``).

``cai.open`` makes one. It is registered with fsspec under the protocol ``cai``:
``fsspec.filesystem("cai", uri="model.sealed", key_file="model.key")``.
"""

from __future__ import annotations

import errno
import io
import os
from typing import Any

from fsspec import AbstractFileSystem

from cai.errors import Tampered
from cai.loaders.opening import open_tree
from cai.loaders.paths import resolve
from cai.loaders.tensors import load_safetensors
from cai.model.opening import AnyModel
from cai.model.tree import Entry, EntryType, FileReader

BUFFER = 256 * 1024
"""Bytes that a file object reads at a time for small reads; one chunk."""

_TYPES = {EntryType.FILE: "file", EntryType.DIRECTORY: "directory"}


class SealedFile(io.RawIOBase):
    """One file of a sealed model, for reading at any place.

    Args:
        reader: the file; it is closed with this object.
        size: its length, bytes.
    """

    def __init__(self, reader: FileReader, size: int) -> None:
        super().__init__()
        self._reader = reader
        self._at = 0
        self.size = size

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read authenticated bytes from the current place.

        Raises:
            Tampered: some byte does not authenticate; nothing of it is given.
        """
        view = memoryview(buffer).cast("B")
        wanted = max(0, min(len(view), self.size - self._at))
        if wanted and self._reader.readinto(self._at, view[:wanted]) != wanted:
            raise Tampered("a file is shorter than it was sealed")
        self._at += wanted
        return wanted

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move; as for any file."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.size}.get(whence)
        if base is None or base + offset < 0:
            raise ValueError("no such place in the file")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        """The current place."""
        return self._at

    def close(self) -> None:
        """Release the reader."""
        if not self.closed:
            self._reader.close()
        super().close()


class SealedFileSystem(AbstractFileSystem):  # type: ignore[misc]
    """A sealed model as a read-only fsspec file system.

    Args:
        uri: where the sealed model lies.
        key_file: path of its key file.
        tree: an opened model instead of both; it is closed with this object.
        expect_root: the ``model_root`` to insist on, 64 hex digits.

    Attributes:
        tree: the opened model.
        root: its ``model_root``, hex; empty for a bare gocryptfs directory, which has none.

    Raises:
        CaiError: as ``open_tree``.
    """

    protocol = "cai"
    cachable = False  # fsspec must not keep it, nor the keys behind it
    root_marker = ""

    def __init__(
        self, uri: str = "", key_file: str = "", tree: AnyModel | None = None,
        expect_root: str | None = None, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(**options)
        self.tree = tree or open_tree(uri, key_file, expect_root=expect_root)
        self.root = self.tree.root

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(item) for item in path]
        text = os.fspath(path).removeprefix("cai://").removeprefix("cai::")
        return text.strip("/")

    def info(self, path: str, **_options: Any) -> dict[str, Any]:
        """What a path is: ``name``, ``size``, ``type``, ``mode``, and ``sha256`` of a file."""
        name = self._strip_protocol(path)
        resolved = resolve(self.tree, name)
        if not resolved:
            return {"name": name, "size": 0, "type": "directory", "mode": 0o755}
        entry = self.tree.entries.get(resolved)
        if entry is None:
            raise FileNotFoundError(name)
        return self._described(name, entry)

    def ls(self, path: str, detail: bool = True, **_options: Any) -> list[Any]:  # noqa: FBT001, FBT002 - fsspec's
        """What is in a directory."""
        name = self._strip_protocol(path)
        about = self.info(name)
        if about["type"] != "directory":
            return [about] if detail else [name]
        resolved = resolve(self.tree, name)
        below = f"{resolved}/" if resolved else ""
        shown = f"{name}/" if name else ""
        found = []
        for inner in self.tree.entries:
            last = inner.removeprefix(below)
            if inner.startswith(below) and "/" not in last:
                found.append(self._listed(shown + last) if detail else shown + last)
        return found

    def load_safetensors(self, path: str | None = None, *, framework: str = "numpy") -> Any:
        """The tensors of one file, or of all weight files, by name.

        Args:
            path: the file; by default all that hold weights.
            framework: ``numpy`` or ``pt``.

        Raises:
            CaiError: as ``cai.loaders.load_safetensors``.
        """
        wanted = None if path is None else self._strip_protocol(path)
        return load_safetensors(self.tree, wanted, framework=framework)

    def close(self) -> None:
        """Close the model; files that are open stay usable."""
        self.tree.close()

    def mkdir(self, path: str, *_given: Any, **_options: Any) -> None:
        """Refused, as is every change."""
        raise _read_only(path)

    def makedirs(self, path: str, *_given: Any, **_options: Any) -> None:
        """Refused, as is every change."""
        raise _read_only(path)

    def rmdir(self, path: str) -> None:
        """Refused, as is every change."""
        raise _read_only(path)

    def __reduce__(self) -> Any:
        # fsspec would carry the opened model over, and with it the keys.
        raise TypeError("a sealed model is not pickled; open it anew from its key file")

    def __enter__(self) -> SealedFileSystem:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _open(self, path: str, mode: str = "rb", **_options: Any) -> io.BufferedReader:
        if mode != "rb":
            raise _read_only(path)
        name = self._strip_protocol(path)
        resolved = resolve(self.tree, name)
        entry = self.tree.entries.get(resolved)
        if entry is None:
            raise FileNotFoundError(name)
        if entry.type is not EntryType.FILE:
            raise IsADirectoryError(name)
        return io.BufferedReader(SealedFile(self.tree.open(resolved), entry.size), BUFFER)

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **_options: Any
    ) -> bytes:
        """Bytes ``start`` to ``end`` of a file; negative numbers count from its end."""
        with self._open(path) as file:
            size = self.info(path)["size"]
            first, last, _step = slice(start, end).indices(size)
            file.seek(first)
            return file.read(max(0, last - first))

    def _listed(self, name: str) -> dict[str, Any]:
        try:
            return self.info(name)
        except FileNotFoundError:
            return {"name": name, "size": 0, "type": "other"}  # a symlink to nothing

    def _described(self, name: str, entry: Entry) -> dict[str, Any]:
        about = {
            "name": name, "size": entry.size, "type": _TYPES.get(entry.type, "other"),
            "mode": entry.mode,
        }  # fmt: skip
        if entry.sha256:
            about["sha256"] = entry.sha256
        return about


def _read_only(path: str) -> OSError:
    return OSError(errno.EROFS, "a sealed model is read-only", path)
