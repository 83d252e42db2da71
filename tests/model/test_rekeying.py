"""Rotating the wrapping key, and resealing under new object keys."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from cai.errors import FormatError, StorageError, Tampered, UsageError, WrongKey
from cai.model import (
    Licence,
    SealOptions,
    SealReport,
    check,
    new_key,
    open_model,
    reseal,
    rotate,
    seal,
)
from cai.model import stage as stage_module
from cai.secret import Secret

Sealed = tuple[Path, Secret, SealReport]


def contents(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def test_a_rotation_rewrites_the_header_alone(sealed: Sealed, tmp_path: Path) -> None:
    out, kek, report = sealed
    before, new = contents(out), new_key()
    assert rotate(out, kek, new).root == report.root
    after = contents(out)
    assert {name for name in after if after[name] != before.get(name)} == {"cai.json"}
    assert check(out, new).root == report.root
    with pytest.raises(WrongKey):
        open_model(out, kek)
    assert [p.name for p in tmp_path.iterdir() if ".partial" in p.name] == []
    # A holder of the old key and the old header keeps what it had; the command says so.
    (out / "cai.json").write_bytes(before["cai.json"])
    assert check(out, kek).root == report.root


def test_a_rotation_can_be_repeated(sealed: Sealed) -> None:
    out, kek, _ = sealed
    new = new_key()
    assert not rotate(out, kek, new).already
    assert rotate(out, kek, new).already


@pytest.mark.parametrize("case", ["wrong key", "same key", "short key", "tampered", "busy"])
def test_rotations_that_are_refused(case: str, sealed: Sealed) -> None:
    out, kek, _ = sealed
    old, new = kek, new_key()
    expected: type[Exception] = WrongKey
    lock = -1
    if case == "wrong key":
        old = new_key()
    elif case == "same key":
        new, expected = kek, UsageError
    elif case == "short key":
        new, expected = Secret(b"x"), FormatError
    elif case == "busy":
        lock, expected = os.open(out, os.O_RDONLY), StorageError
        fcntl.flock(lock, fcntl.LOCK_EX)
    else:
        data = bytearray((out / "manifest.cai").read_bytes())
        data[10_000] ^= 1
        (out / "manifest.cai").write_bytes(data)
        expected = Tampered
    before = contents(out)
    with pytest.raises(expected):
        rotate(out, old, new)
    assert contents(out) == before
    if lock >= 0:
        os.close(lock)


def test_what_stops_before_the_step_changes_nothing(sealed: Sealed) -> None:
    out, kek, report = sealed
    before = contents(out)

    def stop(_report: object) -> None:
        raise StorageError("no place for the key")

    with pytest.raises(StorageError):
        rotate(out, kek, new_key(), before_commit=stop)
    assert contents(out) == before
    assert check(out, kek).root == report.root


def test_a_full_disk_changes_nothing(
    sealed: Sealed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, kek, report = sealed

    def full(_handle: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(stage_module.os, "fsync", full)
    with pytest.raises(StorageError):
        rotate(out, kek, new_key())
    monkeypatch.undo()
    assert check(out, kek).root == report.root
    assert [p.name for p in tmp_path.iterdir() if ".partial" in p.name] == []


def test_a_resealing_shares_nothing_but_the_content(sample: Path, tmp_path: Path) -> None:
    kek, new = new_key(), new_key()
    options = SealOptions(
        name="n", licence=Licence("MIT", "terms", "text"), allow=("remote-code",), revision=4,
        provenance={"source": "here"}, pad=True,
    )  # fmt: skip
    report = seal(sample, tmp_path / "one", kek, options=options)
    with open_model(tmp_path / "one", kek) as old:
        made = reseal(old, tmp_path / "two", new)
        stored = {
            (s.name, s.key, s.digest, s.shape.size) for s in old.manifest.stored.values()
        }
        kept = old.manifest
    assert (made.revision, made.content_root) == (5, report.content_root)
    assert check(tmp_path / "two", new).content_root == report.content_root
    with open_model(tmp_path / "two", new, min_revision=5) as model:
        manifest = model.manifest
        assert manifest.previous == report.root
        assert (manifest.name, manifest.licence, manifest.allow, manifest.provenance) == (
            kept.name, kept.licence, kept.allow, kept.provenance,
        )  # fmt: skip
        for item in manifest.stored.values():
            assert item.shape.size in {size for *_, size in stored}  # still padded
            assert not {item.name, item.key, item.digest} & {x for s in stored for x in s[:3]}
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert not set(one.values()) & set(two.values())
    check(tmp_path / "one", kek)


def test_nothing_tampered_is_resealed(sealed: Sealed, tmp_path: Path) -> None:
    out, kek, _ = sealed
    victim = max((out / "objects").iterdir())
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    with open_model(out, kek) as model, pytest.raises(Tampered, match=victim.name):
        reseal(model, tmp_path / "two", kek)
    assert not (tmp_path / "two").exists()
    assert [p.name for p in tmp_path.iterdir() if ".partial" in p.name] == []


def test_outputs_that_are_refused(sealed: Sealed, tmp_path: Path) -> None:
    out, kek, _ = sealed
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    with open_model(out, kek) as model:
        for target in (out / "x", out, out / "objects" / "x", tmp_path / "full"):
            with pytest.raises(UsageError):
                reseal(model, target, kek)
    check(out, kek)
