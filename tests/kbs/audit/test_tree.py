"""The tree without its leaves gives the roots and proofs that the whole tree gives."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cai import merkle
from kbs.audit import tree

LEAVES = [merkle.leaf_hash(place.to_bytes(2, "big")) for place in range(300)]


def grown(size: int) -> tuple[list[bytes], dict[tree.Node, bytes]]:
    frontier: list[bytes] = []
    nodes: dict[tree.Node, bytes] = {}
    for place, leaf in enumerate(LEAVES[:size]):
        nodes[0, place] = leaf
        frontier, completed = tree.appended(frontier, place, leaf)
        nodes |= dict(completed)
    return frontier, nodes


FRONTIER, NODES = grown(len(LEAVES))


def test_roots_of_every_size() -> None:
    for size in range(130):
        frontier, nodes = grown(size)
        assert tree.fold(frontier) == merkle.root(LEAVES[:size])
        assert [nodes[node] for node in tree.cover((0, size))] == frontier
        assert len(nodes) == 2 * size - size.bit_count()


@given(st.integers(1, 300), st.data())
def test_proofs(size: int, draw: st.DataObject) -> None:
    index = draw.draw(st.integers(0, size - 1))
    path = tree.span_hashes(tree.inclusion_spans(index, size), NODES)
    assert list(path) == merkle.inclusion_path(LEAVES[:size], index)
    old = draw.draw(st.integers(0, size))
    path = tree.span_hashes(tree.consistency_spans(old, size), NODES)
    assert list(path) == merkle.consistency_path(LEAVES[:size], old)


def test_a_proof_needs_few_nodes() -> None:
    size = 1_000_003
    for index in (0, 1, 524_288, size - 1):
        assert len(tree.nodes_of(tree.inclusion_spans(index, size))) <= 40
    for old in (1, 3, 999_999, size - 1):
        assert len(tree.nodes_of(tree.consistency_spans(old, size))) <= 60


def test_a_stored_frontier_fits_its_size() -> None:
    encoded = b"".join(FRONTIER)
    assert tree.split_frontier(encoded, 300) == FRONTIER
    assert tree.split_frontier(b"", 0) == []
    for size in (-1, 0, 301, 303, 7):
        assert tree.split_frontier(encoded, size) is None
    assert tree.split_frontier(encoded[:-1], 300) is None
