"""Killed at any moment: the same command goes on, and ends with a whole model and nothing else.

``CAI_KILLS=50`` runs the full number of moments; the normal run takes a few.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from cai.errors import InputError, StorageError, WrongKey
from cai.model import (
    SealOptions,
    check,
    content_root_of_tree,
    new_key,
    open_model,
    read_key_file,
    reseal,
    seal,
    unseal,
)
from cai.model import sealer as sealer_module
from cai.model.journal import JOURNAL_FILE, Finished, Journal, read_journal
from cai.model.sealing import interrupted_kek
from cai.model.stage import Stage
from cai.secret import Secret

ROOT = Path(__file__).resolve().parents[2]
KILLS = int(os.environ.get("CAI_KILLS", "4"))


class Killed(BaseException):
    """Stands for a process that is gone: nothing of it is undone."""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "sub").mkdir(parents=True)
    for number in range(6):
        (root / "sub" / f"w{number}").write_bytes(os.urandom(200_000 + number))
    (root / "config.json").write_text("{}")
    return root


def die_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop dead after so many objects: no clean-up, as after kill -9."""
    original, done = Journal.add, 0

    def add(self: Journal, finished: Finished) -> None:
        nonlocal done
        original(self, finished)
        done += 1
        if done >= count:
            raise Killed

    monkeypatch.setattr(Journal, "add", add)
    monkeypatch.setattr("cai.model.stage.remove_tree", lambda _path: None)


def killed(count: int, tree: Path, out: Path, kek: Secret, **more: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        die_after(count, patch)
        with pytest.raises(Killed):
            seal(tree, out, kek, options=SealOptions(workers=1), **more)  # type: ignore[arg-type]


def partials(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if ".partial" in path.name]


def test_what_was_finished_is_not_written_again(tree: Path, tmp_path: Path) -> None:
    kek = new_key()
    killed(3, tree, tmp_path / "out", kek)
    (partial,) = partials(tmp_path)
    journal = read_journal(partial, kek)
    assert journal is not None
    noted = {done.stored.name: done.stored.key for done in journal[1]}
    assert len(noted) >= 3
    report = seal(tree, tmp_path / "out", kek)
    assert report.resumed == len(noted)
    assert check(tmp_path / "out", kek).content_root == content_root_of_tree(tree)
    assert partials(tmp_path) == []
    with open_model(tmp_path / "out", kek) as model:
        found = {stored.name: stored.key for stored in model.manifest.stored.values()}
    assert noted.items() <= found.items()


def test_nothing_is_encrypted_twice_under_one_salt(tree: Path, tmp_path: Path) -> None:
    """What was begun and not finished is thrown away; its salt never comes back."""
    kek = new_key()
    killed(2, tree, tmp_path / "out", kek)
    (partial,) = partials(tmp_path)
    salts = {path.read_bytes()[16:48]: path.name for path in (partial / "objects").iterdir()}
    (tree / "sub" / "w5").write_bytes(os.urandom(210_000))
    seal(tree, tmp_path / "out", kek)
    after = [path.read_bytes()[16:48] for path in (tmp_path / "out" / "objects").iterdir()]
    assert len(set(after)) == len(after) == 6
    for path in (tmp_path / "out" / "objects").iterdir():
        salt = path.read_bytes()[16:48]
        assert salt not in salts or salts[salt] == path.name


@pytest.mark.parametrize("change", ["content", "times", "gone", "new"])
def test_a_source_that_changed_meanwhile(change: str, tree: Path, tmp_path: Path) -> None:
    kek = new_key()
    killed(5, tree, tmp_path / "out", kek)
    for number in range(6):
        path = tree / "sub" / f"w{number}"
        if change == "content":
            path.write_bytes(os.urandom(path.stat().st_size))
        elif change == "times":
            os.utime(path)
        elif change == "gone":
            path.unlink()
        else:
            data = path.read_bytes()
            path.unlink()
            path.write_bytes(data)
    report = seal(tree, tmp_path / "out", kek)
    assert report.resumed == 0
    assert check(tmp_path / "out", kek).content_root == content_root_of_tree(tree)


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "head", "link"])
def test_a_finished_object_that_is_not_whole_any_more(
    damage: str, tree: Path, tmp_path: Path
) -> None:
    kek = new_key()
    killed(6, tree, tmp_path / "out", kek)
    (partial,) = partials(tmp_path)
    victim = min((partial / "objects").iterdir())
    data = bytearray(victim.read_bytes())
    if damage == "link":
        victim.rename(tmp_path / "elsewhere")
        victim.symlink_to(tmp_path / "elsewhere")
    elif damage == "missing":
        victim.unlink()
    else:
        data[20_000 if damage == "flip" else 100] ^= 1
        victim.write_bytes(data[:-1] if damage == "cut" else data)
    report = seal(tree, tmp_path / "out", kek)
    assert report.resumed == 5
    check(tmp_path / "out", kek)


@pytest.mark.parametrize("damage", ["torn", "garbage", "flip", "missing", "empty", "huge line"])
def test_a_journal_that_is_damaged(damage: str, tree: Path, tmp_path: Path) -> None:
    kek = new_key()
    killed(6, tree, tmp_path / "out", kek)
    (partial,) = partials(tmp_path)
    path = partial / JOURNAL_FILE
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(
            {
                "torn": data[:-10], "garbage": data + b"\0\0\0\x20" + os.urandom(32), "empty": b"",
                "flip": data[:50] + bytes([data[50] ^ 1]) + data[51:],
                "huge line": data + b"\xff\xff\xff\xff",
            }[damage]
        )  # fmt: skip
    report = seal(tree, tmp_path / "out", kek)
    expected = {"torn": 5, "garbage": 6, "huge line": 6}
    assert report.resumed == expected.get(damage, 0)
    assert check(tmp_path / "out", kek).content_root == content_root_of_tree(tree)
    assert partials(tmp_path) == []


def test_a_run_under_another_key_begins_anew(tree: Path, tmp_path: Path) -> None:
    killed(4, tree, tmp_path / "out", new_key())
    kek = new_key()
    assert seal(tree, tmp_path / "out", kek).resumed == 0
    check(tmp_path / "out", kek)
    assert partials(tmp_path) == []


def test_a_run_may_begin_anew(tree: Path, tmp_path: Path) -> None:
    kek = new_key()
    killed(4, tree, tmp_path / "out", kek)
    assert seal(tree, tmp_path / "out", kek, resume=False).resumed == 0
    assert partials(tmp_path) == []


def test_the_journal_tells_nothing_without_the_key(tree: Path, tmp_path: Path) -> None:
    kek = new_key()
    killed(6, tree, tmp_path / "out", kek)
    (partial,) = partials(tmp_path)
    journal = read_journal(partial, kek)
    assert journal is not None
    data = (partial / JOURNAL_FILE).read_bytes()
    assert b"sub/w" not in data
    for done in journal[1]:
        assert done.stored.key not in data
        assert done.stored.key.hex().encode() not in data
    assert read_journal(partial, new_key()) is None


def test_a_run_that_still_works_is_left_alone(tree: Path, tmp_path: Path) -> None:
    kek = new_key()
    with Stage(tmp_path / "out") as running:
        (running.path / "mine").write_text("x")
        assert seal(tree, tmp_path / "out", kek).resumed == 0
        assert (running.path / "mine").read_text() == "x"
    check(tmp_path / "out", kek)


def test_what_only_looks_like_a_leftover_stays(tree: Path, tmp_path: Path) -> None:
    theirs = [tmp_path / "out.partial-mine", tmp_path / "other.partial-abcdefgh"]
    for path in theirs:
        path.mkdir()
    (tmp_path / "out.partial-abcdefgh").write_text("a file")
    seal(tree, tmp_path / "out", new_key())
    assert all(path.is_dir() for path in theirs)
    assert (tmp_path / "out.partial-abcdefgh").read_text() == "a file"


def test_plaintext_of_a_killed_decryption_is_cleared_away(tree: Path, tmp_path: Path) -> None:
    kek = new_key()
    seal(tree, tmp_path / "out", kek)
    left = tmp_path / "back.partial-abcd_123"
    (left / "closed").mkdir(parents=True)
    (left / "closed" / "plain").write_text("secret")
    (left / "closed").chmod(0o500)
    with open_model(tmp_path / "out", kek) as model:
        unseal(model, tmp_path / "back")
    assert not left.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_listed(tree: Path, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o300)
    seal(tree, closed / "out", new_key())


def test_a_key_that_is_on_no_disk_comes_from_the_journal(tree: Path, tmp_path: Path) -> None:
    kek, secret = new_key(), Secret(os.urandom(32))
    killed(2, tree, tmp_path / "out", kek, journal=secret)
    assert interrupted_kek(tmp_path / "out", Secret(os.urandom(32))) is None
    assert interrupted_kek(tmp_path / "out", secret) == kek
    assert seal(tree, tmp_path / "out", kek, journal=secret).resumed >= 2
    assert interrupted_kek(tmp_path / "out", secret) is None


def test_a_resealing_goes_on_too(tree: Path, tmp_path: Path) -> None:
    kek = new_key()
    seal(tree, tmp_path / "one", kek)
    with open_model(tmp_path / "one", kek) as model:
        with pytest.MonkeyPatch.context() as patch:
            die_after(2, patch)
            with pytest.raises(Killed):
                reseal(model, tmp_path / "two", kek)
        report = reseal(model, tmp_path / "two", kek)
    assert report.resumed >= 2
    assert check(tmp_path / "two", kek).content_root == content_root_of_tree(tree)


def test_one_bad_file_stops_the_others(tree: Path, tmp_path: Path) -> None:
    """The first failure is the one that is told."""
    def failing(*more: object, **named: object) -> object:
        raise StorageError("the disk is on fire")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sealer_module, "write_object", failing)
        with pytest.raises(StorageError, match="on fire"):
            seal(tree, tmp_path / "out", new_key())
    assert partials(tmp_path) == []


def test_a_source_that_vanishes_is_told_as_that(tree: Path, tmp_path: Path) -> None:
    def vanish(_what: str, _total: int | None) -> object:
        (tree / "sub" / "w3").unlink()
        from contextlib import nullcontext

        return nullcontext(lambda _amount: None)

    with pytest.raises(InputError, match="w3"):
        seal(tree, tmp_path / "out", new_key(), progress=vanish)  # type: ignore[arg-type]
    assert partials(tmp_path) == []


# Real processes and a real SIGKILL, through the command line.


def start(cwd: Path, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "cai", *arguments], cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def finish(cwd: Path, *arguments: str) -> dict[str, object]:
    process = start(cwd, *arguments, "--json")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, (out, err)
    value: dict[str, object] = json.loads(out)
    return value


def kill_at(moment: float, cwd: Path, *arguments: str) -> bool:
    """Run and SIGKILL after ``moment`` seconds; whether it was still running."""
    process = start(cwd, *arguments)
    with suppress(subprocess.TimeoutExpired):
        process.wait(moment)
    running = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return running


def test_kill_encrypt_at_random_moments(tmp_path: Path) -> None:
    root = tmp_path / "m"
    root.mkdir()
    rng = random.Random(3)
    for number in range(40):
        (root / f"w{number}").write_bytes(rng.randbytes(1_500_000 + number))
    expected = content_root_of_tree(root)
    arguments = ("encrypt", "m", "-o", "OUT", "--key-out", "KEY", "--owner-key", "owner.pem",
                 "--record-out", "RECORD")  # fmt: skip
    started = time.monotonic()
    finish(tmp_path, *arguments)
    whole = time.monotonic() - started
    resumed = 0
    for number in range(KILLS):
        for name in ("KEY", "RECORD"):
            (tmp_path / name).unlink(missing_ok=True)
        subprocess.run(["rm", "-rf", tmp_path / "OUT"], check=True)
        kill_at(rng.uniform(0.15, 1.1) * whole, tmp_path, *arguments)
        if (tmp_path / "OUT").exists():
            # It had come to its end, or within a step of it: nothing but a name may be left.
            process = start(tmp_path, *arguments)
            process.communicate(timeout=60)
            assert process.returncode == 2
        else:
            resumed += int(str(finish(tmp_path, *arguments)["resumed"]))
        kek = read_key_file(tmp_path / "KEY")
        assert check(tmp_path / "OUT", kek).content_root == expected, number
        assert {path.name for path in tmp_path.iterdir()} == {
            "m", "OUT", "KEY", "RECORD", "owner.pem",
        }, number  # fmt: skip
    assert resumed or KILLS < 10, "no run was cut in the middle"


def test_kill_rotate_at_random_moments(tmp_path: Path) -> None:
    root = tmp_path / "m"
    root.mkdir()
    (root / "w").write_bytes(os.urandom(300_000))
    first = finish(tmp_path, "encrypt", "m", "-o", "OUT", "--key-out", "KEY0")
    started = time.monotonic()
    finish(tmp_path, "rotate", "OUT", "--key-file", "KEY0", "--new-key-out", "KEY1")
    whole = time.monotonic() - started
    rng, current = random.Random(4), 1
    for number in range(KILLS):
        arguments = ("rotate", "OUT", "--key-file", f"KEY{current}",
                     "--new-key-out", f"KEY{current + 1}")  # fmt: skip
        kill_at(rng.uniform(0.5, 1.05) * whole, tmp_path, *arguments)
        # At every moment it opens under one of the keys that are on the disk.
        keys = [tmp_path / f"KEY{current}", tmp_path / f"KEY{current + 1}",
                tmp_path / f"KEY{current + 1}.partial"]  # fmt: skip
        opened = 0
        for path in keys:
            if path.exists() and path.stat().st_size == 65:
                with suppress(WrongKey):
                    opened += check(tmp_path / "OUT", read_key_file(path)).root == first["root"]
        assert opened, number
        if not (tmp_path / keys[1]).exists() or (tmp_path / keys[2]).exists():
            finish(tmp_path, *arguments)
        current += 1
        assert check(tmp_path / "OUT", read_key_file(keys[1])).root == first["root"], number
        assert {path.name for path in tmp_path.iterdir()} == {
            "m", "OUT", *(f"KEY{i}" for i in range(current + 1)),
        }, number  # fmt: skip
