"""``cai rotate`` and ``cai reseal`` as programs, and what encrypt and inspect say beside them."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cai.model import ReleaseRecord, check, read_key_file

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., "Done"]


class Done:
    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        self.status, self.out, self.err = done.returncode, done.stdout, done.stderr
        assert "Traceback" not in self.err, self.err

    @property
    def value(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self.out)
        return value


@pytest.fixture
def cai(tmp_path: Path) -> Run:
    def run(*arguments: str) -> Done:
        return Done(
            subprocess.run(
                [sys.executable, "-m", "cai", *arguments], cwd=tmp_path, timeout=60, check=False,
                env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
            )
        )

    return run


@pytest.fixture
def sealed(tmp_path: Path, cai: Run) -> dict[str, Any]:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "m" / "w").write_bytes(os.urandom(200_000))
    (tmp_path / "LICENCE").write_text("be kind\nand fair")
    (tmp_path / "TERMS").write_text("I shall be kind")
    return cai(
        "encrypt", "m", "-o", "OUT", "--key-out", "KEY", "--owner-key", "owner.pem",
        "--licence-name", "MIT", "--licence-file", "LICENCE", "--terms-file", "TERMS",
        "--source", "hf:me/m", "--revision", "abc", "--allow-remote-code", "--json",
    ).value


def test_rotate_gives_a_new_key_and_a_new_record(
    cai: Run, sealed: dict[str, Any], tmp_path: Path
) -> None:
    done = cai("rotate", "OUT", "--key-file", "KEY", "--new-key-out", "NEW", "--owner-key",
               "owner.pem", "--record-out", "REC", "--json")  # fmt: skip
    assert done.status == 0
    assert done.value["root"] == sealed["root"]
    assert stat.S_IMODE((tmp_path / "NEW").stat().st_mode) == 0o600
    record = ReleaseRecord.parse((tmp_path / "REC").read_bytes(), owner_key=sealed["owner_key"])
    assert record.kek == read_key_file(tmp_path / "NEW")
    assert record.manifest_root == sealed["root"]
    assert check(tmp_path / "OUT", record.kek, owner_key=sealed["owner_key"])
    assert cai("check", "OUT", "--key-file", "KEY").status == 5
    assert not list(tmp_path.glob("*.partial*"))
    secret = (tmp_path / "NEW").read_text().strip()
    assert secret not in done.out + done.err


def test_rotate_says_what_it_does_not_take_back(cai: Run, sealed: dict[str, Any]) -> None:
    done = cai("rotate", "OUT", "--key-file", "KEY", "--new-key-out", "NEW")
    assert "keeps what they had" in done.out


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["OUT", "--key-file", "KEY"], 2, "no new key"),
        (["OUT", "--key-file", "KEY", "--new-key-file", "KEY"], 2, "old key"),
        (["OUT", "--key-file", "KEY", "--new-key-out", "LICENCE"], 4, "exists already"),
        (["OUT", "--key-file", "KEY", "--new-key-out", "OUT/k"], 2, "inside"),
        (["OUT", "--key-file", "LICENCE", "--new-key-out", "NEW"], 3, "64"),
        (["OUT", "--key-file", "OTHER", "--new-key-out", "NEW"], 5, "key"),
        (["m", "--key-file", "KEY", "--new-key-out", "NEW"], 3, "cai.json"),
        (["gone", "--key-file", "KEY", "--new-key-out", "NEW"], 3, "gone"),
        (["OUT", "--key-file", "KEY", "--new-key-out", "N", "--record-out", "R"], 2, "--owner-key"),
    ],
)
def test_rotations_that_are_refused(
    arguments: list[str], status: int, says: str, cai: Run, sealed: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "OTHER").write_text("0" * 64)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    done = cai("rotate", *arguments)
    assert (done.status, done.out) == (status, "")
    assert says in done.err
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("moment", ["before the step", "after the step", "key named twice"])
def test_a_rotation_that_was_killed_is_finished(
    moment: str, cai: Run, sealed: dict[str, Any], tmp_path: Path
) -> None:
    """The states between the steps, as a kill leaves them."""
    if moment == "before the step":
        (tmp_path / "NEW.partial").write_text("11" * 32 + "\n")
    else:
        assert cai("rotate", "OUT", "--key-file", "KEY", "--new-key-out", "NEW").status == 0
        (tmp_path / "NEW.partial").write_bytes((tmp_path / "NEW").read_bytes())
        if moment == "after the step":
            (tmp_path / "NEW").unlink()
    done = cai("rotate", "OUT", "--key-file", "KEY", "--new-key-out", "NEW", "--json")
    assert done.status == 0, done.err
    assert done.value["already"] is (moment != "before the step")
    assert check(tmp_path / "OUT", read_key_file(tmp_path / "NEW")).root == sealed["root"]
    assert not list(tmp_path.glob("*.partial*"))


def test_a_key_that_a_model_needs_is_not_removed(
    cai: Run, sealed: dict[str, Any], tmp_path: Path
) -> None:
    """Whatever fails after the step, the new key stays."""
    program = (
        "import sys; sys.argv = ['cai', *sys.argv[1:]]\n"
        "import cai.cli.model_keys as keys\n"
        "def finish(self): raise KeyboardInterrupt\n"
        "keys.ModelKeys.finish = finish\n"
        "import cai.cli; cai.cli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "rotate", "OUT", "--key-file", "KEY", "--new-key-out",
         "NEW"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False,
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == 130
    assert check(tmp_path / "OUT", read_key_file(tmp_path / "NEW")).root == sealed["root"]


def test_a_file_of_somebody_else_is_not_taken_for_a_leftover(
    cai: Run, sealed: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "NEW.partial").write_text("my notes")
    done = cai("rotate", "OUT", "--key-file", "KEY", "--new-key-out", "NEW")
    assert done.status == 4
    assert (tmp_path / "NEW.partial").read_text() == "my notes"


def test_reseal_keeps_the_key_unless_told(
    cai: Run, sealed: dict[str, Any], tmp_path: Path
) -> None:
    done = cai("reseal", "OUT", "--key-file", "KEY", "-o", "TWO", "--json")
    assert done.status == 0
    assert "is not: give --owner-key" in done.err
    assert done.value["content_root"] == sealed["content_root"]
    assert done.value["revision"] == 2
    checked = cai("check", "TWO", "--key-file", "KEY", "--min-revision", "2", "--json")
    assert checked.value["root"] == done.value["root"]
    assert cai("check", "OUT", "--key-file", "KEY", "--min-revision", "2").status == 6


def test_reseal_under_a_new_key_with_record_and_signature(
    cai: Run, sealed: dict[str, Any], tmp_path: Path
) -> None:
    done = cai("reseal", "OUT", "--key-file", "KEY", "-o", "TWO", "--new-key-out", "NEW",
               "--owner-key", "owner.pem", "--record-out", "REC", "--json")  # fmt: skip
    assert (done.status, done.err) == (0, "")
    record = ReleaseRecord.parse((tmp_path / "REC").read_bytes(), owner_key=sealed["owner_key"])
    assert (record.min_revision, record.manifest_root) == (2, done.value["root"])
    assert record.kek == read_key_file(tmp_path / "NEW") != read_key_file(tmp_path / "KEY")
    assert cai("check", "TWO", "--key-file", "NEW", "--expect-owner",
               sealed["owner_key"]).status == 0  # fmt: skip
    assert cai("decrypt", "TWO", "BACK", "--key-file", "NEW").status == 0
    assert (tmp_path / "BACK" / "w").read_bytes() == (tmp_path / "m" / "w").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["OUT", "--key-file", "OTHER", "-o", "TWO"], 5, "key"),
        (["OUT", "--key-file", "KEY", "-o", "OUT/x"], 2, "inside"),
        (["OUT", "--key-file", "KEY", "-o", "m"], 2, "exists already"),
        (["OUT", "--key-file", "KEY"], 2, "-o"),
        (["m", "--key-file", "KEY", "-o", "TWO"], 3, "cai.json"),
        (["OUT", "--key-file", "KEY", "-o", "TWO", "--new-key-out", "TWO/k"], 2, "inside"),
    ],
)
def test_resealings_that_are_refused(
    arguments: list[str], status: int, says: str, cai: Run, sealed: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "OTHER").write_text("0" * 64)
    before = sorted(tmp_path.rglob("*"))
    done = cai("reseal", *arguments)
    assert done.status == status
    assert says in done.err
    assert sorted(tmp_path.rglob("*")) == before


def test_inspect_shows_terms_owner_and_provenance(cai: Run, sealed: dict[str, Any]) -> None:
    public = cai("inspect", "OUT", "--json").value
    assert public["signed_by"] == sealed["owner_key"]
    assert public["signature"] == "not verified"
    assert "licence" not in public
    value = cai("inspect", "OUT", "--key-file", "KEY", "--expect-owner", sealed["owner_key"],
                "--json").value  # fmt: skip
    assert value["signature"] == "verified"
    assert (value["licence"], value["licence_terms"]) == ("MIT", "I shall be kind")
    assert value["licence_text"] == "be kind\nand fair"
    assert value["allow"] == ["remote-code"]
    assert value["provenance"]["source"] == "hf:me/m"
    assert value["provenance"]["revision"] == "abc"
    assert {"tool", "python", "cryptography"} <= set(value["provenance"])
    shown = cai("inspect", "OUT", "--key-file", "KEY").out
    assert "I shall be kind" in shown
    assert "and fair" not in shown
    assert "and fair" in cai("inspect", "OUT", "--key-file", "KEY", "--licence").out
    assert cai("inspect", "OUT", "--key-file", "KEY", "--expect-owner", "0" * 64).status == 6
    assert cai("inspect", "OUT", "--expect-owner", "0" * 64).status == 2


def test_encrypt_against_an_older_revision(
    cai: Run, sealed: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "m" / "config.json").write_text('{"new":1}')
    done = cai("encrypt", "m", "-o", "TWO", "--against", "OUT", "--old-key-file", "KEY", "--json")
    assert done.status == 0, done.err
    assert (done.value["carried"], done.value["revision"]) == (1, 2)
    assert done.value["model_id"] == sealed["model_id"]
    assert cai("check", "TWO", "--key-file", "KEY").status == 0
    assert not list(tmp_path.glob("*.key"))
    new = cai("encrypt", "m", "-o", "THREE", "--against", "TWO", "--old-key-file", "KEY",
              "--key-out", "NEW", "--pad", "--json")  # fmt: skip
    assert (new.value["carried"], new.value["revision"]) == (0, 3)
    assert cai("encrypt", "m", "-o", "X", "--against", "OUT").status == 2
    assert cai("encrypt", "m", "-o", "X", "--against", "m", "--key-file", "KEY").status == 3


def test_a_killed_encrypt_left_its_key(cai: Run, sealed: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "K2.partial").write_text("22" * 32 + "\n")
    assert cai("encrypt", "m", "-o", "TWO", "--key-out", "K2").status == 0
    assert (tmp_path / "K2").read_text() == "22" * 32 + "\n"
    (tmp_path / "K3.partial").write_text("22" * 9)  # cut off while it was written
    assert cai("encrypt", "m", "-o", "THREE", "--key-out", "K3").status == 0
    assert (tmp_path / "K3").read_text() != "22" * 32 + "\n"
    assert not list(tmp_path.glob("*.partial*"))


@pytest.mark.parametrize("verb", ["encrypt", "reseal"])
def test_killed_at_the_very_end(
    verb: str, cai: Run, sealed: dict[str, Any], tmp_path: Path
) -> None:
    """The model is there and only the key's second name was left: it goes, the key stays."""
    if verb == "encrypt":
        arguments, key = ("encrypt", "m", "-o", "OUT", "--key-out", "KEY"), tmp_path / "KEY"
    else:
        arguments = ("reseal", "OUT", "--key-file", "KEY", "-o", "TWO", "--new-key-out", "NEW")
        key = tmp_path / "NEW"
        assert cai(*arguments).status == 0
    partial = key.with_name(f"{key.name}.partial")
    partial.write_bytes(key.read_bytes())
    assert cai(*arguments).status == 2
    assert key.exists()
    assert not partial.exists()
    partial.write_text("33" * 32)  # another key: whose, nobody knows
    assert cai(*arguments).status in (2, 4)
    assert partial.exists()
