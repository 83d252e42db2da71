"""Where keys come from after a run that was killed, and what of it may be replaced."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cai.cli.model_keys import ModelKeys
from cai.cli.owner_keys import private_pem
from cai.errors import CaiError, StorageError, UsageError
from cai.model import check, new_key, seal, write_key_file
from cai.model.journal import Journal
from cai.terminal import Terminal

NOTHING: dict[str, Any] = dict.fromkeys(
    ("key_out", "key_file", "kbs", "key_id", "admin_key", "owner_key", "record_out")
)


class Killed(BaseException):
    """Stands for a process that is gone."""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "m").mkdir()
    for number in range(3):
        (tmp_path / "m" / f"w{number}").write_bytes(os.urandom(100_000))
    for name in ("owner.pem", "admin.pem"):
        pem = private_pem(Ed25519PrivateKey.generate()).reveal()
        (tmp_path / name).write_bytes(pem)
    return tmp_path


def chosen(place: Path, **options: Any) -> ModelKeys:
    return ModelKeys.chosen(place / "m", place / "OUT", **(NOTHING | options))


def killed(place: Path, keys: ModelKeys, *, at: str) -> None:
    """A sealing that dies after its first object, or just before the model appears."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cai.model.stage.remove_tree", lambda _path: None)
        original = Journal.add

        def add(self: Journal, finished: Any) -> None:
            original(self, finished)
            if at == "object":
                raise Killed

        patch.setattr(Journal, "add", add)

        def placed(report: Any) -> None:
            keys.upload = None
            keys.place(report, Terminal("cai", json_output=True))
            raise Killed

        keys.stage()
        with pytest.raises(Killed):
            seal(place / "m", place / "OUT", keys.kek, journal=keys.journal, before_commit=placed)


def kbs(place: Path) -> dict[str, Any]:
    return {
        "kbs": "http://127.0.0.1:1", "key_id": "kbs:///a/b/c", "admin_key": place / "admin.pem",
        "owner_key": place / "owner.pem",
    }  # fmt: skip


def test_a_key_that_was_in_no_file_comes_back_from_the_journal(place: Path) -> None:
    keys = chosen(place, **kbs(place))
    killed(place, keys, at="object")
    assert not [p for p in place.rglob("*") if p.is_file() and keys.kek.reveal() in p.read_bytes()]
    assert chosen(place, **kbs(place)).kek == keys.kek
    (place / "owner.pem").write_bytes(private_pem(Ed25519PrivateKey.generate()).reveal())
    assert chosen(place, **kbs(place)).kek != keys.kek


@pytest.mark.parametrize("key", ["out", "file"])
@pytest.mark.parametrize("at", ["object", "end"])
def test_the_same_command_goes_on(key: str, at: str, place: Path) -> None:
    options: dict[str, Any] = {"owner_key": place / "owner.pem", "record_out": place / "REC"}
    if key == "out":
        options["key_out"] = place / "KEY"
    else:
        write_key_file(place / "KEY", new_key())
        options["key_file"] = place / "KEY"
    first = chosen(place, **options)
    killed(place, first, at=at)
    assert (place / "REC").exists() is (at == "end")
    again = chosen(place, **options)
    assert again.kek == first.kek
    again.stage()
    report = seal(
        place / "m", place / "OUT", again.kek, journal=again.journal,
        before_commit=lambda made: again.place(made, Terminal("cai", json_output=True)),
    )  # fmt: skip
    again.finish()
    assert report.resumed >= 1
    check(place / "OUT", again.kek)
    assert {path.name for path in place.iterdir()} == {
        "m", "OUT", "KEY", "REC", "owner.pem", "admin.pem",
    }  # fmt: skip


def test_a_record_of_another_time_is_not_replaced(place: Path) -> None:
    """Only what the killed run itself had written may be replaced."""
    write_key_file(place / "KEY", new_key())
    options = {"key_file": place / "KEY", "owner_key": place / "owner.pem",
               "record_out": place / "REC"}  # fmt: skip
    killed(place, chosen(place, **options), at="end")
    chosen(place, **options)
    for path in place.glob("OUT.partial-*/journal"):
        path.unlink()
    with pytest.raises(StorageError, match="REC"):
        chosen(place, **options)


def test_files_that_a_kill_left_empty_are_written_again(place: Path) -> None:
    options = {"key_out": place / "KEY", "owner_key": place / "new.pem", "record_out": place / "R"}
    killed(place, chosen(place, **options), at="object")
    (place / "new.pem").touch()
    (place / "R").touch()
    keys = chosen(place, **options)
    keys.stage()
    seal(
        place / "m", place / "OUT", keys.kek,
        before_commit=lambda made: keys.place(made, Terminal("cai", json_output=True)),
    )
    keys.finish()
    assert all((place / name).stat().st_size for name in ("KEY", "new.pem", "R"))


@pytest.mark.parametrize("content", ["somebody's notes", "{}"])
def test_other_files_are_never_replaced(content: str, place: Path) -> None:
    options = {"key_out": place / "KEY", "owner_key": place / "owner.pem",
               "record_out": place / "REC"}  # fmt: skip
    killed(place, chosen(place, **options), at="object")
    (place / "REC").write_text(content)
    with pytest.raises(StorageError, match="REC"):
        chosen(place, **options)
    (place / "REC").unlink()
    (place / "KEY").write_text(content)
    with pytest.raises(StorageError, match="KEY"):
        chosen(place, **options)
    assert (place / "KEY").read_text() == content


def test_another_key_of_that_name_is_not_taken(place: Path) -> None:
    killed(place, chosen(place, key_out=place / "KEY"), at="object")
    write_key_file(place / "KEY", new_key())
    with pytest.raises(StorageError, match="KEY"):
        chosen(place, key_out=place / "KEY")


def test_a_rotation_needs_no_default_key(place: Path) -> None:
    with pytest.raises(CaiError):
        chosen(place, rotating=True, record_out=place / "REC")
    with pytest.raises(UsageError, match="inside"):
        chosen(place, key_out=place / "m" / "k")
