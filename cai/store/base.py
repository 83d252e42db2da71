"""What a store of sealed models can do, whatever its scheme, and the limits of talking to one.

Paths are relative to the store's URI, ``/``-separated, without empty, ``.`` or ``..`` parts. Every
method may be called from several threads. Implementations convert what their libraries raise;
``PeerUnreachable`` is the one error that is worth another try (see ``cai.store.retry``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from cai.errors import FormatError
from cai.model.layout import PIECE

CONNECT_TIMEOUT_S = 10
"""Seconds to wait for a connection."""

READ_TIMEOUT_S = 60
"""Seconds to wait for the next bytes of an answer."""

BLOCK = 256 * 1024
"""Bytes that one read of an answer's body takes."""

PART = 2 * PIECE
"""Bytes of a part of an upload and of a range of a download; uploads of large files use more."""

MAX_PARTS = 10_000
"""Most parts of one upload: OSS, S3 and COS agree on it."""

MAX_LISTED = 200_000
"""Most names that one listing gives."""

MAX_PATH = 64 * 1024
"""Longest path inside a sealed model, bytes; object stores take less."""

WORKERS = 6
"""Requests under way at once, unless the caller says otherwise."""

MAX_WORKERS = 64
"""Most requests under way at once."""

LABEL = "cai-pieces"
"""Name of the metadata that holds ``label_of`` a file, where the store keeps metadata."""

Pace = Callable[[int], None]
"""Called with a number of bytes before (or just after) they travel; may wait."""


def unpaced(_amount: int) -> None:
    """No bandwidth limit."""


@dataclass(frozen=True, slots=True)
class Stat:
    """What a store says about one file.

    Attributes:
        size: stored bytes.
        label: digest that the writer attached to it; empty when it has none; ``None`` where the
            store keeps no labels, so that only reading can tell.
    """

    size: int
    label: str | None


@dataclass(frozen=True, slots=True)
class Listed:
    """One name of a listing.

    Attributes:
        path: relative to the store; a folder ends with ``/``.
        size: stored bytes; ``None`` for a folder.
    """

    path: str
    size: int | None


@dataclass(frozen=True, slots=True)
class Blob:
    """A range of a file.

    Attributes:
        data: the bytes, fewer than asked for only at the end of the file.
        total: bytes of the whole file.
    """

    data: bytes
    total: int


@dataclass(frozen=True, slots=True)
class FoundPart:
    """A part that an earlier, interrupted upload has left in the store.

    Attributes:
        size: its bytes.
        md5: hex digest, as far as the store's word for it goes; it only decides what is sent again.
    """

    size: int
    md5: str


class Upload(Protocol):
    """One multipart upload; nothing appears at its path before ``complete``."""

    def found(self, size: int, part: int) -> Mapping[int, FoundPart]:
        """Parts that are there already, by number from 1, of a file of ``size`` bytes."""

    def send(self, number: int, data: bytes, md5: bytes, pace: Pace) -> None:
        """Send part ``number``; a part that is there is replaced."""

    def complete(self, count: int) -> None:
        """Let the file appear, made of parts 1 to ``count``."""

    def abort(self) -> None:
        """Forget all parts."""


class Store(Protocol):
    """A place that holds the files of sealed models."""

    uri: str
    """Where it is, for messages; no secret in it."""

    writable: bool
    """Whether ``put`` and ``begin`` can work at all."""

    def stat(self, path: str) -> Stat | None:
        """What is known about a file; ``None`` when there is none."""

    def names(self, *, recursive: bool) -> Iterator[Listed]:
        """Files below the URI, sorted; without ``recursive``, its files and folders only."""

    def read(self, path: str, offset: int, length: int, pace: Pace = unpaced) -> Blob:
        """Read a range; ``length`` at least 1, ``offset`` inside the file or 0.

        Raises:
            InputMissing: no such file.
        """

    def put(self, path: str, data: bytes, label: str, pace: Pace = unpaced) -> None:
        """Write a small file whole, over an older one; it appears at once or not at all."""

    def begin(self, path: str, size: int, label: str) -> Upload:
        """Start the upload of a large file."""

    def pending(self) -> Mapping[str, list[Upload]]:
        """Uploads below the URI that were started and neither completed nor aborted."""

    def furnish(self, folders: Iterable[str], links: Mapping[str, str]) -> None:
        """Make what a directory needs beside files; object stores need nothing.

        Args:
            folders: paths of folders that shall exist, even if empty.
            links: text of each symbolic link by its path, as method gocryptfs has them.
        """

    def remove(self, path: str) -> None:
        """Remove a file; one that is not there is no error."""

    def close(self) -> None:
        """Close the connections."""


def part_size(size: int) -> int:
    """Bytes of each part of an upload: depends on the size alone, so that a resume finds it again.

    Raises:
        FormatError: no part size fits.
    """
    part = PART
    while -(-size // part) > MAX_PARTS:
        part *= 2
    if part > 4 * 1024**3:
        raise FormatError(f"a file of {size} bytes does not fit one upload")
    return part


def check_path(path: str) -> str:
    """A path that is safe to join to a directory or a URI.

    Raises:
        FormatError: it is absolute, leaves its place, or is not of the form of a path.
    """
    parts = path.split("/")
    if (
        not path
        or len(path.encode("utf-8", "surrogatepass")) > MAX_PATH
        or any(part in ("", ".", "..") for part in parts)
        or any(ord(letter) < 32 or letter == "\x7f" for letter in path)
    ):
        raise FormatError(f"{path!r} is not a path inside a sealed model")
    return path
