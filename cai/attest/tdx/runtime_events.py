"""The two runtime events that measure what a guest was launched to do (decisions §1.2).

Before anything is served, RTMR3 is extended once with ``cai launch <SHA-384 of launch.json>`` and
then with ``cai ready``. The events have the shape of the attestation agent's event log: a tagged
event ``id u32 LE = 0x4141454C ‖ size u32 LE ‖ text``, whose SHA-384 extends the register.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from hashlib import sha384

AAEL_TAG = 0x4141454C
"""Tag id of the attestation agent's events; its little-endian bytes read ``LEAA``."""


def tagged_event(text: str) -> bytes:
    """The bytes of one agent event; their SHA-384 is its digest."""
    content = text.encode("utf-8")
    return struct.pack("<II", AAEL_TAG, len(content)) + content


def launch_events(launch: bytes) -> tuple[bytes, bytes]:
    """The launch event over the exact bytes of ``launch.json``, and the ready event."""
    return tagged_event(f"cai launch {sha384(launch).hexdigest()}"), tagged_event("cai ready")


def replay(events: Iterable[bytes], start: bytes = bytes(48)) -> bytes:
    """The register after extending it with each event (TDX: ``SHA-384(register ‖ digest)``)."""
    register = start
    for event in events:
        register = sha384(register + sha384(event).digest()).digest()
    return register
