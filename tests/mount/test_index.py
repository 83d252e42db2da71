from __future__ import annotations

import struct

import pytest

from cai.errors import FormatError
from cai.model.tree import Entry, EntryType
from cai.mount.index import ROOT, Node, Owner, TreeIndex
from tests.mount.fake_tree import FakeTree

OWNER = Owner(1000, 1001)
CONTENT = {
    "a": None, "a/b": None, "a/b/big": bytes(5000), "a/link": "-> b/big", "empty": b"",
    "ünï": b"x", "run.sh": b"#!",
}  # fmt: skip


def node(index: TreeIndex, path: str) -> Node:
    return next(item for item in index.nodes if item.path == path)


def names(listing: bytes, *, plus: bool = False) -> list[tuple[int, bytes]]:
    """Cookie and name of each directory entry."""
    found = []
    while listing:
        listing = listing[128:] if plus else listing
        _ino, cookie, length, _kind = struct.unpack_from("=QQII", listing)
        found.append((cookie, listing[24 : 24 + length]))
        listing = listing[24 + length + -(24 + length) % 8 :]
    return found


def test_modes_keep_what_was_sealed_without_write_bits() -> None:
    index = TreeIndex(FakeTree(CONTENT), OWNER)
    modes = {item.path: oct(item.attributes.mode) for item in index.nodes}
    assert modes == {
        "": "0o40555", "a": "0o40555", "a/b": "0o40555", "a/b/big": "0o100444",
        "a/link": "0o120777", "empty": "0o100444", "ünï": "0o100444", "run.sh": "0o100555",
    }  # fmt: skip
    assert {(item.attributes.uid, item.attributes.gid) for item in index.nodes} == {(1000, 1001)}


def test_a_private_root_admits_its_owner_only() -> None:
    index = TreeIndex(FakeTree({}), Owner(1000, 1000, private=True))
    assert index.nodes[0].attributes.mode & 0o777 == 0o500


def test_link_counts() -> None:
    index = TreeIndex(FakeTree(CONTENT), OWNER)
    counts = {item.path: item.attributes.nlink for item in index.nodes}
    assert (counts[""], counts["a"], counts["a/b"], counts["a/b/big"]) == (3, 3, 2, 1)


def test_sizes() -> None:
    index = TreeIndex(FakeTree(CONTENT), OWNER)
    assert node(index, "a/link").attributes.size == len("b/big")
    assert node(index, "a").attributes.size == 0
    assert index.total == 8192 + 4096 + 4096


def test_names_are_found_as_bytes() -> None:
    index = TreeIndex(FakeTree(CONTENT), OWNER)
    root = index.nodes[0]
    found = index.child(root, "ünï".encode())
    assert found is not None
    assert found.path == "ünï"
    assert index.child(root, b"uni") is None


@pytest.mark.parametrize("ino", [0, -1, 9, 1 << 63])
def test_numbers_out_of_range(ino: int) -> None:
    assert TreeIndex(FakeTree(CONTENT), OWNER).node(ino) is None


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("size", [200, 300, 4096])
def test_a_listing_goes_on_where_it_stopped(size: int, *, plus: bool) -> None:
    index = TreeIndex(FakeTree({f"file{n:03}": b"" for n in range(100)}), OWNER)
    seen: list[bytes] = []
    offset = 0
    while piece := index.listing(index.nodes[0], offset, size, plus=plus):
        assert len(piece) <= size
        entries = names(piece, plus=plus)
        seen += [name for _cookie, name in entries]
        offset = entries[-1][0]
    assert seen == [b".", b"..", *(f"file{n:03}".encode() for n in range(100))]


def test_a_listing_beyond_the_end_is_empty() -> None:
    index = TreeIndex(FakeTree(CONTENT), OWNER)
    assert index.listing(index.nodes[0], 1 << 62, 4096, plus=False) == b""


def test_dot_dot_names_the_directory_above() -> None:
    index = TreeIndex(FakeTree(CONTENT), OWNER)
    listing = index.listing(node(index, "a/b"), 0, 4096, plus=False)
    assert struct.unpack_from("=Q", listing, 32)[0] == node(index, "a").attributes.ino
    root = index.listing(index.nodes[0], 0, 4096, plus=False)
    assert struct.unpack_from("=Q", root, 32)[0] == ROOT


@pytest.mark.parametrize(
    "path", ["", ".", "..", "a/..", "a/.", "a/", "/a", "a//b", "n" * 256, "a\0b", "gone/x", "f/x"]
)
def test_paths_that_no_file_system_shows_are_refused(path: str) -> None:
    tree = FakeTree({"a": None, "f": b""})
    tree.entries[path] = Entry(path, EntryType.FILE, 0, 0o644)
    with pytest.raises(FormatError):
        TreeIndex(tree, OWNER)
