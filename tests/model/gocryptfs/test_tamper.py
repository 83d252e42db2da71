"""With the manifest, every change that stock passes over is found, and none gives wrong bytes."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cai.errors import CaiError, FormatError, InputError, Tampered, WrongKey
from cai.model import SealedModel, SealOptions, check, open_model, unseal
from cai.model.gocryptfs.layout import HEADER_SIZE, STORED_BLOCK
from cai.model.gocryptfs.model import CipherModel
from cai.model.gocryptfs.sealing import seal_gocryptfs
from cai.model.tree import EntryType
from cai.secret import Secret
from tests.model.gocryptfs.trees import PASSWORD, Sealed, copied


def plain_bytes(tree: Path, path: str) -> bytes:
    return (tree / path).read_bytes()


def contents(model: SealedModel) -> Iterator[tuple[str, bytes | CaiError]]:
    """Every file read through the reader, or the error in its place."""
    for path, entry in model.entries.items():
        if entry.type is not EntryType.FILE:
            continue
        data = bytearray(entry.size)
        try:
            reader = model.open(path)
            try:
                reader.readinto(0, memoryview(data))
            finally:
                reader.close()
            yield path, bytes(data)
        except CaiError as error:
            assert not any(data), "unverified bytes were left in the buffer"
            yield path, error


def assert_no_wrong_byte(out: Path, tree: Path) -> set[str]:
    """Whatever is read is right or an error; gives the paths that cannot be read."""
    failed = set()
    with open_model(out, PASSWORD) as model:
        for path, found in contents(model):
            if isinstance(found, CaiError):
                assert isinstance(found, Tampered), found
                failed.add(path)
            else:
                assert found == plain_bytes(tree, path), path
    return failed


def test_the_untouched_model_is_whole(sealed: Sealed, tmp_path: Path) -> None:
    report = check(sealed.out, PASSWORD, expect_root=sealed.report.root)
    assert report.content_verified
    assert report.files == sealed.report.files
    assert assert_no_wrong_byte(sealed.out, sealed.tree) == set()
    with open_model(sealed.out, PASSWORD, min_revision=1) as model:
        assert isinstance(model, CipherModel)
        unseal(model, tmp_path / "plain")
        assert check(sealed.out, PASSWORD).content_root == model.content_root
    for path in sealed.tree.rglob("*"):
        copy = tmp_path / "plain" / path.relative_to(sealed.tree)
        assert copy.is_symlink() == path.is_symlink()
        if path.is_symlink():
            assert copy.readlink() == path.readlink()
        else:
            assert copy.stat().st_mode == path.stat().st_mode
            assert path.is_dir() or copy.read_bytes() == path.read_bytes()


def stored_of(out: Path, path: str) -> Path:
    with open_model(out, PASSWORD) as model:
        assert isinstance(model, CipherModel)
        return out / model.stored.path(path)


BLOCK_CHANGES: dict[str, Callable[[bytearray], None]] = {}


def change(name: str) -> Callable[[Callable[[bytearray], None]], Callable[[bytearray], None]]:
    def register(function: Callable[[bytearray], None]) -> Callable[[bytearray], None]:
        BLOCK_CHANGES[name] = function
        return function

    return register


@change("zeroed block")
def _zero(data: bytearray) -> None:
    data[HEADER_SIZE : HEADER_SIZE + STORED_BLOCK] = bytes(STORED_BLOCK)


@change("cut at a block")
def _cut(data: bytearray) -> None:
    del data[HEADER_SIZE + STORED_BLOCK :]


@change("cut in a block")
def _cut_inside(data: bytearray) -> None:
    del data[HEADER_SIZE + STORED_BLOCK + 100 :]


@change("cut to the header")
def _cut_header(data: bytearray) -> None:
    del data[HEADER_SIZE:]


@change("emptied")
def _empty(data: bytearray) -> None:
    data.clear()


@change("zero block appended")
def _append(data: bytearray) -> None:
    data += bytes(STORED_BLOCK)


@change("one byte appended")
def _append_one(data: bytearray) -> None:
    data += b"\0"


@change("two blocks swapped")
def _swap(data: bytearray) -> None:
    one, two, three = (HEADER_SIZE + i * STORED_BLOCK for i in range(3))
    data[one:three] = data[two:three] + data[one:two]


@change("one block in the place of another")
def _repeat(data: bytearray) -> None:
    one, two, three = (HEADER_SIZE + i * STORED_BLOCK for i in range(3))
    data[two:three] = data[one:two]


@pytest.mark.parametrize("name", BLOCK_CHANGES)
@pytest.mark.parametrize("path", ["nested/aligned", "weights.safetensors", "nested/two groups"])
def test_changes_of_one_file(name: str, path: str, sealed: Sealed, out: Path) -> None:
    stored = stored_of(out, path)
    data = bytearray(stored.read_bytes())
    BLOCK_CHANGES[name](data)
    assert bytes(data) != stored.read_bytes()
    stored.write_bytes(data)
    assert path in assert_no_wrong_byte(out, sealed.tree)
    with pytest.raises(Tampered) as caught:
        check(out, PASSWORD)
    assert caught.value.path == str(stored.relative_to(out))
    with open_model(out, PASSWORD) as model, pytest.raises(Tampered) as caught:
        unseal(model, out.parent / "plain")
    assert caught.value.path == str(stored.relative_to(out))
    assert not (out.parent / "plain").exists()


def files_of(out: Path) -> list[str]:
    return sorted(
        str(path.relative_to(out)) for path in out.rglob("*") if path.is_symlink() or path.is_file()
    )


def test_every_missing_file_is_named(sealed: Sealed, tmp_path: Path) -> None:
    out = copied(sealed.out, tmp_path / "copy")
    for name in files_of(out):
        (out / name).rename(tmp_path / "aside")
        with pytest.raises(CaiError) as caught:
            check(out, PASSWORD)
        assert isinstance(caught.value, (Tampered, InputError)), name
        assert name in caught.value.message
        (tmp_path / "aside").rename(out / name)
    check(out, PASSWORD)


def test_a_flipped_bit_in_every_file_is_named(sealed: Sealed, tmp_path: Path) -> None:
    out, draw = copied(sealed.out, tmp_path / "copy"), random.Random(7)
    for name in files_of(out):
        path = out / name
        if path.is_symlink():
            original = str(path.readlink())
            at = draw.randrange(len(original) - 1)
            changed = original[:at] + ("A" if original[at] != "A" else "B") + original[at + 1 :]
            path.unlink()
            path.symlink_to(changed)
            with pytest.raises(Tampered) as tampered:
                check(out, PASSWORD)
            assert tampered.value.path == name
            path.unlink()
            path.symlink_to(original)
            continue
        data = path.read_bytes()
        for at in sorted({0, len(data) - 1, *(draw.randrange(len(data)) for _ in range(6))} if data
                         else set()):
            changed_bytes = bytearray(data)
            changed_bytes[at] ^= 1 << draw.randrange(8)
            path.write_bytes(changed_bytes)
            with pytest.raises(CaiError) as caught:
                check(out, PASSWORD)
            assert isinstance(caught.value, (Tampered, FormatError, WrongKey, InputError)), name
            assert name.rpartition("/")[2] in caught.value.message, (name, at)
        path.write_bytes(data)
    check(out, PASSWORD)


def test_two_files_swapped(sealed: Sealed, out: Path) -> None:
    first, second = stored_of(out, "nested/aligned"), stored_of(out, "weights.safetensors")
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)
    assert assert_no_wrong_byte(out, sealed.tree) == {"nested/aligned", "weights.safetensors"}
    with pytest.raises(Tampered):
        check(out, PASSWORD)


def test_names_swapped_within_a_directory(sealed: Sealed, out: Path) -> None:
    """The storage renames two files of equal size: with stock, each has the other's content."""
    first, second = stored_of(out, "config.json"), stored_of(out, "run.sh")
    first.rename(out / "aside")
    second.rename(first)
    (out / "aside").rename(second)
    assert assert_no_wrong_byte(out, sealed.tree) == {"config.json", "run.sh"}


@pytest.mark.parametrize(
    "place",
    ["extra", "data/extra", "data/" + "A" * 22, "data/sub/", "data/gocryptfs.longname.X.name",
     "data/.hidden"],
)
def test_something_that_does_not_belong(place: str, sealed: Sealed, out: Path) -> None:
    if place.endswith("/"):
        (out / place).mkdir()
    else:
        (out / place).write_text("x")
    with pytest.raises(Tampered) as caught:
        check(out, PASSWORD)
    assert caught.value.path == place
    assert assert_no_wrong_byte(out, sealed.tree) == set()


@pytest.mark.parametrize("what", ["file", "folder", "link", "pipe"])
def test_another_kind_in_the_place_of_a_file(what: str, sealed: Sealed, out: Path) -> None:
    stored = stored_of(out, "config.json")
    stored.rename(out.parent / "elsewhere")
    if what == "folder":
        stored.mkdir()
    elif what == "link":
        stored.symlink_to(out.parent / "elsewhere")
    elif what == "pipe":
        os.mkfifo(stored)
    else:
        stored.write_text("")
    assert assert_no_wrong_byte(out, sealed.tree) == {"config.json"}
    with pytest.raises(Tampered):
        check(out, PASSWORD)


def test_a_folder_on_the_way_that_is_a_link(sealed: Sealed, out: Path) -> None:
    folder = stored_of(out, "nested")
    folder.rename(out.parent / "elsewhere")
    folder.symlink_to(out.parent / "elsewhere")
    failed = assert_no_wrong_byte(out, sealed.tree)
    assert failed == {"nested/aligned", "nested/two groups"}


def test_an_older_version_is_found(tmp_path: Path) -> None:
    """Rollback: of one file, of the manifest, and of everything."""
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "w").write_bytes(b"old!" * 3000)
    options = SealOptions(model_id="ab" * 32)
    old = seal_gocryptfs(tree, tmp_path / "r1", PASSWORD, options=options, log2_n=10)
    (tree / "w").write_bytes(b"new!" * 3000)
    following = SealOptions(model_id="ab" * 32, revision=2, previous=old.root)
    new = seal_gocryptfs(tree, tmp_path / "r2", PASSWORD, options=following, log2_n=10)
    with pytest.raises(Tampered) as caught:
        open_model(tmp_path / "r1", PASSWORD, min_revision=2)
    assert caught.value.machine_code == "rollback"
    with pytest.raises(Tampered) as caught:
        open_model(tmp_path / "r1", PASSWORD, expect_root=new.root)
    assert caught.value.machine_code == "root-mismatch"
    for name in ("cai.json", "manifest.cai", "index.cai"):
        mixed = copied(tmp_path / "r2", tmp_path / f"mixed-{name}")
        (mixed / name).write_bytes((tmp_path / "r1" / name).read_bytes())
        with pytest.raises((Tampered, WrongKey)):
            check(mixed, PASSWORD)
    mixed = copied(tmp_path / "r2", tmp_path / "mixed-data")
    (mixed / "data").rename(tmp_path / "aside")
    copied(tmp_path / "r1" / "data", mixed / "data")
    with pytest.raises((Tampered, WrongKey)):
        check(mixed, PASSWORD)


def test_an_older_version_of_one_file_under_the_same_master_key(
    sealed: Sealed, out: Path
) -> None:
    """What stock cannot notice at all: an authentic earlier encryption of the same file."""
    from cai.model.gocryptfs.blocks import BlockCipher, encode_header
    from cai.model.gocryptfs.keys import unlock_directory

    with open_model(out, PASSWORD) as model:
        assert isinstance(model, CipherModel)
        keys, tags = unlock_directory(model.files, PASSWORD), model.tags("nested/aligned")
    older = memoryview(bytearray(2 * STORED_BLOCK))
    plain = memoryview(b"\x01" * 8192)
    older = BlockCipher(keys).encrypt(tags.file_id, 0, plain, older)
    stored = stored_of(out, "nested/aligned")
    stored.write_bytes(encode_header(tags.file_id) + older)
    assert assert_no_wrong_byte(out, sealed.tree) == {"nested/aligned"}
    data = bytearray(stored.read_bytes())
    original = (sealed.out / stored.relative_to(out)).read_bytes()
    data[:HEADER_SIZE + STORED_BLOCK] = original[:HEADER_SIZE + STORED_BLOCK]
    stored.write_bytes(data)  # one old block beside a current one
    assert assert_no_wrong_byte(out, sealed.tree) == {"nested/aligned"}


def test_a_file_that_changes_after_its_group_was_verified(sealed: Sealed, out: Path) -> None:
    """The IVs that are remembered pin the block: a later change is still found."""
    stored = stored_of(out, "nested/two groups")
    with open_model(out, PASSWORD) as model:
        reader = model.open("nested/two groups")
        part = bytearray(4096)
        reader.readinto(8192, memoryview(part))
        assert part == plain_bytes(sealed.tree, "nested/two groups")[8192:12288]
        whole = bytearray(stored.read_bytes())
        at = HEADER_SIZE + 2 * STORED_BLOCK
        for changed in (bytes(STORED_BLOCK), whole[HEADER_SIZE : HEADER_SIZE + STORED_BLOCK]):
            data = bytearray(whole)
            data[at : at + STORED_BLOCK] = changed
            stored.write_bytes(data)
            with pytest.raises(Tampered):
                reader.readinto(8192, memoryview(part))
            assert not any(part)
        stored.write_bytes(whole[: at + 100])
        with pytest.raises(Tampered):
            reader.readinto(8192, memoryview(part))
        reader.close()


def test_the_manifest_of_another_method_is_refused(sealed: Sealed, tmp_path: Path) -> None:
    """cai.json says how the files lie; its MAC covers that."""
    from cai import jcs

    out = copied(sealed.out, tmp_path / "copy")
    header: dict[str, Any] = jcs.parse((out / "cai.json").read_bytes(), what="h", limit=2**16)
    (out / "cai.json").write_bytes(jcs.canonical(header | {"method": "cai"}))
    with pytest.raises((Tampered, WrongKey)):
        open_model(out, Secret(bytes(32)))
    (out / "cai.json").write_bytes(jcs.canonical(header | {"method": "zip"}))
    with pytest.raises(FormatError):
        open_model(out, PASSWORD)


def test_without_cai_json_it_is_no_bare_directory(sealed: Sealed, tmp_path: Path) -> None:
    out = copied(sealed.out, tmp_path / "copy")
    (out / "cai.json").unlink()
    with pytest.raises(InputError, match=r"cai\.json"):
        open_model(out, PASSWORD)


def test_a_wrong_password(sealed: Sealed) -> None:
    with pytest.raises(WrongKey):
        check(sealed.out, Secret(b"another"))


@pytest.mark.parametrize("chunk", [1, 100, 4096, 5000, 65_536, 300_000])
def test_reads_of_any_alignment(chunk: int, sealed: Sealed) -> None:
    path = "nested/two groups"
    expected = plain_bytes(sealed.tree, path)
    offsets = random.Random(chunk).sample(range(len(expected) + 10), 40)
    with open_model(sealed.out, PASSWORD) as model:
        reader = model.open(path)
        for offset in [0, len(expected) - 1, len(expected), 4095, 256 * 4096 - 1, *offsets]:
            data = bytearray(chunk)
            count = reader.readinto(offset, memoryview(data))
            assert data[:count] == expected[offset : offset + chunk]
            assert count == max(0, min(chunk, len(expected) - offset))
        reader.close()


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_random_edits_never_give_a_wrong_byte(sealed: Sealed, tmp_path_factory: Any,
                                              data: st.DataObject) -> None:
    out = copied(sealed.out, tmp_path_factory.mktemp("edit") / "out")
    names = [name for name in files_of(out) if not (out / name).is_symlink()]
    for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True)):
        path = out / name
        content = bytearray(path.read_bytes())
        start = data.draw(st.integers(0, len(content)))
        end = data.draw(st.integers(start, min(len(content), start + 9000)))
        content[start:end] = data.draw(st.binary(max_size=60) | st.just(bytes(end - start)))
        path.write_bytes(content)
    same = all((out / name).read_bytes() == (sealed.out / name).read_bytes() for name in names)
    found = None
    try:
        assert_no_wrong_byte(out, sealed.tree)
        check(out, PASSWORD)
    except CaiError as error:
        found = error
    assert (found is None) == same, found


def test_every_kind_of_change_at_every_file(sealed: Sealed, tmp_path: Path) -> None:
    """Each with the error of its kind, naming the stored file; no other file is touched."""
    out, tried = copied(sealed.out, tmp_path / "out"), 0
    with open_model(out, PASSWORD) as model:
        assert isinstance(model, CipherModel)
        stored = {
            path: out / model.stored.path(path)
            for path, entry in model.entries.items() if entry.type is EntryType.FILE
        }
        others = {path: place.read_bytes() for path, place in stored.items()}
        for path, place in stored.items():
            original = place.read_bytes()
            changes = dict(BLOCK_CHANGES)
            for other, content in others.items():
                if other != path:
                    changes[f"replaced by {other}"] = _put(content)
            for name, edit in changes.items():
                data = bytearray(original)
                edit(data)
                if data == original:
                    continue
                tried += 1
                place.write_bytes(data)
                with pytest.raises(Tampered) as caught:
                    check(out, PASSWORD)
                assert caught.value.path == str(place.relative_to(out)), (path, name)
                if len(data) != len(original):
                    assert "bytes, expected" in caught.value.message, (path, name)
                elif name.startswith("replaced"):
                    assert "file id" in caught.value.message, (path, name)
                else:
                    assert "tags of group 0" in caught.value.message, (path, name)
                failed = {p for p, found in contents(model) if isinstance(found, CaiError)}
                assert failed == ({path} if data or original else set()), (path, name)
            place.write_bytes(original)
    assert tried >= 80
    check(out, PASSWORD)


def _put(content: bytes) -> Callable[[bytearray], None]:
    def edit(data: bytearray) -> None:
        data[:] = content

    return edit
