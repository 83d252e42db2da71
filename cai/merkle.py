"""Merkle trees as RFC 6962 §2.1 hashes them: the session tree, the content root, the audit log.

A leaf is ``SHA-256(00 ‖ data)``, a node ``SHA-256(01 ‖ left ‖ right)``; the tree over ``n`` leaves
splits at the largest power of two below ``n``. Prefixes keep a node from being offered as a leaf.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

HASH_SIZE = 32
"""Bytes of a leaf, a node and a root."""


def leaf_hash(data: bytes) -> bytes:
    """Hash of one leaf's data (RFC 6962 §2.1)."""
    return sha256(b"\x00" + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Hash of an inner node (RFC 6962 §2.1)."""
    return sha256(b"\x01" + left + right).digest()


def root(leaves: Sequence[bytes]) -> bytes:
    """Root over leaf hashes; the empty tree is ``SHA-256("")`` (RFC 6962 §2.1)."""
    if not leaves:
        return sha256(b"").digest()
    # Equal to the recursive definition: a last odd node moves up unhashed.
    level = list(leaves)
    while len(level) > 1:
        paired = [node_hash(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
        if len(level) % 2:
            paired.append(level[-1])
        level = paired
    return level[0]


def inclusion_path(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """Audit path of the leaf at ``index``, bottom up (RFC 6962 §2.1.1).

    Raises:
        IndexError: ``index`` is not below ``len(leaves)``; a fault of the caller.
    """
    if not 0 <= index < len(leaves):
        raise IndexError(f"leaf {index} of {len(leaves)}")
    path: list[bytes] = []
    level = list(leaves)
    while len(level) > 1:
        sibling = index ^ 1
        if sibling < len(level):
            path.append(level[sibling])
        paired = [node_hash(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
        if len(level) % 2:
            paired.append(level[-1])
        level, index = paired, index // 2
    return path


def inclusion_paths(leaves: Sequence[bytes]) -> list[tuple[bytes, ...]]:
    """The inclusion path of each leaf hash, as ``inclusion_path`` gives them one by one.

    Made level by level, so that a whole tree costs about two hashes a leaf.
    """
    paths: list[list[bytes]] = [[] for _ in leaves]
    level, height = list(leaves), 0
    while len(level) > 1:
        for index, path in enumerate(paths):
            sibling = (index >> height) ^ 1
            # The last node of an odd level has none and moves up as it is (RFC 6962 §2.1).
            if sibling < len(level):
                path.append(level[sibling])
        pairs = zip(level[::2], level[1::2], strict=False)
        level = [node_hash(left, right) for left, right in pairs] + level[len(level) & ~1 :]
        height += 1
    return [tuple(path) for path in paths]


def root_from_path(leaf: bytes, index: int, size: int, path: Sequence[bytes]) -> bytes | None:
    """Root that ``leaf`` at ``index`` of ``size`` leads to (RFC 9162 §2.1.3.2).

    Returns:
        The root, or ``None`` where index, size and path length do not fit each other: a path of
        any other length than the tree's own is refused.
    """
    if not 0 <= index < size:
        return None
    position, last, value = index, size - 1, leaf
    rest = list(path)
    while last:
        if position % 2 or position < last:
            if not rest:
                return None
            sibling = rest.pop(0)
            value = node_hash(sibling, value) if position % 2 else node_hash(value, sibling)
        position //= 2
        last //= 2
    return None if rest else value


def consistency_path(leaves: Sequence[bytes], old: int) -> list[bytes]:
    """Proof that the tree over the first ``old`` leaves is a beginning of this one.

    RFC 6962 §2.1.2; empty for ``old == len(leaves)`` and for ``old == 0``.

    Raises:
        IndexError: ``old`` is more than ``len(leaves)``; a fault of the caller.
    """
    if not 0 <= old <= len(leaves):
        raise IndexError(f"{old} of {len(leaves)} leaves")
    if old == 0:
        return []
    path: list[bytes] = []
    rest, known = list(leaves), True
    while old < len(rest):
        split = 1 << (len(rest) - 1).bit_length() - 1
        if old <= split:
            path.append(root(rest[split:]))
            rest = rest[:split]
        else:
            path.append(root(rest[:split]))
            rest, old, known = rest[split:], old - split, False
    if not known:
        path.append(root(rest))
    return path[::-1]


def consistent(
    old_size: int, old_root: bytes, new_size: int, new_root: bytes, path: Sequence[bytes]
) -> bool:
    """Whether a tree extends another (RFC 9162 §2.1.4.2).

    A path of any other length than the two sizes need is refused. An empty tree has one root, and
    every tree extends it with an empty path.
    """
    if not 0 <= old_size <= new_size:
        return False
    if old_size == 0:
        return old_root == root(()) and not path and (new_size > 0 or new_root == old_root)
    if old_size == new_size:
        return old_root == new_root and not path
    rest = list(path)
    if old_size.bit_count() == 1:
        rest.insert(0, old_root)  # the old tree is a node of the new one
    position, last = old_size - 1, new_size - 1
    while position % 2:
        position, last = position // 2, last // 2
    if not rest:
        return False
    old_value = new_value = rest.pop(0)
    for sibling in rest:
        if last == 0:
            return False
        if position % 2 or position == last:
            old_value = node_hash(sibling, old_value)
            new_value = node_hash(sibling, new_value)
            while not position % 2 and position:
                position, last = position // 2, last // 2
        else:
            new_value = node_hash(new_value, sibling)
        position, last = position // 2, last // 2
    return last == 0 and old_value == old_root and new_value == new_root
