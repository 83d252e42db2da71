"""The Merkle tree of the log, without holding its leaves: which stored hashes a proof needs. Pure.

RFC 6962 §2.1 splits ``n`` leaves at the largest power of two below ``n``. So every inner node is
either *complete* (``2^level`` leaves, at ``index · 2^level``) or lies on the right edge, and an
edge node is folded from complete ones. The log keeps the hashes of complete nodes, which never
change, and the *frontier*: the maximal complete nodes from left to right, one for each 1 bit of
the size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256

from cai.merkle import HASH_SIZE, node_hash

Node = tuple[int, int]
"""``(level, index)`` of a complete node; level 0 are the leaves."""

Span = tuple[int, int]
"""Leaves ``[start, stop)`` under one node of a tree."""


def appended(
    frontier: Sequence[bytes], size: int, leaf: bytes
) -> tuple[list[bytes], list[tuple[Node, bytes]]]:
    """Append one leaf hash.

    Args:
        frontier: of the tree before.
        size: leaves before.
        leaf: hash of the new leaf.

    Returns:
        The new frontier, and the nodes above the leaves that this leaf completes, bottom up.
    """
    grown = [*frontier, leaf]
    completed: list[tuple[Node, bytes]] = []
    level = 0
    while size >> level & 1:
        level += 1
        right = grown.pop()
        grown[-1] = node_hash(grown[-1], right)
        completed.append(((level, size >> level), grown[-1]))
    return grown, completed


def fold(frontier: Sequence[bytes]) -> bytes:
    """Root of the tree whose maximal complete nodes are these (RFC 6962 §2.1)."""
    if not frontier:
        return sha256(b"").digest()
    value = frontier[-1]
    for left in reversed(frontier[:-1]):
        value = node_hash(left, value)
    return value


def cover(span: Span) -> list[Node]:
    """The maximal complete nodes of an aligned span, from left to right."""
    start, stop = span
    nodes: list[Node] = []
    while start < stop:
        level = (stop - start).bit_length() - 1
        nodes.append((level, start >> level))
        start += 1 << level
    return nodes


def inclusion_spans(index: int, size: int) -> list[Span]:
    """The nodes of the audit path of leaf ``index``, bottom up (RFC 6962 §2.1.1)."""
    start, stop, spans = 0, size, []
    while stop - start > 1:
        split = start + _split(stop - start)
        if index < split:
            spans.append((split, stop))
            stop = split
        else:
            spans.append((start, split))
            start = split
    return spans[::-1]


def consistency_spans(old: int, new: int) -> list[Span]:
    """The nodes of the consistency proof, in its order (RFC 6962 §2.1.2).

    Empty for equal sizes and for an empty old tree, which every tree extends.
    """
    if not 0 < old < new:
        return []
    start, stop, spans = 0, new, []
    whole = True
    while old < stop:
        split = start + _split(stop - start)
        if old <= split:
            spans.append((split, stop))
            stop = split
        else:
            spans.append((start, split))
            start = split
            whole = False
    # Where the old tree is itself a node of the new one its root is known, and not sent.
    if not whole:
        spans.append((start, stop))
    return spans[::-1]


def nodes_of(spans: Iterable[Span]) -> set[Node]:
    """Every complete node that these spans are folded from."""
    return {node for span in spans for node in cover(span)}


def span_hashes(spans: Iterable[Span], nodes: Mapping[Node, bytes]) -> tuple[bytes, ...]:
    """The hash of each span, from the hashes of complete nodes."""
    return tuple(fold([nodes[part] for part in cover(span)]) for span in spans)


def split_frontier(encoded: bytes, size: int) -> list[bytes] | None:
    """The stored frontier's hashes; ``None`` when it is not one of a tree of this size."""
    if size < 0 or len(encoded) != size.bit_count() * HASH_SIZE:
        return None
    return [encoded[at : at + HASH_SIZE] for at in range(0, len(encoded), HASH_SIZE)]


def _split(count: int) -> int:
    """The largest power of two below ``count``, which is at least 2."""
    return 1 << (count - 1).bit_length() - 1
