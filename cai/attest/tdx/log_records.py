"""Records of an event log as a guest writes them, and where a firmware's log ends.

TCG crypto-agile form (evidence.md §4.2). Verifiers read logs with ``cai.attest.tdx.eventlog``.
"""

from __future__ import annotations

import struct
from hashlib import sha384

from cai.errors import FormatError

RUNTIME_REGISTER = 4
"""CC measurement register index of RTMR3."""

EVENT_TAG = 6
"""TCG event type EV_EVENT_TAG, which the agent's events have."""

ALGORITHM_SHA384 = 0x000C
STOP = b"\xff" * 8
"""What ends an event log that is not padded."""


def runtime_record(event: bytes) -> bytes:
    """One runtime event as the log carries it: TCG crypto-agile form, RTMR3, SHA-384.

    Args:
        event: the tagged event (``cai.attest.tdx.runtime_events.tagged_event``).
    """
    return event_record(RUNTIME_REGISTER, EVENT_TAG, event, sha384(event).digest())


def event_record(register: int, kind: int, data: bytes, digest: bytes) -> bytes:
    """One record of an event log with a SHA-384 digest (evidence.md §4.2).

    Args:
        register: CC measurement register index, 1 to 4 for RTMR0 to RTMR3.
        kind: TCG event type.
        data: the event data.
        digest: what the register was extended with, 48 bytes.
    """
    head = struct.pack("<IIIH", register, kind, 1, ALGORITHM_SHA384)
    return head + digest + struct.pack("<I", len(data)) + data


def boot_log_end(area: bytes) -> int:
    """Where the records of a log area end and its padding begins.

    Walks the records without judging them; the verifier's parser does that.

    Raises:
        FormatError: a record goes beyond the area.
    """
    size = _field(area, 28)
    position = 32 + size
    sizes = _digest_sizes(area[32:position])
    while position + 8 <= len(area):
        if area[position : position + 8] in (STOP, bytes(8)):
            return position
        count = _field(area, position + 8)
        position += 12
        for _place in range(count):
            algorithm = int.from_bytes(area[position : position + 2], "little")
            if algorithm not in sizes or position + 2 > len(area):
                raise FormatError("event log: a digest of an algorithm that was not announced")
            position += 2 + sizes[algorithm]
        position += 4 + _field(area, position)
        if position > len(area):
            raise FormatError("event log: a record goes beyond the log area")
    return position


def _digest_sizes(specification: bytes) -> dict[int, int]:
    """Algorithm id to digest size, from the data of the first record."""
    count = _field(specification, 24)
    if 28 + 4 * count > len(specification):
        raise FormatError("event log: the first record is cut short")
    pairs = struct.iter_unpack("<HH", specification[28 : 28 + 4 * count])
    return dict(pairs)


def _field(data: bytes, position: int) -> int:
    part = data[position : position + 4]
    if len(part) != 4:
        raise FormatError("event log: ends inside a record")
    return int.from_bytes(part, "little")
