"""RFC 6962 trees against the recursive definition and published answers."""

from __future__ import annotations

from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cai import merkle

LEAVES = st.lists(st.binary(max_size=8), min_size=1, max_size=40)


def recursive_root(leaves: list[bytes]) -> bytes:
    """RFC 6962 §2.1, word by word."""
    if len(leaves) == 1:
        return leaves[0]
    split = 1
    while split * 2 < len(leaves):
        split *= 2
    return merkle.node_hash(recursive_root(leaves[:split]), recursive_root(leaves[split:]))


def test_known_answers() -> None:
    """The reference tree of Certificate Transparency: eight leaves of 0 to 16 bytes."""
    data = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657",
            "606162636465666768696a6b6c6d6e6f"]
    leaves = [merkle.leaf_hash(bytes.fromhex(item)) for item in data]
    assert merkle.root([]) == sha256(b"").digest()
    assert merkle.root(leaves[:1]).hex() == (
        "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d"
    )
    assert merkle.root(leaves).hex() == (
        "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328"
    )


@given(LEAVES)
def test_root_is_the_recursive_one(data: list[bytes]) -> None:
    leaves = [merkle.leaf_hash(item) for item in data]
    assert merkle.root(leaves) == recursive_root(leaves)


@given(LEAVES, st.data())
def test_every_path_leads_to_the_root(data: list[bytes], draw: st.DataObject) -> None:
    leaves = [merkle.leaf_hash(item) for item in data]
    index = draw.draw(st.integers(0, len(leaves) - 1))
    path = merkle.inclusion_path(leaves, index)
    assert merkle.root_from_path(leaves[index], index, len(leaves), path) == merkle.root(leaves)


@given(LEAVES, st.data())
def test_wrong_length_index_and_size_are_refused(data: list[bytes], draw: st.DataObject) -> None:
    leaves = [merkle.leaf_hash(item) for item in data]
    index = draw.draw(st.integers(0, len(leaves) - 1))
    path = merkle.inclusion_path(leaves, index)
    root, size = merkle.root(leaves), len(leaves)
    assert merkle.root_from_path(leaves[index], index, size, [*path, bytes(32)]) is None
    if path:
        assert merkle.root_from_path(leaves[index], index, size, path[:-1]) is None
    assert merkle.root_from_path(leaves[index], size, size, path) is None
    assert merkle.root_from_path(leaves[index], -1, size, path) is None
    assert merkle.root_from_path(leaves[index], index, 2 * size + 1, path) != root


def test_a_node_is_not_a_leaf() -> None:
    left, right = merkle.leaf_hash(b"a"), merkle.leaf_hash(b"b")
    root = merkle.root([left, right])
    assert merkle.leaf_hash(left + right) != root


def test_paths_of_leaves_outside_the_tree() -> None:
    with pytest.raises(IndexError):
        merkle.inclusion_path([bytes(32)], 1)


@given(LEAVES, st.data())
def test_every_beginning_is_consistent(data: list[bytes], draw: st.DataObject) -> None:
    leaves = [merkle.leaf_hash(item) for item in data]
    old = draw.draw(st.integers(0, len(leaves)))
    path = merkle.consistency_path(leaves, old)
    before, after = merkle.root(leaves[:old]), merkle.root(leaves)
    assert merkle.consistent(old, before, len(leaves), after, path)


@given(LEAVES, st.data())
def test_what_is_no_beginning_is_not_consistent(data: list[bytes], draw: st.DataObject) -> None:
    leaves = [merkle.leaf_hash(item) for item in data]
    size = len(leaves)
    old = draw.draw(st.integers(1, size))
    path = merkle.consistency_path(leaves, old)
    before, after = merkle.root(leaves[:old]), merkle.root(leaves)
    other = merkle.leaf_hash(b"other")
    assert not merkle.consistent(old, other, size, after, path)
    assert not merkle.consistent(old, before, size, other, path)
    assert not merkle.consistent(old, before, size, after, [*path, other])
    assert not merkle.consistent(size + 1, before, size, after, path)
    assert not merkle.consistent(-1, before, size, after, path)
    if path:
        assert not merkle.consistent(old, before, size, after, path[:-1])
        place = draw.draw(st.integers(0, len(path) - 1))
        bent = [*path[:place], other, *path[place + 1 :]]
        assert not merkle.consistent(old, before, size, after, bent)
    # One leaf of the beginning replaced, everything after it kept.
    place = draw.draw(st.integers(0, old - 1))
    rewritten = [*leaves[:place], other, *leaves[place + 1 :]]
    proof = merkle.consistency_path(rewritten, old)
    assert not merkle.consistent(old, before, size, merkle.root(rewritten), proof)


def test_the_reference_proofs() -> None:
    """The proofs of RFC 6962 §2.1.3 over its seven leaves: from 3, 4 and 6 to 7."""
    leaves = [merkle.leaf_hash(bytes([place])) for place in range(7)]
    a, b, c, d, e, f, j = leaves
    g, h, i = merkle.node_hash(a, b), merkle.node_hash(c, d), merkle.node_hash(e, f)
    k, right = merkle.node_hash(g, h), merkle.node_hash(i, j)
    assert merkle.consistency_path(leaves, 3) == [c, d, g, right]
    assert merkle.consistency_path(leaves, 4) == [right]
    assert merkle.consistency_path(leaves, 6) == [i, j, k]
    with pytest.raises(IndexError):
        merkle.consistency_path(leaves, 8)


def test_the_empty_tree() -> None:
    empty, leaf = merkle.root([]), merkle.leaf_hash(b"")
    assert merkle.consistent(0, empty, 0, empty, [])
    assert merkle.consistent(0, empty, 1, leaf, [])
    assert not merkle.consistent(0, leaf, 1, leaf, [])
    assert not merkle.consistent(0, empty, 0, leaf, [])
    assert not merkle.consistent(0, empty, 1, leaf, [leaf])
