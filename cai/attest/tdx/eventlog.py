"""Event logs: what a guest says was measured, replayed against its registers (spec-evidence §3.4).

Two forms are read: the firmware's CCEL area (TCG crypto-agile records), to which a guest appends
its runtime events, and the JSON list of dstack guests. A log proves nothing by itself. If it
replays to all four registers of a verified quote, its *digests* are authentic; the data beside a
digest are so only where the digest can be recomputed from them.

Parsing is total: whatever the bytes, the answer is a log or an error of ``cai.errors``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha384
from types import MappingProxyType
from typing import Any

from cai import jcs
from cai.attest.tdx.runtime_events import AAEL_TAG
from cai.errors import FormatError, LimitExceeded

MAX_EVENT_LOG = 1024 * 1024
"""Largest log that is parsed, bytes, padding included."""

MAX_EVENTS = 10_000
"""Most events in one log."""

MAX_ALGORITHMS = 8
"""Most digest algorithms that a log may announce."""

SHA384 = 0x000C
DIGEST_SIZES = {0x0004: 20, 0x000B: 32, SHA384: 48, 0x000D: 64, 0x0012: 32}
"""Digest algorithms by TCG number, with their sizes in bytes: SHA-1, SHA-2, SM3."""

REGISTERS = 4
"""RTMR0 to RTMR3; a record names them 1 to 4, and 0 is MRTD, which no event extends."""

REGISTER_SIZE = 48

EV_NO_ACTION = 3
EV_EVENT_TAG = 6
DSTACK_EVENT = 0x08000001
"""Event types that this module reads itself."""

STOP_SIZE = 8
FILLERS = (0x00, 0xFF)
"""A record that would begin with eight equal bytes of these ends the log; only they may follow."""

_SPEC_ID = b"Spec ID Event03\x00"
_LAUNCH = "cai launch "
_READY = "cai ready"
_DIGEST_HEX = 2 * REGISTER_SIZE


@dataclass(frozen=True, slots=True)
class Event:
    """One record.

    Attributes:
        register: 1 to 4 for RTMR0 to RTMR3; 0 only without effect.
        kind: event type by TCG number.
        digests: by algorithm number; SHA-384 is always there.
        data: event data.
        name: of a dstack event; otherwise empty.
    """

    register: int
    kind: int
    digests: Mapping[int, bytes]
    data: bytes
    name: str = ""

    @property
    def digest(self) -> bytes:
        """The SHA-384 digest, which extends the register."""
        return self.digests[SHA384]

    @property
    def covered(self) -> bool:
        """Whether the digest is of these very data, so that a replay authenticates them."""
        if self.kind == DSTACK_EVENT:
            prefix = self.kind.to_bytes(4, "little") + b":" + self.name.encode("utf-8") + b":"
            return sha384(prefix + self.data).digest() == self.digest
        return sha384(self.data).digest() == self.digest


@dataclass(frozen=True, slots=True)
class EventLog:
    """A parsed log: its events in order, the header not among them."""

    events: tuple[Event, ...]

    def replay(self) -> tuple[bytes, ...]:
        """The four registers after extending them with every event but EV_NO_ACTION."""
        registers = [bytes(REGISTER_SIZE)] * REGISTERS
        for event in self.events:
            if event.kind != EV_NO_ACTION:
                place = event.register - 1
                registers[place] = sha384(registers[place] + event.digest).digest()
        return tuple(registers)

    def runtime_events(self) -> tuple[str, ...]:
        """What extended RTMR3, in order.

        Returns:
            The text of each runtime event that its digest covers; ``sha384:<digest>`` for any
            other, of which only the digest is known.
        """
        return tuple(
            tagged_text(event) or f"sha384:{event.digest.hex()}"
            for event in self.events
            if event.register == REGISTERS and event.kind != EV_NO_ACTION
        )


def tagged_text(event: Event) -> str | None:
    """The text of an agent's runtime event, if the digest covers it.

    The data are ``id u32 LE ‖ size u32 LE ‖ text`` and nothing else.
    """
    data = event.data
    if event.kind != EV_EVENT_TAG or not event.covered or len(data) < 8:
        return None
    tag, size = (int.from_bytes(data[at : at + 4], "little") for at in (0, 4))
    if tag != AAEL_TAG or size != len(data) - 8:
        return None
    try:
        return data[8:].decode("utf-8")
    except UnicodeDecodeError:
        return None


def launched(runtime_events: Iterable[str]) -> str | None:
    """The launch digest, if these are exactly one launch event and then one ready event.

    Returns:
        96 hex digits, or ``None`` when anything else extended the register (decisions §1.2).
    """
    events = tuple(runtime_events)
    if len(events) != 2 or events[1] != _READY or not events[0].startswith(_LAUNCH):
        return None
    digest = events[0].removeprefix(_LAUNCH)
    well_formed = len(digest) == _DIGEST_HEX and set(digest) <= set("0123456789abcdef")
    return digest if well_formed else None


def parse_event_log(data: bytes) -> EventLog:
    """Parse a log of either form.

    Raises:
        LimitExceeded: above one of this module's limits.
        FormatError: it is not a log, or one without SHA-384 digests.
    """
    if len(data) > MAX_EVENT_LOG:
        raise LimitExceeded(f"event log: {len(data)} bytes, at most {MAX_EVENT_LOG} are accepted")
    return _parse_dstack(data) if data[:1] == b"[" else _parse_ccel(data)


class _Reader:
    """Takes bytes off the front; running out is a ``FormatError`` that names the part."""

    def __init__(self, data: bytes) -> None:
        self._data, self._position = data, 0

    def take(self, size: int, part: str) -> bytes:
        end = self._position + size
        if end > len(self._data):
            raise FormatError(f"event log: ends inside {part}")
        taken = self._data[self._position : end]
        self._position = end
        return taken

    def integer(self, size: int, part: str) -> int:
        return int.from_bytes(self.take(size, part), "little")

    def at_end(self) -> bool:
        """Whether only filler is left.

        Raises:
            FormatError: the log stops here, but something else follows.
        """
        rest = self._data[self._position : self._position + STOP_SIZE]
        if not rest:
            return True
        if rest[0] not in FILLERS or len(set(rest)) != 1:
            return False
        if self._data[self._position :].strip(rest[:1]):
            raise FormatError("event log: something follows its end")
        return True


def _parse_ccel(data: bytes) -> EventLog:
    reader = _Reader(data)
    algorithms = _header(reader)
    events: list[Event] = []
    while not reader.at_end():
        if len(events) == MAX_EVENTS:
            raise LimitExceeded(f"event log: more than {MAX_EVENTS} events")
        register = reader.integer(4, "register")
        kind = reader.integer(4, "event type")
        _check_register(register, kind)
        digests = _digests(reader, algorithms)
        size = reader.integer(4, "event size")
        events.append(Event(register, kind, digests, reader.take(size, "event data")))
    return EventLog(tuple(events))


def _header(reader: _Reader) -> dict[int, int]:
    """The first record, of the old layout, which announces the digest algorithms."""
    register = reader.integer(4, "header register")
    if reader.integer(4, "header type") != EV_NO_ACTION or register > 1:
        raise FormatError("event log: does not begin with a specification record")
    if any(reader.take(20, "header digest")):
        raise FormatError("event log: the specification record has a digest")
    body = _Reader(reader.take(reader.integer(4, "header size"), "header data"))
    if body.take(16, "specification") != _SPEC_ID:
        raise FormatError("event log: not of the crypto-agile form")
    # Platform class, minor and major version, errata (0x69 was seen), size of a UINTN.
    if body.take(8, "specification version")[4:6] != b"\x00\x02":
        raise FormatError("event log: specification version is not 2.0")
    count = body.integer(4, "algorithm count")
    if not 1 <= count <= MAX_ALGORITHMS:
        raise LimitExceeded(f"event log: {count} digest algorithms")
    algorithms: dict[int, int] = {}
    for _ in range(count):
        name, size = body.integer(2, "algorithm"), body.integer(2, "digest size")
        if name in algorithms or DIGEST_SIZES.get(name) != size:
            raise FormatError(f"event log: digest algorithm {name:#06x} of {size} bytes")
        algorithms[name] = size
    body.take(body.integer(1, "vendor size"), "vendor data")
    if not body.at_end():
        raise FormatError("event log: the specification record is too long")
    if SHA384 not in algorithms:
        raise FormatError("event log: no SHA-384 digests, so it is not of a TDX guest")
    return algorithms


def _digests(reader: _Reader, algorithms: Mapping[int, int]) -> Mapping[int, bytes]:
    count = reader.integer(4, "digest count")
    if not 1 <= count <= len(algorithms):
        raise FormatError(f"event log: {count} digests in a record")
    digests: dict[int, bytes] = {}
    for _ in range(count):
        name = reader.integer(2, "digest algorithm")
        if name not in algorithms or name in digests:
            raise FormatError(f"event log: digest algorithm {name:#06x} is twice or not announced")
        digests[name] = reader.take(algorithms[name], "digest")
    if SHA384 not in digests:
        raise FormatError("event log: a record without SHA-384")
    return MappingProxyType(digests)


def _check_register(register: int, kind: int) -> None:
    if register > REGISTERS or (register == 0 and kind != EV_NO_ACTION):
        raise FormatError(f"event log: a record of type {kind:#x} names register {register}")


def _parse_dstack(data: bytes) -> EventLog:
    items = jcs.parse(data, what="event log", limit=MAX_EVENT_LOG)
    if not isinstance(items, list):
        raise FormatError("event log: not a list")
    if len(items) > MAX_EVENTS:
        raise LimitExceeded(f"event log: more than {MAX_EVENTS} events")
    return EventLog(tuple(_dstack_event(item) for item in items))


def _dstack_event(item: Any) -> Event:
    if not isinstance(item, dict):
        raise FormatError("event log: an event is not an object")
    imr, kind = item.get("imr"), item.get("event_type")
    if type(imr) is not int or type(kind) is not int or not 0 <= imr < REGISTERS:
        raise FormatError("event log: an event without register or type")
    if not 0 <= kind < 2**32:
        raise FormatError("event log: an event type is out of range")
    name = item.get("event", "")
    if not isinstance(name, str):
        raise FormatError("event log: an event's name is not a string")
    digest = _hex(item.get("digest"), "digest")
    if len(digest) != REGISTER_SIZE:
        raise FormatError("event log: a digest is not of SHA-384")
    payload = _hex(item.get("event_payload", ""), "payload")
    return Event(imr + 1, kind, MappingProxyType({SHA384: digest}), payload, name)


def _hex(value: Any, part: str) -> bytes:
    if not isinstance(value, str) or len(value) % 2 or not set(value) <= set("0123456789abcdef"):
        raise FormatError(f"event log: {part} is not lower-case hex")
    return bytes.fromhex(value)
