"""Inodes of a model's tree: numbers, attributes and listings, made once before the workers fork."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field

from cai.errors import FormatError
from cai.model.tree import Entry, EntryType, ModelTree
from cai.mount.protocol import (
    BLOCK,
    NAME_MAX,
    NO_ENTRY,
    Attributes,
    directory_entry,
    entry_answer,
)

ROOT = 1
"""Inode number of the root, fixed by the protocol."""

ROOT_MODE = 0o555
"""Mode of the mount point itself."""

PRIVATE_ROOT_MODE = 0o500
"""Mode of the mount point when only its owner may enter."""

SEALED_TIME = 315532800
"""Time stamp of everything: 1980-01-01, the earliest that a zip archive can hold. Times are not
part of a sealed model, and one that changed with every mount would defeat caches."""

_TYPE_BITS = {
    EntryType.FILE: stat.S_IFREG,
    EntryType.DIRECTORY: stat.S_IFDIR,
    EntryType.SYMLINK: stat.S_IFLNK,
}


@dataclass(frozen=True, slots=True)
class Owner:
    """Who owns everything in the mount, and whether others may look."""

    uid: int
    gid: int
    private: bool = False

    @classmethod
    def current(cls) -> Owner:
        """The calling process's effective user."""
        return cls(os.geteuid(), os.getegid())


@dataclass(slots=True)
class Node:
    """One inode.

    Attributes:
        attributes: what ``stat`` shows.
        parent: inode number of the directory it is in; the root is in itself.
        path: path in the tree, empty for the root.
        target: where a symlink points.
        children: of a directory, name to inode number.
    """

    attributes: Attributes
    parent: int
    path: str = ""
    target: bytes = b""
    children: dict[bytes, int] = field(default_factory=dict)

    @property
    def is_directory(self) -> bool:
        """Whether it can be listed."""
        return stat.S_ISDIR(self.attributes.mode)

    @property
    def is_file(self) -> bool:
        """Whether it can be read."""
        return stat.S_ISREG(self.attributes.mode)


def read_only_mode(entry: Entry) -> int:
    """Type and permission bits that the mount shows: the sealed ones without the write bits."""
    if entry.type is EntryType.SYMLINK:
        return stat.S_IFLNK | 0o777
    return _TYPE_BITS[entry.type] | (entry.mode & 0o555)


class TreeIndex:
    """Every inode of a tree.

    Args:
        tree: the opened model.
        owner: owner of everything in it.

    Raises:
        FormatError: a path that no file system could show.
    """

    def __init__(self, tree: ModelTree, owner: Owner) -> None:
        self._owner = owner
        root_mode = stat.S_IFDIR | (PRIVATE_ROOT_MODE if owner.private else ROOT_MODE)
        self.nodes: list[Node] = [Node(self._attributes(ROOT, 0, root_mode, 2), ROOT)]
        numbers = {"": ROOT}
        for entry in tree.entries.values():
            numbers[entry.path] = self._add(entry, numbers)
        for node in self.nodes:
            if node.is_directory:
                self._count_links(node)
        self.total = sum(
            -(-node.attributes.size // BLOCK) * BLOCK for node in self.nodes if node.is_file
        )
        """Bytes in all files, each rounded up to whole blocks."""

    def node(self, ino: int) -> Node | None:
        """The inode of that number."""
        return self.nodes[ino - 1] if 1 <= ino <= len(self.nodes) else None

    def child(self, directory: Node, name: bytes) -> Node | None:
        """The inode of that name in a directory."""
        ino = directory.children.get(name)
        return None if ino is None else self.node(ino)

    def listing(self, directory: Node, offset: int, size: int, *, plus: bool) -> bytes:
        """As many directory entries as fit.

        Args:
            directory: what to list.
            offset: 0, or the cookie of the last entry that was seen.
            size: most bytes to give.
            plus: put each entry's attributes before it.
        """
        own = directory.attributes.ino
        names = [(b".", own), (b"..", directory.parent), *directory.children.items()]
        out = bytearray()
        for position in range(offset, len(names)):
            name, ino = names[position]
            attributes = self.nodes[ino - 1].attributes
            piece = directory_entry(ino, position + 1, attributes.mode >> 12, name)
            if plus:
                piece = (NO_ENTRY if position < 2 else entry_answer(attributes)) + piece
            if len(out) + len(piece) > size:
                break
            out += piece
        return bytes(out)

    def _add(self, entry: Entry, numbers: dict[str, int]) -> int:
        above, slash, last = entry.path.rpartition("/")
        name = last.encode("utf-8", "surrogateescape")
        if name in (b"", b".", b"..") or b"\0" in name or len(name) > NAME_MAX:
            raise FormatError(f"{entry.path!r} cannot be the path of a file")
        # Only a path without a slash is in the root: "/x" is not.
        parent = self.node(numbers.get(above, 0)) if above or not slash else None
        if parent is None or not parent.is_directory or name in parent.children:
            raise FormatError(f"{entry.path!r} has no directory that comes before it")
        ino = len(self.nodes) + 1
        size = 0 if entry.type is EntryType.DIRECTORY else entry.size
        target = entry.target.encode("utf-8", "surrogateescape")
        if entry.type is EntryType.SYMLINK:
            size = len(target)
        attributes = self._attributes(ino, size, read_only_mode(entry), 1)
        self.nodes.append(Node(attributes, parent.attributes.ino, entry.path, target))
        parent.children[name] = ino
        return ino

    def _count_links(self, node: Node) -> None:
        below = sum(1 for ino in node.children.values() if self.nodes[ino - 1].is_directory)
        seen = node.attributes
        node.attributes = self._attributes(seen.ino, 0, seen.mode, 2 + below)

    def _attributes(self, ino: int, size: int, mode: int, nlink: int) -> Attributes:
        return Attributes(ino, size, mode, nlink, self._owner.uid, self._owner.gid, SEALED_TIME)
