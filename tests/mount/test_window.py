from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cai.errors import FormatError, LimitExceeded, StorageError, Tampered
from cai.mount.protocol import MAX_READ
from cai.mount.window import MAX_CHUNK, Window
from tests.mount.fake_tree import CHUNK, FakeReader

DATA = os.urandom(5 * MAX_READ // 2 + 17)


def reader(*bad: int) -> FakeReader:
    return FakeReader("f", DATA, {("f", chunk) for chunk in bad})


@given(
    st.lists(
        st.tuples(
            st.integers(0, 1), st.integers(0, len(DATA) + 10), st.integers(0, 3 * CHUNK)
        ),
        max_size=20,
    )
)
def test_any_sequence_of_reads_gives_the_files_bytes(reads: list[tuple[int, int, int]]) -> None:
    files = [FakeReader("f", DATA, set()), FakeReader("g", DATA[::-1], set())]
    window = Window()
    for number, offset, length in reads:
        got = bytes(window.read(number, files[number], len(DATA), offset, length))
        assert got == files[number].data[offset : offset + length]
    for file in files:
        for offset, length in file.calls:
            assert offset % CHUNK == 0
            assert length % CHUNK == 0 or offset + length == len(DATA)


def test_a_chunk_is_not_read_twice_in_a_row() -> None:
    window, file = Window(), reader()
    step = 100_000
    for offset in range(0, 10 * step, step):
        window.read(1, file, len(DATA), offset, step)
    assert sum(length for _offset, length in file.calls) == -(-10 * step // CHUNK) * CHUNK


def test_small_reads_in_one_chunk_are_one_read() -> None:
    window, file = Window(), reader()
    for offset in range(0, CHUNK, 4096):
        window.read(1, file, len(DATA), offset, 4096)
    assert len(file.calls) == 1


def test_a_bad_chunk_is_named_and_nothing_of_the_read_is_given() -> None:
    with pytest.raises(Tampered, match="chunk 3 does not authenticate"):
        Window().read(1, reader(3), len(DATA), CHUNK, 4 * CHUNK)


def test_neighbours_of_a_bad_chunk_stay_readable() -> None:
    window, file = Window(), reader(3)
    for _ in range(2):
        assert window.read(1, file, len(DATA), 2 * CHUNK, CHUNK) == DATA[2 * CHUNK : 3 * CHUNK]
        with pytest.raises(Tampered):
            window.read(1, file, len(DATA), 3 * CHUNK, 4096)
        assert window.read(1, file, len(DATA), 4 * CHUNK, CHUNK) == DATA[4 * CHUNK : 5 * CHUNK]


def test_what_was_held_before_a_failure_is_not_given_for_it() -> None:
    window, file = Window(), reader(1)
    window.read(1, file, len(DATA), 0, CHUNK)
    with pytest.raises(Tampered):
        window.read(1, file, len(DATA), CHUNK - 10, 20)
    with pytest.raises(Tampered):
        window.read(1, file, len(DATA), CHUNK, 20)


def test_a_reader_that_gives_less_is_an_error() -> None:
    with pytest.raises(StorageError):
        Window().read(1, FakeReader("f", b"abc", set()), 10, 0, 10)


@pytest.mark.parametrize(
    ("chunk", "error"), [(0, FormatError), (-1, FormatError), (MAX_CHUNK + 1, LimitExceeded)]
)
def test_chunk_sizes_out_of_range(chunk: int, error: type[Exception]) -> None:
    file = reader()
    file.chunk_size = chunk
    with pytest.raises(error):
        Window().read(1, file, len(DATA), 0, 1)
    assert not file.calls
