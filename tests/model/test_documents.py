"""The small documents: record, index, header, key file, links, members."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from cai import jcs
from cai.errors import CaiError, FormatError, InputError, InputMissing, StorageError, Tampered
from cai.model import Lease, Manifest, ReleaseRecord, new_key, read_key_file, write_key_file
from cai.model.header import Header
from cai.model.index import PieceHasher, StoredFile, encode_index, parse_index
from cai.model.manifest import pad, unpad
from cai.model.members import Members
from cai.model.paths import check_links, path_fault
from cai.model.pickles import looks_like_pickle
from cai.model.record import DOMAIN, public_key_hex
from cai.secret import Secret

OWNER = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OWNER_HEX = public_key_hex(OWNER)


def record(**changes: Any) -> ReleaseRecord:
    members: dict[str, Any] = {
        "kek": Secret(bytes(32)), "model_id": "11" * 32, "manifest_root": "22" * 32,
        "min_revision": 1, "index_sha256": "33" * 32, "owner_key": OWNER_HEX,
    }  # fmt: skip
    return ReleaseRecord(**(members | changes))


def test_a_record_comes_back() -> None:
    original = record(allow=("a", "b"), lease=Lease(60, 0))
    parsed = ReleaseRecord.parse(original.sign(OWNER), owner_key=OWNER_HEX)
    assert parsed == original
    assert "000000" not in repr(parsed)


def test_another_owner_is_refused_although_the_signature_is_right() -> None:
    other = Ed25519PrivateKey.generate()
    signed = record(owner_key=public_key_hex(other)).sign(other)
    with pytest.raises(Tampered, match="owner key"):
        ReleaseRecord.parse(signed, owner_key=OWNER_HEX)


def test_every_altered_member_breaks_the_signature() -> None:
    value = json.loads(record(allow=("a",)).sign(OWNER))
    changes: dict[str, Any] = {
        "kek": "01" * 32, "model_id": "12" * 32, "manifest_root": "23" * 32, "min_revision": 2,
        "index_sha256": "34" * 32, "allow": ["a", "b"], "lease": {"ttl_s": 901, "drain_s": 300},
        "signature": "00" * 64,
    }  # fmt: skip
    assert set(changes) | {"cai-key", "owner_key"} == set(value)
    for name, changed in changes.items():
        with pytest.raises(Tampered, match="signature"):
            ReleaseRecord.parse(jcs.canonical(value | {name: changed}), owner_key=OWNER_HEX)


@pytest.mark.parametrize(
    "change",
    [
        {"cai-key": 2}, {"cai-key": True}, {"extra": 1}, {"kek": "00" * 31}, {"kek": "A" * 64},
        {"min_revision": 0}, {"min_revision": "1"}, {"allow": ["b", "a"]}, {"allow": "a"},
        {"lease": {"ttl_s": 9, "drain_s": 0}}, {"lease": {"ttl_s": 86_401, "drain_s": 0}},
        {"lease": {"ttl_s": 900, "drain_s": 301}}, {"lease": {"ttl_s": 900}},
        {"lease": {"ttl_s": 900, "drain_s": 300, "x": 1}}, {"model_id": ""}, {"owner_key": "zz"},
        {"signature": "00"}, {"manifest_root": None}, {"kek": None},
    ],
)  # fmt: skip
def test_a_record_of_another_form(change: dict[str, Any]) -> None:
    value = json.loads(record().sign(OWNER)) | change
    # Signed again, so that only the form can be the reason.
    covered = {name: item for name, item in value.items() if name != "signature"}
    if "signature" not in change:
        value["signature"] = OWNER.sign(DOMAIN + jcs.canonical(covered)).hex()
    with pytest.raises(FormatError):
        ReleaseRecord.parse(jcs.canonical(value), owner_key=OWNER_HEX)


def test_a_record_is_canonical_and_domain_separated() -> None:
    signed = record().sign(OWNER)
    for spelling in (signed + b"\n", b" " + signed, json.dumps(json.loads(signed)).encode()):
        with pytest.raises(FormatError):
            ReleaseRecord.parse(spelling, owner_key=OWNER_HEX)
    value = json.loads(signed)
    covered = {name: item for name, item in value.items() if name != "signature"}
    value["signature"] = OWNER.sign(jcs.canonical(covered)).hex()
    with pytest.raises(Tampered):
        ReleaseRecord.parse(jcs.canonical(value), owner_key=OWNER_HEX)


def test_a_record_is_not_signed_with_another_key_or_in_a_bad_form() -> None:
    with pytest.raises(FormatError):
        record().sign(Ed25519PrivateKey.generate())
    for bad in ({"allow": ("b", "a")}, {"lease": Lease(1, 0)}, {"kek": Secret(b"short")}):
        with pytest.raises(FormatError):
            record(**bad).sign(OWNER)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_give_our_errors_only(data: bytes) -> None:
    for parse in (
        Manifest.parse, Header.parse, parse_index, unpad,
        lambda value: ReleaseRecord.parse(value, owner_key=OWNER_HEX),
    ):  # fmt: skip
        with pytest.raises(CaiError):
            parse(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)


@settings(deadline=None)
@given(
    name=st.sampled_from(
        ["cai", "model_id", "dek", "manifest", "index", "entries", "allow", "licence",
         "provenance", "files", "lease", "kek", "signature", "created", "revision"]
    ),
    value=JSON,
)  # fmt: skip
def test_members_of_any_form_give_our_errors_only(name: str, value: object) -> None:
    document = jcs.canonical({name: value}) if _fits(value) else b"{}"
    for parse in (
        Manifest.parse, Header.parse, parse_index,
        lambda data: ReleaseRecord.parse(data, owner_key=OWNER_HEX),
    ):  # fmt: skip
        with pytest.raises(CaiError):
            parse(document)


def _fits(value: object) -> bool:
    try:
        jcs.canonical(value)
    except FormatError:
        return False
    return True


def test_padding_of_the_manifest() -> None:
    for size in (1, 2**20 - 1, 2**20, 2**20 + 1):
        text = b"x" * size
        padded = pad(text)
        assert len(padded) == (2**20 if size <= 2**20 else 2**21)
        assert unpad(padded) == text
        with pytest.raises(CaiError):
            unpad(padded + b"\x00")
    for bad in (b"", bytes(2**20), b"x" + bytes(2**21 - 1), b"x" + bytes(2**20 - 2)):
        with pytest.raises(FormatError):
            unpad(bad)
    with pytest.raises(CaiError, match="manifest"):
        pad(b"x" * (2**26 + 1))


INDEX: dict[str, StoredFile] = {
    "manifest.cai": StoredFile(1, ("00" * 32,)),
    "objects/" + "a" * 32: StoredFile(2**22 + 1, ("11" * 32, "22" * 32)),
}


def test_an_index_comes_back() -> None:
    assert parse_index(encode_index(INDEX)) == INDEX


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"objects/" + "a" * 32: StoredFile(1, ("00" * 32,))},
        INDEX | {"cai.json": StoredFile(1, ("00" * 32,))},
        INDEX | {"objects/../x": StoredFile(1, ("00" * 32,))},
        INDEX | {"objects/" + "A" * 32: StoredFile(1, ("00" * 32,))},
        INDEX | {"manifest.cai": StoredFile(0, ())},
        INDEX | {"manifest.cai": StoredFile(1, ())},
        INDEX | {"manifest.cai": StoredFile(1, ("00" * 32, "00" * 32))},
        INDEX | {"manifest.cai": StoredFile(1, ("0" * 63,))},
        INDEX | {"manifest.cai": StoredFile(1, ("G" * 64,))},
    ],
)
def test_an_index_of_another_form(files: dict[str, StoredFile]) -> None:
    with pytest.raises(FormatError, match=r"index\.cai"):
        parse_index(encode_index(files))


def test_an_index_out_of_order() -> None:
    value = json.loads(encode_index(INDEX))
    value["files"].reverse()
    with pytest.raises(FormatError):
        parse_index(jcs.canonical(value))


@settings(deadline=None)
@given(
    start=st.integers(0, 40), cuts=st.lists(st.integers(1, 30), min_size=1, max_size=8),
)  # fmt: skip
def test_pieces_of_a_stream_in_any_cuts(start: int, cuts: list[int]) -> None:
    from blake3 import blake3

    from cai.model import index

    data = bytes(range(256))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "PIECE", 16)
        hasher = PieceHasher(start)
        position = start
        for cut in cuts:
            hasher.update(data[position : position + cut])
            position += cut
        expected = {
            n: blake3(data[16 * n : min(16 * n + 16, position)]).hexdigest()
            for n in range(-(-start // 16), -(-position // 16))
        }
        assert hasher.finish() == expected


def test_a_key_file_comes_back(tmp_path: Path) -> None:
    key = new_key()
    write_key_file(tmp_path / "k", key)
    assert read_key_file(tmp_path / "k") == key
    assert (tmp_path / "k").read_text() == key.reveal().hex() + "\n"
    assert stat.S_IMODE((tmp_path / "k").stat().st_mode) == 0o600
    with pytest.raises(StorageError, match="exists already"):
        write_key_file(tmp_path / "k", new_key())
    assert read_key_file(tmp_path / "k") == key
    (tmp_path / "bare").write_text(key.reveal().hex())
    assert read_key_file(tmp_path / "bare") == key


@pytest.mark.parametrize(
    "text",
    ["", "\n", "0" * 63, "0" * 65, "A" * 64, "g" * 64, "0" * 64 + "\n\n", "0" * 64 + "\r\n",
     " " + "0" * 64, "\u0660" * 64, "0x" + "0" * 62],
)  # fmt: skip
def test_a_key_file_of_another_form(text: str, tmp_path: Path) -> None:
    (tmp_path / "k").write_bytes(text.encode())
    with pytest.raises(FormatError) as caught:
        read_key_file(tmp_path / "k")
    assert text.strip() == "" or text not in caught.value.message


def test_a_key_file_that_is_missing_or_a_directory(tmp_path: Path) -> None:
    with pytest.raises(InputMissing):
        read_key_file(tmp_path / "k")
    with pytest.raises(InputError):
        read_key_file(tmp_path)


@pytest.mark.parametrize(
    "links",
    [
        {"a": "b"}, {"d/a": "../b"}, {"d/a": "."}, {"d/a": ".."}, {"a": "d/../b"},
        {"s": ".", "a": "s/s/s/x"}, {"d/e/a": "../../x/../y"}, {"a": "missing/../x"},
    ],
)  # fmt: skip
def test_links_that_stay_inside(links: dict[str, str]) -> None:
    check_links(links)


@pytest.mark.parametrize(
    "links",
    [
        {"a": ".."}, {"a": "/"}, {"a": ""}, {"a": "b/../.."}, {"d/a": "../.."}, {"a": "a"},
        {"a": "b", "b": "a"}, {"s": ".", "a": "s/.."}, {"d/s": "..", "a": "d/s/../x"},
        {"a": "x" * 4097}, {"a": "x\0"}, {"a": "\udcff"},
        {f"l{n}": f"l{n + 1}" for n in range(60)},
    ],
)  # fmt: skip
def test_links_that_do_not(links: dict[str, str]) -> None:
    with pytest.raises(FormatError, match="symbolic link"):
        check_links(links)


@pytest.mark.parametrize("path", ["a", "a/b", "ä", "…", "a b", "-", "a\nb", "x" * 255, ".a", "..."])
def test_names_that_are_kept(path: str) -> None:
    assert path_fault(path) is None


def test_pickles_by_content() -> None:
    import pickle

    for protocol in range(2, 6):
        for value in ({"a": 1}, [1], (1, 2), "x", b"y", {"w": [0.5]}, None):
            data = pickle.dumps(value, protocol)
            assert looks_like_pickle(data), (protocol, value)
    for plain in (b"", b"\x80", b"{}", b"PK\x03\x04plain zip", b"GGUF\x03\x00\x00\x00"):
        assert not looks_like_pickle(plain)


@pytest.mark.parametrize("value", [None, [], "x", 1, True])
def test_a_document_that_is_no_object(value: object) -> None:
    with pytest.raises(FormatError, match="here"):
        Members(value, where="here")
