"""Chunked OHTTP: streams open as sealed, and every change, cut or exchange of chunks is noticed."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from cai.errors import CaiError, FormatError, LimitExceeded, Tampered
from tng.ohttp.chunked import (
    HEADER_SIZE,
    MAX_CHUNK,
    MAX_PLAINTEXT,
    Header,
    Opener,
    RequestReceiver,
    RequestSender,
    decode_varint,
    encode_varint,
)
from tng.ohttp.hpke import Aead

KEY = X25519PrivateKey.generate()
PUBLIC = KEY.public_key().public_bytes_raw()
AEADS = list(Aead)


def ends(aead: Aead = Aead.AES_128_GCM) -> tuple[RequestSender, RequestReceiver]:
    sender = RequestSender(Header(0, aead), PUBLIC)
    header = Header.decode(sender.head[:HEADER_SIZE])
    return sender, RequestReceiver(header, sender.head[HEADER_SIZE:], KEY)


def opened(opener: Opener, data: bytes) -> bytes:
    return b"".join(opener.feed(data)) + opener.finish()


@pytest.mark.parametrize("aead", AEADS)
@pytest.mark.parametrize("size", [0, 1, MAX_PLAINTEXT, MAX_PLAINTEXT + 1, 5 * MAX_PLAINTEXT])
def test_a_request_and_its_response_open(aead: Aead, size: int) -> None:
    sender, receiver = ends(aead)
    plain = bytes(size)
    assert opened(receiver.opener, sender.sealer.chunk(plain) + sender.sealer.final()) == plain
    nonce, sealer = receiver.response()
    assert len(nonce) == sender.nonce_size == (16 if aead is Aead.AES_128_GCM else 32)
    assert opened(sender.response(nonce), sealer.chunk(plain) + sealer.final()) == plain


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(max_size=300), max_size=6), st.integers(1, 50))
def test_any_cut_of_the_stream_opens_the_same(parts: list[bytes], step: int) -> None:
    sender, receiver = ends()
    data = b"".join(sender.sealer.chunk(part) for part in parts) + sender.sealer.final()
    found = b""
    for at in range(0, len(data), step):
        found += b"".join(receiver.opener.feed(data[at : at + step]))
    assert found + receiver.opener.finish() == b"".join(parts)


def test_chunks_open_before_the_stream_has_ended() -> None:
    sender, receiver = ends()
    assert list(receiver.opener.feed(sender.sealer.chunk(b"first"))) == [b"first"]


@pytest.mark.parametrize("place", range(0, 60, 7))
def test_a_changed_bit_is_noticed(place: int) -> None:
    sender, receiver = ends()
    data = bytearray(
        sender.sealer.chunk(b"a" * 20) + sender.sealer.chunk(b"b") + sender.sealer.final()
    )
    data[min(place, len(data) - 1)] ^= 1
    with pytest.raises(CaiError):
        opened(receiver.opener, bytes(data))


def test_every_truncation_is_noticed() -> None:
    sender, _ = ends()
    data = sender.sealer.chunk(b"a" * 20) + sender.sealer.chunk(b"b") + sender.sealer.final()
    for size in range(len(data)):
        receiver = RequestReceiver(Header(0, Aead.AES_128_GCM), sender.head[HEADER_SIZE:], KEY)
        with pytest.raises(Tampered):
            opened(receiver.opener, data[:size])


def test_chunks_in_another_order_are_noticed() -> None:
    sender, receiver = ends()
    first, second = sender.sealer.chunk(b"one"), sender.sealer.chunk(b"two")
    with pytest.raises(Tampered):
        list(receiver.opener.feed(second + first))


def test_a_repeated_chunk_is_noticed() -> None:
    sender, receiver = ends()
    first = sender.sealer.chunk(b"one")
    with pytest.raises(Tampered):
        list(receiver.opener.feed(first + first))


def test_a_left_out_chunk_is_noticed() -> None:
    sender, receiver = ends()
    sender.sealer.chunk(b"one")
    with pytest.raises(Tampered):
        opened(receiver.opener, sender.sealer.final())


def test_a_middle_chunk_is_no_last_one() -> None:
    """Its length is written as 0, so that it would end the stream."""
    sender, receiver = ends()
    chunk = sender.sealer.chunk(b"one")
    with pytest.raises(Tampered):
        opened(receiver.opener, b"\x00" + chunk[1:])


def test_bytes_after_the_last_chunk_are_noticed() -> None:
    sender, receiver = ends()
    with pytest.raises(Tampered):
        opened(receiver.opener, sender.sealer.final() + b"x")


def test_a_response_opens_only_for_its_request() -> None:
    sender, receiver = ends()
    other, _ = ends()
    nonce, sealer = receiver.response()
    data = sealer.chunk(b"x") + sealer.final()
    with pytest.raises(Tampered):
        opened(other.response(nonce), data)
    with pytest.raises(Tampered):
        opened(sender.response(bytes(len(nonce))), data)


def test_a_request_is_no_response() -> None:
    sender, receiver = ends()
    nonce, _ = receiver.response()
    with pytest.raises(Tampered):
        opened(sender.response(nonce), sender.sealer.chunk(b"x") + sender.sealer.final())


@pytest.mark.parametrize("nonce", [b"", bytes(15), bytes(17), bytes(32)])
def test_a_nonce_of_another_size_is_refused(nonce: bytes) -> None:
    sender, _ = ends()
    with pytest.raises(FormatError):
        sender.response(nonce)


@pytest.mark.parametrize("size", [MAX_CHUNK + 1, 2**30 - 1, 2**62 - 1])
def test_an_oversized_chunk_is_refused_before_it_is_kept(size: int) -> None:
    _, receiver = ends()
    with pytest.raises(LimitExceeded):
        list(receiver.opener.feed(encode_varint(size)))


def test_an_oversized_last_chunk_is_refused() -> None:
    _, receiver = ends()
    with pytest.raises(LimitExceeded):
        list(receiver.opener.feed(b"\x00" + bytes(MAX_CHUNK + 1)))


@pytest.mark.parametrize(
    "header",
    [
        "", "00002000010001ff", "0000200001", "00001000010001", "00002000020001",
        "00002000010002", "0000200001ffff", "ff", "00000000000000",
    ],
)  # fmt: skip
def test_a_header_of_other_algorithms_is_refused(header: str) -> None:
    with pytest.raises(FormatError):
        Header.decode(bytes.fromhex(header))


@pytest.mark.parametrize("aead", AEADS)
def test_a_header_is_written_as_it_is_read(aead: Aead) -> None:
    assert Header.decode(Header(7, aead).encode()) == Header(7, aead)


def test_a_receiver_wants_the_whole_encapsulated_key() -> None:
    for enc in (b"", bytes(31), bytes(33), bytes(32)):
        with pytest.raises(FormatError):
            RequestReceiver(Header(0, Aead.AES_128_GCM), enc, KEY)


@given(st.integers(0, 2**62 - 1), st.binary(max_size=4))
def test_a_varint_is_read_as_written(value: int, more: bytes) -> None:
    data = encode_varint(value)
    assert decode_varint(data + more) == (value, len(data))
    for size in range(len(data)):
        assert decode_varint(data[:size]) is None


def test_a_number_beyond_62_bits_is_no_varint() -> None:
    with pytest.raises(FormatError):
        encode_varint(2**62)
