"""Files about the log that verify without the broker: exports, inclusion and consistency. Pure.

Each file is lines of canonical JSON (docs/spec-audit.md §7); its first line says which kind it is.
``verify_file`` needs the file and the log's public key, and optionally a checkpoint that the reader
kept: the log must then be an extension of that one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from cai import jcs, merkle
from cai.attest.checkpoint import (
    Checkpoint,
    CheckpointProof,
    hashes,
    note_member,
    read_checkpoint,
    verify_consistency,
)
from cai.attest.verdict import Verdict
from cai.errors import CaiError, FormatError
from kbs.audit import report, tree
from kbs.audit.replay import Replay, opened
from kbs.audit.report import Report

EXPORT: Final = "cai-audit-export"
INCLUSION: Final = "cai-audit-proof"
CONSISTENCY: Final = "cai-audit-consistency"
FILE_VERSION: Final = 1
"""Value of the member that names the kind of file."""

KEPT: Final = "the checkpoint kept from before"
"""What failures call the one that the reader brings."""

MAX_LINE = 16 * 1024 * 1024
"""Longest line of such a file, bytes; the first line of an export lists its checkpoints."""


def export_header(
    *,
    instance: str,
    start: int,
    size: int,
    frontier: Sequence[bytes],
    origin: str,
    checkpoints: Sequence[bytes],
) -> bytes:
    """First line of an export; its leaves follow, a line each.

    Args:
        instance: id of the key broker.
        start: place of the first leaf.
        size: leaves of the log at its end.
        frontier: maximal complete subtrees over the leaves before ``start``.
        origin: of checkpoints at ``start``.
        checkpoints: every stored note of more than ``start`` and at most ``size`` leaves, smallest
            first; the last is of ``size`` leaves.
    """
    return jcs.canonical(
        {
            EXPORT: FILE_VERSION,
            "instance": instance,
            "from": start,
            "size": size,
            "frontier": [node.hex() for node in frontier],
            "origin": origin,
            "checkpoints": [note.decode("utf-8") for note in checkpoints],
        }
    )


def inclusion_file(leaf: dict[str, Any], proof: CheckpointProof) -> bytes:
    """A leaf with its proof."""
    return jcs.canonical({INCLUSION: FILE_VERSION, "leaf": leaf, "proof": proof.to_json()})


def consistency_file(old: bytes, new: bytes, path: Sequence[bytes]) -> bytes:
    """Two checkpoints with the proof that the second extends the first."""
    return jcs.canonical(
        {
            CONSISTENCY: FILE_VERSION,
            "old": old.decode("utf-8"),
            "new": new.decode("utf-8"),
            "path": [step.hex() for step in path],
        }
    )


def verify_file(
    lines: Iterable[bytes], keys: Sequence[bytes], *, held: bytes | None = None
) -> Verdict:
    """Verify any of the three kinds.

    Args:
        lines: of the file, without their ends.
        keys: public keys of the log, 32 bytes each.
        held: a checkpoint that the reader kept from before; the log must extend it.

    Returns:
        Every check by name; nothing is raised for what the file holds.
    """
    found = Report()
    rest = iter(lines)
    subject, simulated = "audit file", False
    try:
        first = _first(next(rest, b""))
        if EXPORT in first:
            subject = "audit export"
            simulated = _verify_export(first, rest, keys, held, found)
        elif INCLUSION in first:
            subject = "audit proof"
            simulated = _verify_inclusion(first, keys, held, found)
            _require_end(rest)
        else:
            subject = "audit consistency"
            _verify_consistency(first, keys, held, found)
            _require_end(rest)
    except CaiError as error:
        found.fail(report.FILE_FORM, error.message)
    return found.verdict(subject, simulated=simulated)


def _verify_export(
    first: dict[str, Any],
    lines: Iterator[bytes],
    keys: Sequence[bytes],
    held: bytes | None,
    found: Report,
) -> bool:
    # 1. The first line: from where to where, and the notes by their size.
    _require_members(first, EXPORT, "instance", "from", "size", "frontier", "origin", "checkpoints")
    start, size = _number(first, "from"), _number(first, "size")
    frontier = tree.split_frontier(b"".join(hashes(first["frontier"], what="frontier")), start)
    if frontier is None or start >= size:
        raise FormatError("export: from, size and frontier do not fit")
    notes = _notes_by_size(first["checkpoints"], found)
    kept = None if held is None else opened(held, keys, found, name=KEPT)
    replay = Replay(
        _text(first, "instance"), found=found, start=start, frontier=frontier,
        origin=_text(first, "origin"),
    )  # fmt: skip
    # 2. Each leaf, and each checkpoint over the leaves so far.
    covered = -1
    _compare(kept, replay, found)
    for data in lines:
        if replay.size == size:
            raise FormatError(f"export: more than {size} leaves")
        replay.take(data)
        for note in notes.pop(replay.size, ()):
            replay.checkpoint(note, keys)
            covered = replay.size
        _compare(kept, replay, found)
    # 3. The end: every leaf is covered by a checkpoint, and no checkpoint is left over.
    if replay.size != size:
        found.fail(
            report.LEAF_PLACE, f"the export ends after leaf {replay.size - 1}",
            observed=replay.size, expected=size,
        )  # fmt: skip
    for count in notes:
        found.fail(report.CHECKPOINT_SIZE, f"checkpoint of {count} leaves: they are not here")
    found.require(
        report.CHECKPOINT_SIZE, covered == replay.size,
        f"no checkpoint is over all {replay.size} leaves",
    )  # fmt: skip
    if kept is not None and not start <= kept.size <= replay.size:
        _outside(kept, replay.size, found)
    return replay.simulated


def _verify_inclusion(
    first: dict[str, Any], keys: Sequence[bytes], held: bytes | None, found: Report
) -> bool:
    # 1. Leaf and proof have their form, and speak of one place.
    _require_members(first, INCLUSION, "leaf", "proof")
    proof, leaf = CheckpointProof.from_json(first["proof"]), first["leaf"]
    if not isinstance(leaf, dict):
        raise FormatError("audit proof: the leaf is no object")
    data = jcs.canonical(leaf)
    # 2. The checkpoint is signed, of this broker, and the leaf is under its root.
    checkpoint = opened(proof.note, keys, found, name="its checkpoint")
    if checkpoint is None:
        return leaf.get("realm") == "simulated"
    found.require(
        report.LEAF_LOG, checkpoint.instance == leaf.get("instance") != "",
        "the leaf is of another key broker than the checkpoint",
        observed=leaf.get("instance"), expected=checkpoint.instance,
    )  # fmt: skip
    found.require(
        report.LEAF_PLACE, leaf.get("seq") == proof.index,
        f"the leaf says that it is leaf {leaf.get('seq')}", expected=proof.index,
    )  # fmt: skip
    root = merkle.root_from_path(merkle.leaf_hash(data), proof.index, proof.size, proof.path)
    found.require(
        report.PROOF_INCLUSION, proof.size == checkpoint.size and root == checkpoint.root,
        f"leaf {proof.index} is not under the root of the checkpoint",
    )  # fmt: skip
    # 3. A checkpoint kept from before can be compared where it is the same one.
    if held is not None:
        _same(opened(held, keys, found, name=KEPT), checkpoint, found)
    return leaf.get("realm") == "simulated"


def _verify_consistency(
    first: dict[str, Any], keys: Sequence[bytes], held: bytes | None, found: Report
) -> None:
    # 1. Both checkpoints are signed.
    _require_members(first, CONSISTENCY, "old", "new", "path")
    path = hashes(first["path"], what="consistency proof")
    old = opened(note_member(first, "old"), keys, found, name="the old checkpoint")
    new = opened(note_member(first, "new"), keys, found, name="the new checkpoint")
    if old is None or new is None:
        return
    # 2. The second log extends the first.
    _require_extends(report.PROOF_CONSISTENCY, old, new, path, found)
    # 3. The first is the one that the reader kept.
    if held is not None:
        _same(opened(held, keys, found, name=KEPT), old, found)


def _compare(kept: Checkpoint | None, replay: Replay, found: Report) -> None:
    """Hold the log so far against a checkpoint kept from before, when it has that size."""
    if kept is None or kept.size != replay.size:
        return
    # Its origin was the one before a restore, if the log was restored just here.
    found.require(
        report.CHECKPOINT_HELD, kept.root == replay.root and kept.origin == replay.origin,
        f"the log of {kept.size} leaves is not the one of the checkpoint kept from before",
        observed=f"{replay.origin} {replay.root.hex()}",
        expected=f"{kept.origin} {kept.root.hex()}",
    )  # fmt: skip


def _outside(kept: Checkpoint, size: int, found: Report) -> None:
    if kept.size > size:
        found.fail(
            report.CHECKPOINT_HELD, f"rolled back: the log has {size} leaves, it had {kept.size}",
            observed=size, expected=kept.size,
        )  # fmt: skip
    else:
        found.fail(
            report.CHECKPOINT_HELD,
            f"the export begins after the {kept.size} leaves of the checkpoint kept from before",
        )


def _same(kept: Checkpoint | None, other: Checkpoint, found: Report) -> None:
    if kept is None:
        return
    if kept.size != other.size:
        found.fail(
            report.CHECKPOINT_HELD,
            "the checkpoint kept from before is of another size; ask for a consistency proof",
            observed=other.size, expected=kept.size,
        )  # fmt: skip
    else:
        found.require(
            report.CHECKPOINT_HELD, kept == other, "two logs of one size: the log was rewritten",
            observed=other.root.hex(), expected=kept.root.hex(),
        )  # fmt: skip


def _require_extends(
    name: str, old: Checkpoint, new: Checkpoint, path: Sequence[bytes], found: Report
) -> None:
    try:
        verify_consistency(old, new, path)
    except CaiError as error:
        found.fail(name, error.message)
    else:
        found.made(name)


def _first(line: bytes) -> dict[str, Any]:
    value = jcs.parse_canonical(line, what="audit file", limit=MAX_LINE)
    kinds = {EXPORT, INCLUSION, CONSISTENCY}
    if not isinstance(value, dict) or len(kinds & set(value)) != 1:
        raise FormatError("audit file: the first line names none of the three kinds")
    if any(value[kind] != FILE_VERSION for kind in kinds & set(value)):
        raise FormatError(f"audit file: not of version {FILE_VERSION}")
    return value


def _notes_by_size(value: object, found: Report) -> dict[int, list[bytes]]:
    if not isinstance(value, list) or not all(isinstance(note, str) for note in value):
        raise FormatError("export: checkpoints is no list of notes")
    notes: dict[int, list[bytes]] = {}
    for text in value:
        note = text.encode("utf-8", "surrogatepass")
        try:
            notes.setdefault(read_checkpoint(note).size, []).append(note)
        except CaiError as error:
            found.fail(report.CHECKPOINT_FORM, error.message)
    return notes


def _require_members(value: dict[str, Any], *names: str) -> None:
    if set(value) != set(names):
        raise FormatError(f"audit file: expected the members {', '.join(sorted(names))}")


def _require_end(lines: Iterator[bytes]) -> None:
    if next(lines, None) is not None:
        raise FormatError("audit file: more than one line")


def _number(value: dict[str, Any], name: str) -> int:
    number = value[name]
    if type(number) is not int or number < 0:
        raise FormatError(f"audit file: {name} is no count")
    return number


def _text(value: dict[str, Any], name: str) -> str:
    text = value[name]
    if not isinstance(text, str) or not text:
        raise FormatError(f"audit file: {name} is no text")
    return text
