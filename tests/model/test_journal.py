"""The journal's bytes: whatever lies there, reading it ends in lines that verify or in nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cai.errors import FormatError
from cai.model import new_key
from cai.model.index import StoredFile
from cai.model.journal import JOURNAL_FILE, Finished, Journal, read_journal
from cai.model.manifest import Stored
from cai.model.object import Shape
from cai.secret import Secret


def line(number: int) -> Finished:
    shape = Shape(100_000 + number, 65_536)
    return Finished(
        f"sub/w{number}", ("1", "2"), "ab" * 32,
        Stored(f"{number:032x}", bytes([number]) * 32, "cd" * 32, shape),
        StoredFile(shape.stored, ("ef" * 32,)),
    )  # fmt: skip


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, Secret]:
    secret = new_key()
    journal = Journal(tmp_path, secret, finished=[line(0)])
    for number in (1, 2):
        journal.add(line(number))
    journal.close()
    return tmp_path, secret


def test_what_was_noted_comes_back(written: tuple[Path, Secret]) -> None:
    found = read_journal(*written)
    assert found == (None, [line(0), line(1), line(2)])
    assert oct((written[0] / JOURNAL_FILE).stat().st_mode)[-3:] == "600"


def test_a_new_run_begins_a_new_journal(written: tuple[Path, Secret]) -> None:
    """Another salt, so another key: line numbers are nonces and start again."""
    folder, secret = written
    before = (folder / JOURNAL_FILE).read_bytes()
    Journal(folder, secret, finished=[line(0), line(1), line(2)]).close()
    after = (folder / JOURNAL_FILE).read_bytes()
    assert len(before) == len(after)
    assert before[:8] == after[:8]
    assert before[8:40] != after[8:40]
    assert before[40:] != after[40:]


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_edits_only_cut_it_short(data: st.DataObject, written: tuple[Path, Secret]) -> None:
    folder, secret = written
    path = folder / JOURNAL_FILE
    original = path.read_bytes()
    changed = bytearray(original)
    place = data.draw(st.integers(0, len(changed)))
    piece = data.draw(st.binary(max_size=60))
    changed[place : place + data.draw(st.integers(0, 60))] = piece
    path.write_bytes(changed)
    try:
        found = read_journal(folder, secret)
        assert found is None or found[1] == [line(n) for n in range(len(found[1]))]
    finally:
        path.write_bytes(original)


@pytest.mark.parametrize(
    "data",
    [b"", b"CAIJNL1\n", b"CAIJNL1\n" + bytes(32), os.urandom(500)],
    ids=["empty", "magic alone", "zeros", "noise"],
)
def test_other_bytes_are_no_journal(data: bytes, tmp_path: Path) -> None:
    (tmp_path / JOURNAL_FILE).write_bytes(data)
    assert read_journal(tmp_path, new_key()) is None
    assert read_journal(tmp_path / "nowhere", new_key()) is None


@pytest.mark.parametrize(
    "change",
    [
        (b'"chunk":65536', b'"chunk":65537'), (b'"object":"000', b'"object":"../'),
        (b'"path"', b'"paths"'), (b'"object_size":1', b'"object_size":-1'), (b"ab", b"AB"),
    ],
)  # fmt: skip
def test_lines_of_another_form(change: tuple[bytes, bytes]) -> None:
    data = line(1).encode()
    assert Finished.parse(data) == line(1)
    with pytest.raises(FormatError):
        Finished.parse(data.replace(*change))
