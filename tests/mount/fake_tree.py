"""An in-memory model tree whose chunks can be spoiled."""

from __future__ import annotations

from collections.abc import Mapping

from cai.errors import InputMissing, Tampered
from cai.model.tree import Entry, EntryType

CHUNK = 64 * 1024


class FakeReader:
    chunk_size = CHUNK

    def __init__(self, path: str, data: bytes, bad: set[tuple[str, int]]) -> None:
        self.path = path
        self.data = data
        self.bad = bad
        self.calls: list[tuple[int, int]] = []
        self.closed = False

    def readinto(self, offset: int, buffer: memoryview) -> int:
        self.calls.append((offset, len(buffer)))
        piece = self.data[offset : offset + len(buffer)]
        for chunk in range(offset // CHUNK, -(-(offset + len(piece)) // CHUNK)):
            if (self.path, chunk) in self.bad:
                raise Tampered("it was changed", path="objects/aa")
        buffer[: len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        self.closed = True


class FakeTree:
    """Files by content, symlinks by ``"-> target"``, directories by ``None``."""

    def __init__(self, content: Mapping[str, bytes | str | None], **modes: int) -> None:
        self.content = content
        self.bad: set[tuple[str, int]] = set()
        self.gone: set[str] = set()
        self.readers: list[FakeReader] = []
        self.entries = {path: entry(path, value) for path, value in content.items()}

    def open(self, path: str) -> FakeReader:
        data = self.content.get(path)
        if path in self.gone or not isinstance(data, bytes):
            raise InputMissing(f"no file {path}")
        self.readers.append(FakeReader(path, data, self.bad))
        return self.readers[-1]

    def close(self) -> None:
        pass


def entry(path: str, value: bytes | str | None) -> Entry:
    if value is None:
        return Entry(path, EntryType.DIRECTORY, 0, 0o755)
    if isinstance(value, str):
        target = value.removeprefix("-> ")
        return Entry(path, EntryType.SYMLINK, len(target.encode()), 0o777, target)
    mode = 0o755 if path.endswith(".sh") else 0o644
    return Entry(path, EntryType.FILE, len(value), mode)
