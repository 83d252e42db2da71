"""Frames of a `cai/1` session, sans I/O (spec-channel §3).

One side turns values into bytes, the other bytes into values; neither knows of sockets or TLS.

    >>> decoder = FrameDecoder()
    >>> decoder.feed(encode(Frame(FrameType.DATA, 1, b"hello")))
    [Frame(type=<FrameType.DATA: 18>, stream=1, payload=b'hello')]
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from cai.errors import FormatError
from tng.streams import Code

HEADER_SIZE = 8
"""Bytes of a frame header: type u8, length u24, stream u32."""

MAX_DATA = 16 * 1024 - HEADER_SIZE
"""Most payload bytes of a DATA or PAD frame: with its header it is one full TLS record."""

MAX_EVIDENCE = 1024 * 1024
"""Most payload bytes of an EVIDENCE frame."""

MAX_TEXT = 512
"""Most bytes of the text of REFUSE and RESET."""

MAX_CREDIT = 2**31 - 1
"""Most bytes that one CREDIT frame grants."""

MAX_STREAM = 2**32 - 1
"""Highest stream number."""

PAD_BUCKET = 256
"""Bytes to a multiple of which a padded DATA frame is brought."""

NONCE_SIZE = 32
"""Bytes of the nonces in PROVE and ACK."""


class FrameType(IntEnum):
    """Types of frame; PAD is reserved from version 1."""

    PAD = 0x00
    PROVE = 0x01
    ACK = 0x02
    EVIDENCE = 0x03
    READY = 0x04
    REFUSE = 0x05
    GOAWAY = 0x06
    OPEN = 0x10
    OPENED = 0x11
    DATA = 0x12
    FIN = 0x13
    RESET = 0x14
    CREDIT = 0x15

    @property
    def on_stream(self) -> bool:
        """Whether frames of this type belong to a stream; the others carry stream 0."""
        return self >= FrameType.OPEN


_LENGTHS: dict[FrameType, tuple[int, int]] = {
    FrameType.PAD: (0, MAX_DATA),
    FrameType.PROVE: (NONCE_SIZE + 4, NONCE_SIZE + 4),
    FrameType.ACK: (NONCE_SIZE, NONCE_SIZE),
    FrameType.EVIDENCE: (1, MAX_EVIDENCE),
    FrameType.READY: (0, 0),
    FrameType.REFUSE: (2, 2 + MAX_TEXT),
    FrameType.GOAWAY: (0, 0),
    FrameType.OPEN: (0, 0),
    FrameType.OPENED: (0, 0),
    FrameType.DATA: (1, MAX_DATA),
    FrameType.FIN: (0, 0),
    FrameType.RESET: (2, 2 + MAX_TEXT),
    FrameType.CREDIT: (4, 4),
}
"""Least and most payload bytes of each type."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame.

    Attributes:
        type: what it is.
        stream: 0 for the session itself, else the stream's number.
        payload: its bytes, by type as in spec-channel §3.
    """

    type: FrameType
    stream: int = 0
    payload: bytes = b""


def encode(frame: Frame) -> bytes:
    """The bytes of a frame.

    Raises:
        FormatError: the frame breaks the table of spec-channel §3; a fault of the caller.
    """
    _demand_shape(frame.type, len(frame.payload), frame.stream)
    return (
        frame.type.to_bytes(1, "big")
        + len(frame.payload).to_bytes(3, "big")
        + frame.stream.to_bytes(4, "big")
        + frame.payload
    )


def padding_for(size: int) -> bytes:
    """The PAD frame that brings ``size`` bytes of frame to a multiple of ``PAD_BUCKET``.

    A full-size frame gets none; where fewer bytes than a header are missing, a bucket more is used.
    """
    if size >= MAX_DATA + HEADER_SIZE:
        return b""
    missing = -size % PAD_BUCKET
    if missing == 0:
        return b""
    if missing < HEADER_SIZE:
        missing += PAD_BUCKET
    return encode(Frame(FrameType.PAD, 0, bytes(missing - HEADER_SIZE)))


def reason(code: Code, text: str) -> bytes:
    """Payload of REFUSE and RESET; the text is cut to ``MAX_TEXT`` bytes of whole characters."""
    cut = text.encode("utf-8", "replace")[:MAX_TEXT].decode("utf-8", "ignore")
    return code.to_bytes(2, "big") + cut.encode("utf-8")


def parse_reason(payload: bytes) -> tuple[Code, str]:
    """Code and text of REFUSE and RESET; an unknown code counts as a protocol error.

    Raises:
        FormatError: the text is not UTF-8, or the payload is shorter than a code.
    """
    if len(payload) < 2:
        raise FormatError("reason without a code")
    try:
        text = payload[2:].decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError("reason is not UTF-8") from error
    number = int.from_bytes(payload[:2], "big")
    code = Code(number) if number in Code._value2member_map_ else Code.PROTOCOL
    # A peer's words end up on a terminal: nothing but printable characters passes.
    return code, "".join(char if char.isprintable() else " " for char in text)


def credit(amount: int) -> bytes:
    """Payload of CREDIT."""
    return amount.to_bytes(4, "big")


def parse_credit(payload: bytes) -> int:
    """Bytes that a CREDIT frame grants.

    Raises:
        FormatError: none, or more than ``MAX_CREDIT``.
    """
    amount = int.from_bytes(payload, "big")
    if len(payload) != 4 or not 1 <= amount <= MAX_CREDIT:
        raise FormatError("credit out of range")
    return amount


class FrameDecoder:
    """Cuts a byte stream into frames; holds at most one incomplete frame."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Frame]:
        """Take bytes, return the frames that they complete; PAD frames are dropped.

        Raises:
            FormatError: a frame breaks the table of spec-channel §3. The session must end then.
        """
        # Mostly nothing is held, and then nothing is copied but the payloads.
        held = bool(self._buffer)
        if held:
            self._buffer += data
        buffer: bytes | bytearray = self._buffer if held else data
        frames: list[Frame] = []
        offset = 0
        while len(buffer) - offset >= HEADER_SIZE:
            kind = _frame_type(buffer[offset])
            length = int.from_bytes(buffer[offset + 1 : offset + 4], "big")
            stream = int.from_bytes(buffer[offset + 4 : offset + 8], "big")
            # Before the payload is waited for, so that no header can announce a huge one.
            _demand_shape(kind, length, stream)
            end = offset + HEADER_SIZE + length
            if len(buffer) < end:
                break
            payload = bytes(buffer[offset + HEADER_SIZE : end])
            offset = end
            if kind is FrameType.PAD:
                if payload.strip(b"\x00"):
                    raise FormatError("PAD frame with bytes that are not zero")
                continue
            frames.append(Frame(kind, stream, payload))
        if held:
            del self._buffer[:offset]
        elif offset < len(data):
            self._buffer += data[offset:]
        return frames

    @property
    def incomplete(self) -> bool:
        """Whether bytes of an unfinished frame are held."""
        return bool(self._buffer)


def _frame_type(number: int) -> FrameType:
    if number not in FrameType._value2member_map_:
        raise FormatError(f"unknown frame type {number:#04x}")
    return FrameType(number)


def _demand_shape(kind: FrameType, length: int, stream: int) -> None:
    least, most = _LENGTHS[kind]
    if not least <= length <= most:
        raise FormatError(f"{kind.name} frame of {length} bytes, expected {least} to {most}")
    if kind.on_stream != (1 <= stream <= MAX_STREAM):
        raise FormatError(f"{kind.name} frame on stream {stream}")
