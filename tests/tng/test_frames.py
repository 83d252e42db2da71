"""The frame codec: known answers, any cut of the bytes, and every way to break the table."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cai.errors import FormatError
from tng.channel.frames import (
    HEADER_SIZE,
    MAX_DATA,
    MAX_EVIDENCE,
    MAX_STREAM,
    MAX_TEXT,
    PAD_BUCKET,
    Frame,
    FrameDecoder,
    FrameType,
    credit,
    encode,
    padding_for,
    parse_credit,
    parse_reason,
    reason,
)
from tng.streams import Code

frames = st.one_of(
    st.builds(
        Frame,
        st.just(FrameType.DATA),
        st.integers(1, MAX_STREAM),
        st.binary(min_size=1, max_size=600),
    ),
    st.builds(
        Frame,
        st.sampled_from([FrameType.OPEN, FrameType.OPENED, FrameType.FIN]),
        st.integers(1, MAX_STREAM),
        st.just(b""),
    ),
    st.builds(Frame, st.just(FrameType.READY), st.just(0), st.just(b"")),
    st.builds(
        Frame, st.just(FrameType.PROVE), st.just(0), st.binary(min_size=36, max_size=36)
    ),
    st.builds(
        Frame, st.just(FrameType.RESET), st.integers(1, MAX_STREAM), st.just(b"\x00\x05no")
    ),
)


def test_known_answers() -> None:
    """docs/spec-channel.md §11."""
    data = encode(Frame(FrameType.DATA, 1, b"hello"))
    assert data.hex() == "12000005" "00000001" "68656c6c6f"
    pad = padding_for(len(data))
    assert pad[:8].hex() == "000000eb" "00000000"
    assert len(data + pad) == 256
    assert not any(pad[8:])
    reset = encode(Frame(FrameType.RESET, 3, reason(Code.UPSTREAM, "no")))
    assert reset.hex() == "14000004" "00000003" "0005" "6e6f"


@given(st.lists(frames, max_size=8), st.data(), st.booleans())
def test_any_cut_of_the_bytes_gives_the_same_frames(
    sent: list[Frame], data: st.DataObject, padded: bool
) -> None:
    wire = b""
    for frame in sent:
        wire += encode(frame)
        if padded:
            wire += padding_for(len(wire))
    decoder = FrameDecoder()
    received: list[Frame] = []
    while wire:
        cut = data.draw(st.integers(1, len(wire)))
        received += decoder.feed(wire[:cut])
        wire = wire[cut:]
    assert received == sent
    assert not decoder.incomplete


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_but_a_format_error(data: bytes) -> None:
    decoder = FrameDecoder()
    try:
        decoder.feed(data)
    except FormatError:
        return


@given(st.integers(1, MAX_DATA))
def test_padding_brings_a_data_frame_to_its_bucket(length: int) -> None:
    size = HEADER_SIZE + length
    padded = size + len(padding_for(size))
    assert padded == MAX_DATA + HEADER_SIZE or padded % PAD_BUCKET == 0
    assert padded - size < PAD_BUCKET + HEADER_SIZE


@pytest.mark.parametrize(
    "wire",
    [
        "07000000 00000000",  # unknown type
        "ff000000 00000000",
        "12000000 00000001",  # empty DATA
        "12000005 00000000",  # DATA on the session itself
        "10000000 00000000",  # OPEN of stream 0
        "10000001 00000001",  # OPEN with a payload
        "04000000 00000001",  # READY on a stream
        "01000023 00000000",  # PROVE too short
        "02000021 00000000",  # ACK too long
        "15000003 00000001",  # CREDIT too short
        "05000001 00000000",  # REFUSE without a code
        "00000001 00000000 01",  # PAD that is not zero
        "00000000 00000001",  # PAD on a stream
    ],
)
def test_a_frame_that_breaks_the_table_is_refused(wire: str) -> None:
    with pytest.raises(FormatError):
        FrameDecoder().feed(bytes.fromhex(wire))


@pytest.mark.parametrize(
    ("kind", "most"),
    [
        (FrameType.DATA, MAX_DATA),
        (FrameType.PAD, MAX_DATA),
        (FrameType.EVIDENCE, MAX_EVIDENCE),
        (FrameType.RESET, MAX_TEXT + 2),
    ],
)
def test_a_length_beyond_the_limit_is_refused_by_its_header_alone(
    kind: FrameType, most: int
) -> None:
    stream = 1 if kind.on_stream else 0
    header = bytes([kind]) + (most + 1).to_bytes(3, "big") + stream.to_bytes(4, "big")
    with pytest.raises(FormatError):
        FrameDecoder().feed(header)


def test_own_frames_are_held_to_the_table_too() -> None:
    with pytest.raises(FormatError):
        encode(Frame(FrameType.DATA, 0, b"x"))
    with pytest.raises(FormatError):
        encode(Frame(FrameType.DATA, 1, bytes(MAX_DATA + 1)))


def test_reasons_are_cut_at_whole_characters_and_cleaned() -> None:
    payload = reason(Code.BUSY, "é" * MAX_TEXT)
    assert len(payload) <= MAX_TEXT + 2
    assert parse_reason(payload) == (Code.BUSY, "é" * (MAX_TEXT // 2))
    assert parse_reason(b"\x00\x02a\x1b[31mb\n") == (Code.BUSY, "a [31mb ")
    assert parse_reason(b"\xff\xffx")[0] is Code.PROTOCOL


@pytest.mark.parametrize("payload", [b"", b"\x00", b"\x00\x01\xff"])
def test_malformed_reasons_are_refused(payload: bytes) -> None:
    with pytest.raises(FormatError):
        parse_reason(payload)


@pytest.mark.parametrize("payload", [b"", bytes(4), b"\x80\x00\x00\x00", bytes(5)])
def test_credit_out_of_range_is_refused(payload: bytes) -> None:
    with pytest.raises(FormatError):
        parse_credit(payload)


def test_credit_round_trip() -> None:
    assert parse_credit(credit(131072)) == 131072
