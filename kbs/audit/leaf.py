"""What one decision leaves behind: the canonical bytes of an audit leaf. Pure.

The bytes are in docs/spec-audit.md §3. They are the leaves of a Merkle log (RFC 6962), so they are
RFC 8785 JSON from the first one on, hold no secret, and are never rewritten.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from cai import jcs
from cai.attest.verdict import Verdict
from cai.errors import FormatError

LEAF_VERSION: Final = 1
"""Member ``cai-audit`` of every leaf."""

MAX_LEAF = 1024 * 1024
"""Largest leaf that is read back, bytes."""

TEXT_LIMIT = 512
"""Longest text from outside that a leaf repeats, characters."""

ORIGIN_ACTION: Final = "audit.origin"
"""Action of the leaf after a restore: checkpoints of more leaves name ``details.origin``."""

_TIME = "%Y-%m-%dT%H:%M:%S."


@dataclass(frozen=True, slots=True)
class Change:
    """What a decision made of a stored object.

    Attributes:
        object: ``<table>/<path>``.
        version: the version that is now the newest.
        row_hash: SHA-256 of the stored row, hex; empty when there is none any more.
    """

    object: str
    version: int
    row_hash: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One decision, before it has its place in the log.

    Attributes:
        action: ``attest``, ``release``, ``resource.set``, ``policy.set``, ….
        actor: who asked: ``{"kind": "guest", "session": …}`` or ``{"kind": "admin", "name": …}``.
        request: id of the request, as the answer names it.
        allowed: the decision.
        reason: one line when it was refused.
        subject: the resource or policy that was asked for.
        verdict: every check behind it.
        evidence: digests of the evidence, hex.
        policies: policy id (as its row is named) to the hash of the text in force, hex.
        change: what was stored; ``None`` when nothing was.
        served: version of the resource that was handed out.
        details: further members for one action, e.g. counts.
        administrative: whether this changes what later decisions depend on, so that decisions
            prepared before it are prepared again; ``None``: when ``change`` is given.
    """

    action: str
    actor: Mapping[str, str]
    request: str
    allowed: bool
    reason: str = ""
    subject: str = ""
    verdict: Verdict | None = None
    evidence: Mapping[str, str] = field(default_factory=dict)
    policies: Mapping[str, str] = field(default_factory=dict)
    change: Change | None = None
    served: int | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    administrative: bool | None = None

    @property
    def counts(self) -> bool:
        """Whether it moves the counter of administrative changes on."""
        return self.change is not None if self.administrative is None else self.administrative

    def encode(
        self, *, instance: str, realm: str, seq: int, changes: int, checkpoint: int, at: datetime
    ) -> bytes:
        """The leaf's canonical bytes (spec-audit §3).

        Args:
            instance: id of the database.
            realm: its realm.
            seq: place in the log, from 0.
            changes: administrative changes in the log, this one included.
            checkpoint: leaves of the newest checkpoint; so that none can disappear unseen.
            at: the broker's time.
        """
        value: dict[str, Any] = {
            "cai-audit": LEAF_VERSION,
            "instance": instance,
            "realm": realm,
            "seq": seq,
            "changes": changes,
            "checkpoint": checkpoint,
            "time": encode_time(at),
            "action": self.action,
            "actor": {name: plain(text) for name, text in self.actor.items()},
            "request": self.request,
            "decision": "allow" if self.allowed else "deny",
            "reason": plain(self.reason),
            "subject": plain(self.subject),
            "evidence": dict(self.evidence),
            "policies": dict(self.policies),
            "checks": [],
            "hardware": {},
            "simulated": False,
            "unsafe": [],
        }
        if self.verdict is not None:
            body = self.verdict.to_json()
            for member in ("hardware", "simulated", "unsafe"):
                value[member] = body[member]
            value["checks"] = [
                {name: plain(str(text)) for name, text in item.to_json().items()}
                for item in self.verdict.checks
            ]
        if self.change is not None:
            value["change"] = {
                "object": self.change.object,
                "version": self.change.version,
                "row_hash": self.change.row_hash,
            }
        if self.served is not None:
            value["served"] = self.served
        if self.details:
            value["details"] = dict(self.details)
        return jcs.canonical(value)


def parse_leaf(leaf: bytes) -> dict[str, Any]:
    """The members of a leaf.

    Raises:
        FormatError, LimitExceeded: not a canonical leaf of this version.
    """
    value = jcs.parse_canonical(leaf, what="audit leaf", limit=MAX_LEAF)
    if not isinstance(value, dict) or value.get("cai-audit") != LEAF_VERSION:
        raise FormatError(f"audit leaf: not an object of version {LEAF_VERSION}")
    return value


def change_of(leaf: Mapping[str, Any]) -> Change | None:
    """What a parsed leaf changed.

    Raises:
        FormatError: the member has another form.
    """
    change = leaf.get("change")
    if change is None:
        return None
    if not isinstance(change, dict) or set(change) != {"object", "version", "row_hash"}:
        raise FormatError("audit leaf: change has other members")
    name, version, row_hash = change["object"], change["version"], change["row_hash"]
    if not (isinstance(name, str) and type(version) is int and isinstance(row_hash, str)):
        raise FormatError("audit leaf: change has members of other kinds")
    return Change(name, version, row_hash)


def encode_time(at: datetime) -> str:
    """UTC with milliseconds, e.g. ``2026-11-20T14:19:41.618Z``."""
    moment = at.astimezone(UTC)
    return moment.strftime(_TIME) + f"{moment.microsecond // 1000:03d}Z"


def time_of(leaf: Mapping[str, Any]) -> datetime:
    """When a parsed leaf was written.

    Raises:
        FormatError: the member has another form.
    """
    text = leaf.get("time")
    try:
        moment = datetime.strptime(str(text), _TIME + "%fZ").replace(tzinfo=UTC)
    except ValueError as error:
        raise FormatError("audit leaf: time has another form") from error
    if encode_time(moment) != text:
        raise FormatError("audit leaf: time has another form")
    return moment


def plain(text: str) -> str:
    """Text from outside, made safe to keep: bounded, printable, no lone surrogate."""
    shown = "".join(char if char.isprintable() else "�" for char in text[:TEXT_LIMIT])
    return shown.encode("utf-8", "replace").decode("utf-8")
