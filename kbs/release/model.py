"""What the broker reads of a resource that is an owner's release record (decisions §3.1).

The record is opaque to a stock broker. Ours looks at the members that revocation, leases and
tickets name, and leaves its signature to the guest, which knows the owner's key from its launch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

from cai import jcs
from cai.errors import InputError

MAX_RECORD = 64 * 1024
"""Largest record that is looked into, bytes."""

MARK: Final = "cai-key"
"""The member that makes canonical JSON a release record."""

_HASH: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a resource says about the model that it opens; empty where it says nothing.

    Attributes:
        model_id: the model line, 64 hex digits.
        root: its ``model_root``, 64 hex digits.
        owner_key: the owner's Ed25519 key, 64 hex digits.
        ttl_s: lifetime of a lease, seconds; ``None`` when the resource does not say.
        drain_s: time for running requests after it, seconds; ``None`` likewise.
    """

    model_id: str = ""
    root: str = ""
    owner_key: str = ""
    ttl_s: int | None = None
    drain_s: int | None = None


def model_facts(contents: bytes) -> ModelFacts:
    """The facts of a resource; of one that is no record, none."""
    try:
        value = jcs.parse_canonical(contents, what="record", limit=MAX_RECORD)
    except InputError:
        return ModelFacts()
    if not isinstance(value, dict) or MARK not in value:
        return ModelFacts()
    lease = value.get("lease")
    times = lease if isinstance(lease, dict) else {}
    return ModelFacts(
        _hash(value.get("model_id")), _hash(value.get("manifest_root")),
        _hash(value.get("owner_key")), _seconds(times.get("ttl_s")),
        _seconds(times.get("drain_s")),
    )  # fmt: skip


def _hash(value: Any) -> str:
    return value if isinstance(value, str) and _HASH.fullmatch(value) else ""


def _seconds(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None
