"""A second reader of the log's files, written from docs/spec-audit.md alone.

It imports nothing of the product. Where it and the product disagree on a vector, the page is wrong
or one of the two is.
"""

from __future__ import annotations

import base64
import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

HERE = Path(__file__).parents[2] / "vectors" / "audit"
LOG = json.loads((HERE / "log.json").read_text(encoding="utf-8"))
KEY = bytes.fromhex(LOG["public_key"])
FAILURES = json.loads((HERE / "failures.json").read_text(encoding="utf-8"))["failures"]


class Wrong(Exception):
    """Something in the file is not right."""


def demand(condition: object) -> None:
    if not condition:
        raise Wrong


def canonical(line: str) -> Any:
    """§1: for the vectors' ASCII member names Python's sorted, compact form is RFC 8785."""
    value = json.loads(line)
    demand(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False) == line)
    return value


def leaf_hash(line: str) -> bytes:
    return sha256(b"\x00" + line.encode()).digest()


def node(left: bytes, right: bytes) -> bytes:
    return sha256(b"\x01" + left + right).digest()


def append(frontier: list[bytes], size: int, leaf: bytes) -> list[bytes]:
    """§4, the last paragraph."""
    frontier = [*frontier, leaf]
    while size & 1:
        right, left = frontier.pop(), frontier.pop()
        frontier.append(node(left, right))
        size >>= 1
    return frontier


def root(frontier: list[bytes]) -> bytes:
    value = frontier[-1]
    for left in frontier[-2::-1]:
        value = node(left, value)
    return value


def split(size: int) -> int:
    power = 1
    while power * 2 < size:
        power *= 2
    return power


def root_of_path(leaf: bytes, index: int, size: int, path: list[bytes]) -> bytes:
    """RFC 6962 §2.1.1, read from the top."""
    if size == 1:
        demand(not path)
        return leaf
    demand(path)
    k = split(size)
    if index < k:
        return node(root_of_path(leaf, index, k, path[:-1]), path[-1])
    return node(path[-1], root_of_path(leaf, index - k, size - k, path[:-1]))


def roots_of_extension(
    old: int, new: int, path: list[bytes], known: bytes | None
) -> tuple[bytes, bytes]:
    """RFC 6962 §2.1.2, read from the top; ``known`` is the old root while it is a whole node."""
    if old == new:
        if known is not None:
            demand(not path)
            return known, known
        demand(len(path) == 1)
        return path[0], path[0]
    demand(path)
    k, last = split(new), path[-1]
    if old <= k:
        before, after = roots_of_extension(old, k, path[:-1], known)
        return before, node(after, last)
    before, after = roots_of_extension(old - k, new - k, path[:-1], None)
    return node(last, before), node(last, after)


def checkpoint(note: str) -> tuple[str, int, bytes]:
    """§5.1."""
    text, blank, signatures = note.rpartition("\n\n")
    demand(blank and signatures.endswith("\n"))
    lines = text.split("\n")
    demand(len(lines) == 3 and lines[1].isdigit() and str(int(lines[1])) == lines[1])
    origin, size, top = lines[0], int(lines[1]), base64.b64decode(lines[2], validate=True)
    wanted = sha256(origin.encode() + b"\n\x01" + KEY).digest()[:4]
    for line in signatures.removesuffix("\n").split("\n"):
        dash, name, encoded = line.split(" ")
        signature = base64.b64decode(encoded, validate=True)
        if dash == "\N{EM DASH}" and name == origin and signature[:4] == wanted:
            Ed25519PublicKey.from_public_bytes(KEY).verify(signature[4:], f"{text}\n".encode())
            return origin, size, top
    raise Wrong


def read_export(head: dict[str, Any], lines: list[str], held: str | None) -> None:
    """§8.1, the first paragraph."""
    demand(set(head) == {"cai-audit-export", "instance", "from", "size", "frontier", "origin",
                         "checkpoints"} and head["cai-audit-export"] == 1)  # fmt: skip
    size, frontier = head["from"], [bytes.fromhex(item) for item in head["frontier"]]
    demand(len(frontier) == size.bit_count() and len(lines) == head["size"] - size > 0)
    points = [checkpoint(note) for note in head["checkpoints"]]
    kept = None if held is None else checkpoint(held)
    origin, changes, signed = head["origin"], None if size else 0, 0
    realm = None
    seen: dict[int, tuple[str, bytes]] = {}
    if size:
        seen[size] = origin, root(frontier)
    for line in lines:
        leaf = canonical(line)
        realm = realm or leaf["realm"]
        demand(leaf["cai-audit"] == 1 and leaf["seq"] == size)
        demand(leaf["instance"] == head["instance"] and leaf["realm"] == realm)
        demand(changes is None or leaf["changes"] - changes in (0, 1))
        demand(signed <= leaf["checkpoint"] <= size)
        changes, signed = leaf["changes"], leaf["checkpoint"]
        if leaf["action"] == "audit.origin":
            origin, signed = leaf["details"]["origin"], 0
        frontier = append(frontier, size, leaf_hash(line))
        size += 1
        seen[size] = origin, root(frontier)
    for name, count, top in points:
        demand(seen.get(count) == (name, top) and count > head["from"])
    demand(points and points[-1][1] == size)
    if kept is not None:
        demand(seen.get(kept[1]) == (kept[0], kept[2]))


def read_inclusion(value: dict[str, Any], held: str | None) -> None:
    demand(set(value) == {"cai-audit-proof", "leaf", "proof"})
    proof, leaf = value["proof"], value["leaf"]
    point = checkpoint(proof["checkpoint"])
    demand(point[0].split("/")[:2] == ["cai-kbs", leaf["instance"]])
    demand(leaf["seq"] == proof["index"] < proof["size"] == point[1])
    line = json.dumps(leaf, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    path = [bytes.fromhex(step) for step in proof["path"]]
    demand(root_of_path(leaf_hash(line), proof["index"], proof["size"], path) == point[2])
    demand(held is None or checkpoint(held) == point)


def read_consistency(value: dict[str, Any], held: str | None) -> None:
    demand(set(value) == {"cai-audit-consistency", "old", "new", "path"})
    old, new = checkpoint(value["old"]), checkpoint(value["new"])
    demand(old[0] == new[0] and 0 < old[1] <= new[1])
    path = [bytes.fromhex(step) for step in value["path"]]
    demand(roots_of_extension(old[1], new[1], path, old[2]) == (old[2], new[2]))
    demand(held is None or checkpoint(held) == old)


def sound(lines: list[str], held: str | None = None) -> bool:
    try:
        head = canonical(lines[0])
        if "cai-audit-export" in head:
            read_export(head, lines[1:], held)
        else:
            demand(len(lines) == 1)
            read = read_inclusion if "cai-audit-proof" in head else read_consistency
            read(head, held)
    except (Wrong, InvalidSignature, ValueError, KeyError, IndexError, TypeError):
        return False
    return True


def lines_of(name: str) -> list[str]:
    return (HERE / name).read_text(encoding="utf-8").removesuffix("\n").split("\n")


@pytest.mark.parametrize("name", sorted(path.name for path in HERE.glob("*.jsonl")))
def test_it_accepts_what_is_sound(name: str) -> None:
    assert sound(lines_of(name))


@pytest.mark.parametrize("case", FAILURES, ids=lambda case: case["name"])
def test_it_refuses_what_is_not(case: dict[str, Any]) -> None:
    assert not sound(case["lines"], case["held"])


def test_it_accepts_what_was_kept() -> None:
    for size in (3, 7):
        held = (HERE / f"checkpoint-{size}.txt").read_text(encoding="utf-8")
        assert sound(lines_of("export.jsonl"), held)
        assert sound(lines_of("export-from-3.jsonl"), held)


def test_the_tables_of_the_log() -> None:
    hashes = [leaf_hash(leaf) for leaf in LOG["leaves"]]
    assert [item.hex() for item in hashes] == LOG["leaf_hashes"]
    frontier: list[bytes] = []
    for size, leaf in enumerate(hashes):
        frontier = append(frontier, size, leaf)
        assert [item.hex() for item in frontier] == LOG["frontiers"][size + 1]
        assert root(frontier).hex() == LOG["roots"][size + 1]
    assert LOG["roots"][0] == sha256(b"").hexdigest()
    for proof in LOG["inclusion"]:
        path = [bytes.fromhex(step) for step in proof["path"]]
        found = root_of_path(hashes[proof["index"]], proof["index"], proof["size"], path)
        assert found.hex() == LOG["roots"][proof["size"]]
    for proof in LOG["consistency"]:
        path = [bytes.fromhex(step) for step in proof["path"]]
        old, new = (bytes.fromhex(LOG["roots"][proof[name]]) for name in ("old", "new"))
        assert roots_of_extension(proof["old"], proof["new"], path, old) == (old, new)
