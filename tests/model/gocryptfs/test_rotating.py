"""Another password for a gocryptfs model: three small files change, in a safe order."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from cai.errors import FormatError, StorageError, Tampered, UsageError, WrongKey
from cai.model import check, open_model, read_header
from cai.model.gocryptfs import rotating
from cai.model.gocryptfs.config import Config
from cai.model.gocryptfs.rotating import opens_with, rotate_password
from cai.secret import Secret
from tests.model.gocryptfs.trees import PASSWORD, Sealed

NEW = Secret(b"another password")
CHANGED = {"cai.json", "index.cai", "data/gocryptfs.conf"}


def contents(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in out.rglob("*") if path.is_file() and not path.is_symlink()
    }


def rotate(out: Path, old: Secret = PASSWORD, new: Secret = NEW) -> rotating.RotateReport:
    return rotate_password(out, old, new, log2_n=10)


def test_three_files_change(sealed: Sealed, out: Path) -> None:
    before = contents(out)
    report = rotate(out)
    after = contents(out)
    assert {name for name in after if after[name] != before.get(name)} == CHANGED
    assert set(before) == set(after)
    assert (report.root, report.already) == (sealed.report.root, False)
    assert report.index_sha256 == read_header(out).index_sha256
    assert check(out, NEW, index_sha256=report.index_sha256).root == sealed.report.root
    with pytest.raises(WrongKey):
        open_model(out, PASSWORD)
    assert (out / "data" / "gocryptfs.conf").stat().st_mode & 0o777 == 0o400
    assert not [path for path in out.parent.iterdir() if "partial" in path.name]


def test_it_can_be_repeated(out: Path) -> None:
    first = rotate(out)
    state = contents(out)
    again = rotate(out)
    assert again.already
    assert again.index_sha256 == first.index_sha256
    assert contents(out) == state


@pytest.mark.parametrize("step", [0, 1, 2])
@pytest.mark.parametrize("other", [False, True])
def test_a_killed_run_is_finished_by_the_next(
    step: int, other: bool, out: Path, sealed: Sealed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was replaced, the old password opens it until the new one does."""
    replaced = 0
    real = Path.replace

    def stop(self: Path, target: Path) -> Path:
        nonlocal replaced
        if self.parent.name.startswith("out.partial-"):
            if replaced == step:
                raise KeyboardInterrupt
            replaced += 1
        return real(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            rotate(out)
    assert replaced == step
    assert not opens_with(out, NEW)
    with open_model(out, PASSWORD) as model:
        assert model.root == sealed.report.root
    final = Secret(b"a third one") if other else NEW
    assert rotate(out, new=final).root == sealed.report.root
    assert check(out, final).root == sealed.report.root


def test_after_stock_changed_the_password(out: Path, sealed: Sealed) -> None:
    """``gocryptfs -passwd`` leaves an index that lists the old file; a rotation puts that right."""
    conf = out / "data" / "gocryptfs.conf"
    master_key = Config.parse(conf.read_bytes()).unlock(PASSWORD)
    changed = Config.create(NEW, master_key, log2_n=10).encode()
    conf.chmod(0o600)
    conf.write_bytes(changed)
    with pytest.raises(Tampered) as caught:
        check(out, NEW)
    assert caught.value.path == "data/gocryptfs.conf"
    assert rotate(out, PASSWORD, NEW).already
    assert check(out, NEW).root == sealed.report.root
    assert conf.read_bytes() == changed


@pytest.mark.parametrize("name", ["index.cai", "cai.json", "manifest.cai"])
def test_nothing_altered_is_put_under_a_new_password(name: str, out: Path) -> None:
    path = out / name
    data = bytearray(path.read_bytes())
    at = data.index(b'"blake3":["') + 12 if name == "index.cai" else len(data) // 2
    data[at] = ord("0") if data[at] != ord("0") else ord("1")
    path.write_bytes(data)
    before = contents(out)
    with pytest.raises((Tampered, FormatError)):
        rotate(out)
    assert contents(out) == before


def test_a_conf_of_other_keys_is_not_the_models(out: Path) -> None:
    conf = out / "data" / "gocryptfs.conf"
    conf.chmod(0o600)
    conf.write_bytes(Config.create(PASSWORD, bytes(32), log2_n=10).encode())
    with pytest.raises((WrongKey, Tampered)):
        rotate(out)


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        (Secret(b"wrong"), NEW, WrongKey),
        (PASSWORD, PASSWORD, UsageError),
        (PASSWORD, Secret(b""), FormatError),
        (PASSWORD, Secret(b"two\nlines"), FormatError),
    ],
)
def test_what_is_refused(old: Secret, new: Secret, error: type[Exception], out: Path) -> None:
    before = contents(out)
    with pytest.raises(error):
        rotate(out, old, new)
    assert contents(out) == before


def test_what_stops_before_the_first_step_changes_nothing(out: Path) -> None:
    before = contents(out)

    def refuse(_report: object) -> None:
        raise StorageError("the password cannot be kept")

    with pytest.raises(StorageError):
        rotate_password(out, PASSWORD, NEW, before_commit=refuse, log2_n=10)
    assert contents(out) == before


def test_the_master_key_stays_and_its_wrapping_is_fresh(out: Path) -> None:
    def held() -> tuple[Config, dict[str, str]]:
        data = (out / "data" / "gocryptfs.conf").read_bytes()
        return Config.parse(data), json.loads(data)["ScryptObject"]

    old, old_scrypt = held()
    rotate(out)
    new, new_scrypt = held()
    assert old.unlock(PASSWORD) == new.unlock(NEW)
    assert old_scrypt["Salt"] != new_scrypt["Salt"]
    assert len(base64.b64decode(new_scrypt["Salt"])) == 32
    assert old.wrapped[:16] != new.wrapped[:16]
