"""A flipped byte anywhere in a sealed model is found, and the file that holds it is named."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from cai import jcs
from cai.errors import CaiError, FormatError, Tampered, WrongKey
from cai.model import SealOptions, check, new_key, open_model, seal
from cai.model.index import encode_index, index_digest, parse_index
from cai.secret import Secret


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Secret]:
    work = tmp_path_factory.mktemp("tamper")
    (work / "root").mkdir()
    (work / "root" / "weights").write_bytes(os.urandom(65_536 + 4096))
    (work / "root" / "config.json").write_text("{}")
    kek = new_key()
    options = SealOptions(chunk=65_536, workers=1)
    seal(work / "root", work / "sealed", kek, options=options)
    return work / "sealed", kek


def offsets(path: Path) -> Iterable[int]:
    """Every byte of the small files; of the large ones the fields, tags, borders and a stride."""
    size = path.stat().st_size
    if size < 65_536:
        return range(size)
    dense = [*range(64), *range(4088, 4200), *range(8184, 8200), *range(size - 8, size)]
    return sorted({*dense, *range(0, size, 509 if size < 2**20 else 4099)})


@pytest.mark.parametrize("which", ["cai.json", "index.cai", "manifest.cai", "objects"])
def test_a_flipped_bit_anywhere(which: str, small: tuple[Path, Secret]) -> None:
    out, kek = small
    path = out / which
    if which == "objects":
        (path,) = path.iterdir()
    stored = str(path.relative_to(out))
    check(out, kek, workers=1)
    with path.open("r+b", buffering=0) as file:
        for offset in offsets(path):
            original = os.pread(file.fileno(), 1, offset)
            os.pwrite(file.fileno(), bytes([original[0] ^ (1 << offset % 8)]), offset)
            try:
                with pytest.raises(CaiError) as caught:
                    check(out, kek, workers=1)
            finally:
                os.pwrite(file.fileno(), original, offset)
            assert isinstance(caught.value, (Tampered, FormatError, WrongKey)), offset
            assert stored in caught.value.message, (offset, caught.value.message)
    check(out, kek, workers=1)


def test_every_length_of_the_small_files_but_the_right_one(small: tuple[Path, Secret]) -> None:
    out, kek = small
    for name in ("cai.json", "index.cai"):
        data = (out / name).read_bytes()
        for length in range(len(data)):
            (out / name).write_bytes(data[:length])
            with pytest.raises(CaiError, match=name.replace(".", r"\.")):
                check(out, kek, workers=1)
        (out / name).write_bytes(data)
    check(out, kek, workers=1)


def copied(sealed: Path, target: Path) -> Path:
    for path in [sealed, *sorted(sealed.rglob("*"))]:
        place = target / path.relative_to(sealed)
        if path.is_dir():
            place.mkdir()
        else:
            place.write_bytes(path.read_bytes())
    return target


def test_a_consistent_lie_of_the_index_is_found(
    small: tuple[Path, Secret], tmp_path: Path
) -> None:
    """Index and its digest in cai.json are both replaced: the MAC stands in the way."""
    out, kek = copied(small[0], tmp_path / "copy"), small[1]
    files = parse_index((out / "index.cai").read_bytes())
    del files[max(files)]
    index = encode_index(files)
    (out / "index.cai").write_bytes(index)
    header = jcs.parse((out / "cai.json").read_bytes(), what="header", limit=2**16)
    header["index"] = {"sha256": index_digest(index), "size": len(index)}
    (out / "cai.json").write_bytes(jcs.canonical(header))
    with pytest.raises(Tampered, match=r"cai\.json"):
        check(out, kek)


def test_parts_of_two_sealings_do_not_mix(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "w").write_bytes(bytes(70_000))
    kek, model_id = new_key(), "ab" * 32
    for revision in (1, 2):
        options = SealOptions(model_id=model_id, revision=revision)
        seal(tmp_path / "root", tmp_path / f"r{revision}", kek, options=options)
    for name in ("manifest.cai", "index.cai", "cai.json"):
        mixed = copied(tmp_path / "r2", tmp_path / f"mixed-{name}")
        (mixed / name).write_bytes((tmp_path / "r1" / name).read_bytes())
        with pytest.raises(Tampered):
            check(mixed, kek)


def test_an_older_revision_is_refused(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    kek = new_key()
    report = seal(tmp_path / "root", tmp_path / "out", kek, options=SealOptions(revision=4))
    open_model(tmp_path / "out", kek, min_revision=4, expect_root=report.root).close()
    with pytest.raises(Tampered) as caught:
        open_model(tmp_path / "out", kek, min_revision=5)
    assert caught.value.machine_code == "rollback"


def test_another_model_under_the_same_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    kek = new_key()
    reports = [seal(tmp_path / "root", tmp_path / f"out{n}", kek) for n in range(2)]
    with pytest.raises(Tampered) as caught:
        open_model(tmp_path / "out0", kek, expect_root=reports[1].root)
    assert caught.value.machine_code == "root-mismatch"


def test_the_index_that_the_record_names(small: tuple[Path, Secret]) -> None:
    out, kek = small
    check(out, kek, index_sha256=index_digest((out / "index.cai").read_bytes()))
    with pytest.raises(Tampered, match=r"index\.cai"):
        check(out, kek, index_sha256="00" * 32)


@pytest.mark.parametrize("place", ["extra", "objects/extra", "objects/" + "f" * 32, ".hidden"])
def test_something_that_does_not_belong(
    place: str, small: tuple[Path, Secret], tmp_path: Path
) -> None:
    out = copied(small[0], tmp_path / "copy")
    (out / place).mkdir()
    with pytest.raises(Tampered, match=place):
        check(out, small[1])


@pytest.mark.parametrize("name", ["cai.json", "manifest.cai", "index.cai", "objects"])
def test_stored_files_are_not_followed_through_links(
    name: str, small: tuple[Path, Secret], tmp_path: Path
) -> None:
    out = copied(small[0], tmp_path / "copy")
    (out / name).rename(tmp_path / "elsewhere")
    (out / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Tampered, match=name.replace(".", r"\.")):
        check(out, small[1])


def test_a_pipe_in_the_place_of_an_object_is_not_waited_for(
    small: tuple[Path, Secret], tmp_path: Path
) -> None:
    out = copied(small[0], tmp_path / "copy")
    (stored,) = (out / "objects").iterdir()
    stored.unlink()
    os.mkfifo(stored)
    with open_model(out, small[1]) as model, pytest.raises(Tampered, match=stored.name):
        model.open("weights")


def test_a_wrong_key(small: tuple[Path, Secret]) -> None:
    with pytest.raises(WrongKey):
        check(small[0], new_key())


def test_an_enormous_cai_json_is_not_read(small: tuple[Path, Secret], tmp_path: Path) -> None:
    out = copied(small[0], tmp_path / "copy")
    with (out / "cai.json").open("r+b") as file:
        file.truncate(2**40)
    with pytest.raises(CaiError, match=r"cai\.json"):
        check(out, small[1])
