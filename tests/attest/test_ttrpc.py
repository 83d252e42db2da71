"""ttrpc framing and the protobuf that it carries."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cai.attest import ttrpc
from cai.attest.agent_client import ProofRequest
from cai.errors import CaiError, FormatError, LimitExceeded


def test_request_known_answer() -> None:
    request = ttrpc.Request("s", "m", b"\x01\x02", timeout_nano=300)
    assert request.encode() == bytes.fromhex("0a0173" "12016d" "1a020102" "20ac02")
    assert ttrpc.Request.decode(request.encode()) == request


def test_header_known_answer() -> None:
    header = ttrpc.Header(5, 1, ttrpc.MessageType.REQUEST)
    assert header.encode().hex() == "00000005000000010100"
    assert ttrpc.Header.decode(header.encode()) == header


@given(st.integers(0, 16), st.text(max_size=20), st.binary(max_size=200))
def test_response_round_trip(status: int, message: str, payload: bytes) -> None:
    response = ttrpc.Response(status, message, payload)
    assert ttrpc.Response.decode(response.encode()) == response


@pytest.mark.parametrize(
    "data", [b"\x0a", b"\x0a\x05abc", b"\x0b", b"\x80" * 11, b"\x0f\x00", b"\x09\x00"]
)
def test_malformed_protobuf_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError):
        ttrpc.Request.decode(data)


def test_unknown_fields_are_skipped() -> None:
    extra = ttrpc.varint_field(9, 1) + b"\x51" + bytes(8) + b"\x55" + bytes(4)
    assert ttrpc.Request.decode(extra + ttrpc.bytes_field(2, b"m")).method == "m"


@given(st.binary(max_size=100))
def test_garbage_never_leaks_a_builtin_exception(data: bytes) -> None:
    types = (ttrpc.Request, ttrpc.Response, ttrpc.Header, ProofRequest)
    for parse in (kind.decode for kind in types):
        try:
            parse(data)
        except CaiError:
            continue


def test_an_oversized_frame_is_refused_before_it_is_read() -> None:
    with pytest.raises(LimitExceeded):
        ttrpc.Header.decode(ttrpc.Header(ttrpc.MAX_MESSAGE + 1, 1, 1).encode())


@pytest.mark.parametrize("leaf", [b"", bytes(31), bytes(33), bytes(70)])
def test_a_leaf_has_exactly_32_bytes(leaf: bytes) -> None:
    with pytest.raises(FormatError):
        ProofRequest.decode(ttrpc.bytes_field(1, leaf))
