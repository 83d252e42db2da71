"""``index.cai`` with the files and links of a cipher directory."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cai import jcs
from cai.errors import CaiError, FormatError
from cai.model.index import StoredFile, encode_index, parse_index

MANIFEST = StoredFile(1, ("00" * 32,))
INDEX = {
    "manifest.cai": MANIFEST,
    "data/gocryptfs.conf": StoredFile(10, ("11" * 32,)),
    "data/gocryptfs.diriv": StoredFile(16, ("22" * 32,)),
    "data/" + "A" * 22 + "/gocryptfs.diriv": StoredFile(16, ("33" * 32,)),
    "data/" + "A" * 22 + "/empty": StoredFile(0, ()),
    "data/link": StoredFile(0, (), "QUFB"),
}


def test_it_comes_back() -> None:
    assert parse_index(encode_index(INDEX)) == INDEX


@pytest.mark.parametrize(
    "path",
    [
        "data", "data/", "data/../x", "data/./x", "data//x", "/data/x", "data/x/", "data/a b",
        "data/ü", "data/a\n", "data/" + "x" * 256, "other/x", "data/..", "cai.json",
    ],
)
def test_paths_that_lead_elsewhere(path: str) -> None:
    with pytest.raises(FormatError):
        parse_index(encode_index(INDEX | {path: StoredFile(1, ("00" * 32,))}))


def test_objects_and_a_cipher_directory_do_not_mix() -> None:
    with pytest.raises(FormatError, match="two methods"):
        parse_index(encode_index(INDEX | {"objects/" + "a" * 32: MANIFEST}))


def test_a_file_is_no_directory() -> None:
    for path in ("data/link/below", "data/gocryptfs.conf/x/y"):
        with pytest.raises(FormatError, match="file and a directory"):
            parse_index(encode_index(INDEX | {path: MANIFEST}))


def edited(edit: Any) -> bytes:
    value = jcs.parse(encode_index(INDEX), what="index", limit=2**20)
    edit({line["path"]: line for line in value["files"]})
    return jcs.canonical(value)


@pytest.mark.parametrize(
    "edit",
    [
        lambda files: files["data/link"].update(link="../x"),
        lambda files: files["data/link"].update(link="A" * 8193),
        lambda files: files["data/link"].update(link=""),
        lambda files: files["data/link"].update(link=1),
        lambda files: files["data/link"].update(size=1, blake3=["00" * 32]),
        lambda files: files["manifest.cai"].update(link="QUFB"),
        lambda files: files["manifest.cai"].update(size=0, blake3=[]),
        lambda files: files["data/gocryptfs.conf"].update(size=0),
        lambda files: files["data/gocryptfs.conf"].update(size=-1),
    ],
)
def test_lines_of_another_form(edit: Any) -> None:
    with pytest.raises(FormatError):
        parse_index(edited(edit))


@given(st.text(max_size=60))
def test_no_path_breaks_the_parser(path: str) -> None:
    try:
        files = parse_index(encode_index(INDEX | {f"data/{path}": MANIFEST}))
    except CaiError:
        return
    for part in next(name for name in files if name == f"data/{path}").split("/"):
        assert part not in ("", ".", "..")
        assert part.isascii()
