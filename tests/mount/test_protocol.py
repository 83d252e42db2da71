"""The FUSE wire format against layouts counted out by hand from the kernel's header."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cai.errors import CaiError, FormatError
from cai.mount import protocol
from cai.mount.protocol import Attributes


def request(opcode: int, body: bytes = b"", node: int = 1, unique: int = 7) -> memoryview:
    head = struct.pack("=IIQQIIIHH", 40 + len(body), opcode, unique, node, 0, 0, 1, 0, 0)
    return memoryview(head + body)


def init(major: int = 7, minor: int = 38, flags: int = 0xFFFFFFFF) -> memoryview:
    return request(26, struct.pack("=4I", major, minor, 131072, flags) + bytes(48))


ATTRIBUTES = Attributes(ino=5, size=513, mode=0o100444, nlink=1, uid=3, gid=4, time=99)


def test_lengths_are_the_kernels() -> None:
    assert len(ATTRIBUTES.pack()) == 88
    assert len(protocol.entry_answer(ATTRIBUTES)) == len(protocol.ABSENT) == 128
    assert len(protocol.NO_ENTRY) == 128
    assert len(protocol.attributes_answer(ATTRIBUTES)) == 104
    assert len(protocol.statfs_answer(0, 1)) == 80
    assert len(protocol.older_version()) == 64
    agreed = protocol.init_answer(init(), 4096)
    assert agreed is not None
    assert len(agreed) == 64
    assert len(protocol.refusal(1, 5)) == 16


def test_attributes_bytes() -> None:
    fields = struct.unpack("=6Q10I", ATTRIBUTES.pack())
    assert fields == (5, 513, 2, 99, 99, 99, 0, 0, 0, 0o100444, 1, 3, 4, 0, 4096, 0)


def test_refusal_is_negative() -> None:
    assert struct.unpack("=IiQ", protocol.refusal(9, 5)) == (16, -5, 9)


def test_init_asks_for_large_reads_and_only_what_is_offered() -> None:
    offered = protocol.REQUIRED | protocol.InitFlag.ASYNC_READ | (1 << 31)
    fields = struct.unpack("=4I2H2I2H2I24x", protocol.init_answer(init(flags=offered), 4096) or b"")
    major, minor, ahead, flags, background, congestion, max_write, _gran, pages, *_rest = fields
    assert (major, minor, ahead) == (7, 31, 131072)
    assert flags == protocol.REQUIRED | protocol.InitFlag.ASYNC_READ
    assert 0 < congestion < background
    assert max_write == 4096
    assert pages == 256


def test_a_newer_major_version_is_asked_to_step_back() -> None:
    assert protocol.init_answer(init(major=8), 4096) is None
    assert struct.unpack_from("=II", protocol.older_version()) == (7, 31)


@pytest.mark.parametrize(
    "message",
    [
        init(major=6),
        init(minor=30),
        init(flags=0),
        init(flags=0xFFFFFFFF & ~protocol.InitFlag.NO_OPEN_SUPPORT),
        request(26, bytes(15)),
    ],
)
def test_an_older_kernel_is_refused(message: memoryview) -> None:
    with pytest.raises(FormatError):
        protocol.init_answer(message, 4096)


@pytest.mark.parametrize("message", [b"", bytes(39), bytes(40), bytes(request(3)) + b"x"])
def test_a_request_is_as_long_as_it_says(message: bytes) -> None:
    with pytest.raises(FormatError):
        protocol.request(memoryview(message))


@pytest.mark.parametrize("name", [b"", b"no end", b"two\0names\0", b"\0\0"])
def test_a_name_ends_with_its_only_zero(name: bytes) -> None:
    with pytest.raises(FormatError):
        protocol.lookup_name(request(1, name))


def test_a_short_read_request_is_refused() -> None:
    with pytest.raises(FormatError):
        protocol.read_arguments(request(15, bytes(19)))


def test_read_size_is_bounded() -> None:
    asked = request(15, struct.pack("=QQI", 0, 1 << 40, 0xFFFFFFFF))
    assert protocol.read_arguments(asked) == (1 << 40, protocol.MAX_READ)


@pytest.mark.parametrize("length", range(1, 18))
def test_directory_entries_are_padded_to_eight(length: int) -> None:
    raw = protocol.directory_entry(3, 4, 8, b"n" * length)
    assert len(raw) % 8 == 0
    assert len(raw) - 24 - length < 8
    assert struct.unpack_from("=QQII", raw) == (3, 4, length, 8)


@given(st.binary(max_size=200))
def test_any_bytes_give_a_value_or_our_error(data: bytes) -> None:
    for parse in (
        protocol.request, protocol.lookup_name, protocol.read_arguments,
        lambda raw: protocol.init_answer(raw, 4096),
    ):  # fmt: skip
        with contextlib.suppress(CaiError):
            parse(memoryview(data))
