"""Secrets do not show themselves and their files are their owner's alone."""

from __future__ import annotations

import pickle
import stat
from pathlib import Path

import pytest

from cai.errors import FormatError, InputMissing, StorageError
from cai.secret import MAX_SECRET_FILE, Secret, read_secret_file, write_secret_file


def test_no_accidental_spelling_shows_the_bytes() -> None:
    secret = Secret(b"hunter2")
    for text in (repr(secret), str(secret), f"{secret}", f"{[secret]}"):
        assert "hunter2" not in text
    with pytest.raises(TypeError):
        pickle.dumps(secret)


def test_equality() -> None:
    assert Secret(b"a") == Secret(b"a")
    assert Secret(b"a") != Secret(b"b")
    assert Secret(b"a") != b"a"


def test_a_written_secret_is_private_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "key"
    write_secret_file(path, Secret(b"x"), what="key")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_secret_file(path, what="key") == Secret(b"x")
    with pytest.raises(StorageError, match="exists already"):
        write_secret_file(path, Secret(b"y"), what="key")
    assert path.read_bytes() == b"x"


def test_a_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(StorageError):
        write_secret_file(tmp_path / "link", Secret(b"x"), what="key")
    assert not (tmp_path / "target").exists()


def test_unreadable_secrets(tmp_path: Path) -> None:
    with pytest.raises(InputMissing):
        read_secret_file(tmp_path / "absent", what="key")
    for size in (0, MAX_SECRET_FILE + 1):
        (tmp_path / "file").write_bytes(bytes(size))
        with pytest.raises(FormatError):
            read_secret_file(tmp_path / "file", what="key")
