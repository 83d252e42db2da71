"""Known-answer vectors of the audit log: ``python tests/vectors/make_audit.py`` writes them.

The key, the times and every id are fixed, so the files in ``audit/`` are the exact bytes that
version 1 of docs/spec-audit.md stands for. ``failures.json`` holds files that do not verify, each
with the names of the checks that must fail.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cai import jcs, merkle
from cai.attest.checkpoint import Checkpoint, CheckpointProof, sign_checkpoint, verifier_key
from cai.attest.verdict import Verdict, check
from kbs.audit import tree
from kbs.audit.leaf import ORIGIN_ACTION, Change, Entry
from kbs.audit.proof import consistency_file, export_header, inclusion_file

HERE = Path(__file__).resolve().parent / "audit"
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER_KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32, 64)))
INSTANCE = "0123456789abcdef0123456789abcdef"
ORIGIN = f"cai-kbs/{INSTANCE}"
RESTORED = f"{ORIGIN}/00112233445566ff"
BEGAN = datetime(2026, 1, 2, 3, 4, 5, 678000, tzinfo=UTC)
SIGNED = (3, 7)
"""Sizes at which checkpoints were signed."""


def public(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()


def request(number: int) -> str:
    return f"{number:032x}"


def entries() -> list[Entry]:
    guest = {"kind": "guest", "session": "5e" * 32}
    admin = {"kind": "admin", "name": "jo"}
    verdict = Verdict(
        "release",
        (
            check("tdx.debug", passed=True, observed="off"),
            check("resource.policy", passed=False, expected="allow", reason="the policy says no"),
        ),
        hardware={"fmspc": "00806f050000", "ppid": "a1" * 16},
    )
    evidence = {"quote_sha256": "c0" * 32, "gpu_digest": "c1" * 32}
    policies = {"verification/default": "d0" * 32, "resource/": "d1" * 32}
    return [
        Entry("instance.create", {"kind": "system"}, request(0), allowed=True),
        Entry("resource.set", admin, request(1), allowed=True, subject="models/minilm/key",
              change=Change("resource/models/minilm/key", 1, "e1" * 32)),
        Entry("policy.set", admin, request(2), allowed=True, subject="resource/",
              change=Change("policy/resource/", 1, "e2" * 32), policies={"resource/": "d1" * 32}),
        Entry("attest", guest, request(3), allowed=True, evidence=evidence),
        Entry("release", guest, request(4), allowed=False, reason="resource.policy: no",
              subject="kbs:///models/minilm/key", verdict=verdict, evidence=evidence,
              policies=policies),
        Entry("release", guest, request(5), allowed=True, subject="kbs:///models/minilm/key",
              evidence=evidence, policies=policies, served=1),
        Entry("unauthenticated", {"kind": "unknown"}, request(6), allowed=False,
              reason="no session, token or signature that this broker knows",
              details={"session": 12, "admin": 1}),
    ]  # fmt: skip


def leaves_of(found: list[Entry], signed: tuple[int, ...] = SIGNED) -> list[bytes]:
    leaves: list[bytes] = []
    changes, checkpoint = 0, 0
    for seq, entry in enumerate(found):
        changes += entry.counts
        checkpoint = max((size for size in signed if size <= seq), default=0)
        if any(item.action == ORIGIN_ACTION for item in found[:seq]):
            checkpoint = 0
        leaves.append(
            entry.encode(
                instance=INSTANCE, realm="production", seq=seq, changes=changes,
                checkpoint=checkpoint, at=BEGAN + timedelta(seconds=seq),
            )
        )  # fmt: skip
    return leaves


def hashes_of(leaves: list[bytes]) -> list[bytes]:
    return [merkle.leaf_hash(leaf) for leaf in leaves]


def note(
    leaves: list[bytes], size: int, *, origin: str = ORIGIN, key: Ed25519PrivateKey = KEY
) -> bytes:
    return sign_checkpoint(Checkpoint(origin, size, merkle.root(hashes_of(leaves)[:size])), key)


def export(
    leaves: list[bytes], sizes: tuple[int, ...] = SIGNED, *, start: int = 0, origin: str = ORIGIN,
    notes: list[bytes] | None = None,
) -> list[bytes]:  # fmt: skip
    header = export_header(
        instance=INSTANCE, start=start, size=len(leaves),
        frontier=frontier(leaves, start), origin=origin,
        checkpoints=notes or [note(leaves, size) for size in sizes if size > start],
    )  # fmt: skip
    return [header, *leaves[start:]]


def frontier(leaves: list[bytes], size: int) -> list[bytes]:
    found: list[bytes] = []
    for place, item in enumerate(hashes_of(leaves)[:size]):
        found, _ = tree.appended(found, place, item)
    return found


def inclusion(leaves: list[bytes], index: int, size: int) -> list[bytes]:
    path = tuple(merkle.inclusion_path(hashes_of(leaves)[:size], index))
    proof = CheckpointProof(note(leaves, size), index, size, path)
    return [inclusion_file(json.loads(leaves[index]), proof)]


def consistency(leaves: list[bytes], old: int, new: int) -> list[bytes]:
    path = merkle.consistency_path(hashes_of(leaves)[:new], old)
    return [consistency_file(note(leaves, old), note(leaves, new), path)]


def restored() -> tuple[list[bytes], list[bytes]]:
    """A log that was restored after five leaves, and its checkpoints."""
    details = {"origin": RESTORED, "previous": note(leaves_of(entries()), 3).decode()}
    found = [
        *entries()[:5],
        Entry(ORIGIN_ACTION, {"kind": "system"}, request(5), allowed=True, details=details),
        Entry("release", {"kind": "guest", "session": "5e" * 32}, request(6), allowed=False),
    ]
    leaves = leaves_of(found, (3,))
    return leaves, [note(leaves, 3), note(leaves, 7, origin=RESTORED)]


def edited(line: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    value = json.loads(line)
    change(value)
    return jcs.canonical(value)


def failures() -> list[dict[str, Any]]:
    leaves = leaves_of(entries())
    whole, proof, extension = export(leaves), inclusion(leaves, 2, 7), consistency(leaves, 3, 7)
    kept = note(leaves, 7)
    found: list[dict[str, Any]] = []

    def fails(
        name: str, lines: list[bytes], *checks: str, held: bytes | None = None
    ) -> None:
        found.append(
            {
                "name": name,
                "lines": [line.decode("utf-8", "replace") for line in lines],
                "held": None if held is None else held.decode(),
                "fails": sorted(checks),
            }
        )

    def bend(line: bytes, **members: Any) -> bytes:
        return edited(line, lambda value: value.update(members))

    # Files that are none.
    fails("empty", [], "file.form")
    fails("first-line-not-canonical", [whole[0].replace(b":", b": ", 1), *whole[1:]], "file.form")
    fails("first-line-of-no-kind", [b'{"a":1}'], "file.form")
    fails("other-version", [whole[0].replace(b'export":1', b'export":2'), *whole[1:]], "file.form")
    fails("member-unknown", [bend(whole[0], extra=1), *whole[1:]], "file.form")
    fails("proof-with-a-second-line", [*proof, b"{}"], "file.form")
    # Leaves.
    fails("leaf-changed", [*whole[:3], bend(whole[3], subject="x"), *whole[4:]], "checkpoint.root")
    fails("leaf-not-canonical", [*whole[:3], whole[3] + b" ", *whole[4:]],
          "leaf.form", "checkpoint.root")  # fmt: skip
    fails("leaf-missing", [*whole[:3], *whole[4:]],
          "checkpoint.root", "checkpoint.size", "leaf.checkpoint", "leaf.place")  # fmt: skip
    fails("leaves-swapped", [*whole[:5], whole[6], whole[5], whole[7]],
          "checkpoint.root", "leaf.place")  # fmt: skip
    fails("last-leaf-missing", whole[:-1], "checkpoint.size", "leaf.place")
    fails("one-leaf-more", [*whole, whole[-1]], "file.form")
    fails("leaf-of-another-broker", [*whole[:3], bend(whole[3], instance="ff" * 16), *whole[4:]],
          "checkpoint.root", "leaf.log")  # fmt: skip
    fails("leaf-of-another-realm", [*whole[:3], bend(whole[3], realm="simulated"), *whole[4:]],
          "checkpoint.root", "leaf.log")  # fmt: skip
    fails("count-of-changes-jumps", [*whole[:4], bend(whole[4], changes=7), *whole[5:]],
          "checkpoint.root", "leaf.changes")  # fmt: skip
    fails("checkpoint-named-too-early", [*whole[:4], bend(whole[4], checkpoint=6), *whole[5:]],
          "checkpoint.root", "leaf.checkpoint")  # fmt: skip
    # Checkpoints.
    forged = note(leaves, 7, key=OTHER_KEY)
    fails("checkpoint-by-another-key", export(leaves, notes=[note(leaves, 3), forged]),
          "checkpoint.signature")  # fmt: skip
    bent = kept.replace(kept.split(b"\n")[2], note(leaves, 3).split(b"\n")[2])
    fails("checkpoint-of-another-root", export(leaves, notes=[bent]), "checkpoint.signature")
    other = note(leaves, 7, origin="cai-kbs/" + "ff" * 16)
    fails("checkpoint-of-another-broker", export(leaves, notes=[other]), "checkpoint.origin")
    unnamed = note(leaves, 7, origin=RESTORED)
    fails("origin-that-no-leaf-names", export(leaves, notes=[unnamed]), "checkpoint.origin")
    fails("no-checkpoint-at-the-end", export(leaves, (3,)), "checkpoint.size")
    fails("checkpoint-unsigned", export(leaves, notes=[kept.split(b"\n\n")[0] + b"\n"]),
          "checkpoint.form", "checkpoint.size")  # fmt: skip
    far = Checkpoint(ORIGIN, 9, merkle.root(hashes_of(leaves)))
    fails("checkpoint-beyond-the-end", export(leaves, notes=[kept, sign_checkpoint(far, KEY)]),
          "checkpoint.size")  # fmt: skip
    tail = export(leaves, start=3)
    fails("frontier-changed",
          [bend(tail[0], frontier=[item.hex() for item in frontier(leaves, 6)]), *tail[1:]],
          "checkpoint.root")  # fmt: skip
    fails("frontier-of-another-size", [bend(tail[0], frontier=[]), *tail[1:]], "file.form")
    # Proofs.
    fails("proof-of-another-leaf", [bend(proof[0], leaf=json.loads(leaves[3]))],
          "leaf.place", "proof.inclusion")  # fmt: skip

    def inner(**members: Any) -> list[bytes]:
        return [edited(proof[0], lambda value: value["proof"].update(members))]

    path = json.loads(proof[0])["proof"]["path"]
    fails("path-too-short", inner(path=path[:-1]), "proof.inclusion")
    fails("path-too-long", inner(path=[*path, "00" * 32]), "proof.inclusion")
    fails("path-changed", inner(path=["00" * 32, *path[1:]]), "proof.inclusion")
    fails("index-moved", inner(index=3), "leaf.place", "proof.inclusion")
    fails("index-outside", inner(index=7), "file.form")
    fails("size-of-another-tree", inner(size=6), "proof.inclusion")
    fails("proof-by-another-key", inner(checkpoint=forged.decode()), "checkpoint.signature")
    steps = json.loads(extension[0])["path"]
    fails("extension-path-changed", [bend(extension[0], path=["00" * 32, *steps[1:]])],
          "proof.consistency")  # fmt: skip
    fails("extension-path-too-short", [bend(extension[0], path=steps[:-1])], "proof.consistency")
    fails("extension-turned-round",
          [consistency_file(kept, note(leaves, 3), [bytes.fromhex(step) for step in steps])],
          "proof.consistency")  # fmt: skip
    rewritten = leaves_of([*entries()[:2], entries()[3], *entries()[2:6], entries()[6]][:7], ())
    other_log = consistency_file(note(leaves, 3), note(rewritten, 7), [])
    fails("history-rewritten", [other_log], "proof.consistency")
    # Held against what was kept.
    fails("rolled-back", export(leaves[:3], (3,)), "checkpoint.held", held=kept)
    fails("rewritten", export(rewritten, (7,)), "checkpoint.held", held=note(leaves, 3))
    fails("kept-checkpoint-forged", whole, "checkpoint.signature", held=forged)
    after, notes = restored()
    fails("restored-unannounced", export(after, notes=notes), "checkpoint.held", held=kept)
    fails("begins-after-the-kept-one", export(leaves, start=5), "checkpoint.held",
          held=note(leaves, 3))  # fmt: skip
    return found


def vectors() -> dict[str, str]:
    """Every file by its name."""
    leaves = leaves_of(entries())
    hashes = hashes_of(leaves)
    after, notes = restored()
    log = {
        "instance": INSTANCE,
        "realm": "production",
        "private_key": bytes(range(32)).hex(),
        "public_key": public(KEY).hex(),
        "verifier_key": verifier_key(ORIGIN, public(KEY)),
        "leaves": [leaf.decode() for leaf in leaves],
        "leaf_hashes": [item.hex() for item in hashes],
        "roots": [merkle.root(hashes[:size]).hex() for size in range(len(leaves) + 1)],
        "frontiers": [
            [item.hex() for item in frontier(leaves, size)] for size in range(len(leaves) + 1)
        ],
        "inclusion": [
            {"index": index, "size": size,
             "path": [step.hex() for step in merkle.inclusion_path(hashes[:size], index)]}
            for size in range(1, len(leaves) + 1) for index in range(size)
        ],
        "consistency": [
            {"old": old, "new": new,
             "path": [step.hex() for step in merkle.consistency_path(hashes[:new], old)]}
            for new in range(1, len(leaves) + 1) for old in range(1, new + 1)
        ],
    }  # fmt: skip

    def text(lines: list[bytes]) -> str:
        return b"".join(line + b"\n" for line in lines).decode()

    return {
        "log.json": json.dumps(log, indent=1, ensure_ascii=False) + "\n",
        "checkpoint-3.txt": note(leaves, 3).decode(),
        "checkpoint-7.txt": note(leaves, 7).decode(),
        "export.jsonl": text(export(leaves)),
        "export-from-3.jsonl": text(export(leaves, start=3)),
        "export-restored.jsonl": text(export(after, notes=notes)),
        "inclusion.jsonl": text(inclusion(leaves, 2, 7)),
        "consistency.jsonl": text(consistency(leaves, 3, 7)),
        "failures.json": json.dumps({"failures": failures()}, indent=1, ensure_ascii=False) + "\n",
    }


if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    for name, contents in vectors().items():
        (HERE / name).write_text(contents, encoding="utf-8")
