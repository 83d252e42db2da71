"""What the verbs of ``kbs audit`` ask the admin listener for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cai import jcs
from cai.attest.checkpoint import (
    CheckpointProof,
    hashes,
    note_member,
    read_checkpoint,
    verifier_key,
)
from cai.attest.verdict import Check, Outcome, Verdict, check
from cai.errors import CaiError, FormatError, InputMissing
from kbs.audit.log import MAX_ROWS
from kbs.audit.proof import consistency_file, export_header, inclusion_file, verify_file
from kbs.audit.report import CHECKPOINT_HELD
from kbs.cli.admin_call import member

if TYPE_CHECKING:
    from kbs.admin.client import AdminClient


@dataclass(frozen=True, slots=True)
class Log:
    """The broker's log as it says it is.

    Attributes:
        note: its newest checkpoint.
        keys: public keys of its checkpoints, hex.
        instance: id of the broker.
    """

    note: bytes
    keys: tuple[str, ...]
    instance: str


def log_of(client: AdminClient) -> Log:
    """The broker's newest checkpoint and its keys."""
    answer = client.get("audit/checkpoint")
    keys = tuple(str(key) for key in member(answer, "keys", list))
    hashes(list(keys), what="admin answer: keys")
    return Log(note_member(answer), keys, member(answer, "instance", str))


def verifier_keys(log: Log) -> list[str]:
    """The keys as C2SP tools take them."""
    origin = read_checkpoint(log.note).origin
    return [verifier_key(origin, bytes.fromhex(key)) for key in log.keys]


def consistency_lines(client: AdminClient, old: bytes, new: bytes) -> list[bytes]:
    """The lines of a proof that ``new`` extends ``old``."""
    sizes = read_checkpoint(old).size, read_checkpoint(new).size
    if sizes[0] > sizes[1]:
        # No proof can exist; the file says the two checkpoints, and verification says why.
        return [consistency_file(old, new, ())]
    answer = client.get(f"audit/consistency?old={sizes[0]}&new={sizes[1]}")
    path = hashes(answer.get("path"), what="admin answer: path")
    return [consistency_file(old, new, path)]


def inclusion_lines(client: AdminClient, seq: int) -> list[bytes]:
    """The lines of a proof that leaf ``seq`` is in the log."""
    answer = client.get(f"audit/proof?seq={seq}")
    proof = CheckpointProof.from_json(answer.get("proof"))
    return [inclusion_file(member(answer, "leaf", dict), proof)]


def export_lines(client: AdminClient, log: Log, start: int) -> tuple[int, Iterator[bytes]]:
    """An export from ``start`` to the newest checkpoint: its size, and its lines."""
    size = read_checkpoint(log.note).size
    if start >= size:
        raise InputMissing(f"nothing from leaf {start}: the newest checkpoint has {size} leaves")
    before = client.get(f"audit/frontier?size={start}")
    header = export_header(
        instance=log.instance,
        start=start,
        size=size,
        frontier=hashes(before.get("frontier"), what="admin answer: frontier"),
        origin=member(before, "origin", str),
        checkpoints=_notes(client, start, size),
    )
    return size, _export(client, header, start, size)


def verify_broker(
    client: AdminClient, keys: Sequence[bytes], held: bytes | None, *, opening: bool
) -> Verdict:
    """Let the broker walk its log and rows; with ``keys``, also hold it to what was kept."""
    answer = client.post(f"audit/verify?open={'true' if opening else 'false'}", held or b"")
    verdict = _verdict(answer)
    if not keys:
        return verdict
    log = log_of(client)
    own = verify_file(_proof(client, held or log.note, log.note), keys)
    # The broker's own checks are its word; these are what the key shows.
    shown = tuple(
        Check(f"key.{item.name}", item.outcome, item.observed, item.expected, item.reason)
        for item in own.checks
    )
    return verdict.extended(shown)


def _proof(client: AdminClient, old: bytes, new: bytes) -> list[bytes]:
    try:
        return consistency_lines(client, old, new)
    except CaiError:
        # The broker has none to give: an empty one, which does not verify.
        return [consistency_file(old, new, ())]


def _notes(client: AdminClient, start: int, size: int) -> list[bytes]:
    notes: list[bytes] = []
    while start < size:
        found = member(client.get(f"audit/checkpoints?from={start}"), "checkpoints", list)
        page = [note_member({"checkpoint": note}) for note in found]
        if not page:
            break
        notes += [note for note in page if read_checkpoint(note).size <= size]
        start = read_checkpoint(page[-1]).size
    return notes


def _export(client: AdminClient, header: bytes, start: int, size: int) -> Iterator[bytes]:
    yield header
    while start < size:
        answer = client.get(f"audit?from={start}&limit={min(MAX_ROWS, size - start)}")
        rows = member(answer, "rows", list)
        if not rows:
            raise FormatError(f"admin answer: the log ends at leaf {start}, its checkpoint later")
        # A canonical leaf is its own value written canonically.
        yield from (jcs.canonical(row) for row in rows)
        start += len(rows)


def _verdict(answer: dict[str, Any]) -> Verdict:
    checks: list[Check] = []
    for item in member(answer, "checks", list):
        if not isinstance(item, dict) or item.get("outcome") not in set(Outcome):
            raise FormatError("admin answer: a check has another form")
        members = ("observed", "expected", "reason")
        texts = {name: str(item[name]) for name in members if name in item}
        checks.append(Check(str(item.get("name")), Outcome(item["outcome"]), **texts))
    if not checks:
        checks.append(check(CHECKPOINT_HELD, passed=False, reason="the broker checked nothing"))
    return Verdict(
        subject=member(answer, "subject", str), checks=tuple(checks),
        simulated=answer.get("simulated") is True,
    )  # fmt: skip
