"""OpenSSF bundles beside a sealed model: against the library itself, in both directions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from cai.errors import InputError, Refused
from cai.model import new_key, open_model, read_key_file, seal, unseal

pytest.importorskip("model_signing", reason="the extra 'signing' is not installed")


@pytest.fixture
def ec_keys(tmp_path: Path) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = tmp_path / "ec.pem", tmp_path / "ec.pub.pem"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(
        key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    return private, public


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    root = tmp_path / "plain"
    (root / "sub").mkdir(parents=True)
    (root / "config.json").write_text("{}")
    (root / "sub" / "weights").write_bytes(os.urandom(200_000))
    return root


def test_the_library_accepts_our_bundle(
    plain: Path, ec_keys: tuple[Path, Path], tmp_path: Path
) -> None:
    from model_signing import hashing, verifying

    from cai.model.openssf import write_bundle

    kek = new_key()
    seal(plain, tmp_path / "out", kek)
    with open_model(tmp_path / "out", kek) as model:
        write_bundle(model.entries.values(), "m", ec_keys[0], tmp_path / "model.sig")
        unseal(model, tmp_path / "back")
    config = verifying.Config().use_elliptic_key_verifier(public_key=ec_keys[1])
    config.set_hashing_config(hashing.Config().use_file_serialization())
    config.verify(tmp_path / "back", tmp_path / "model.sig")
    (tmp_path / "back" / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="mismatch"):
        config.verify(tmp_path / "back", tmp_path / "model.sig")


@pytest.fixture
def published(plain: Path, ec_keys: tuple[Path, Path]) -> Path:
    """A model as a publisher gives it: its bundle lies in it."""
    from model_signing import hashing, signing

    bundle = plain / "model.sig"
    signing.Config().use_elliptic_key_signer(private_key=ec_keys[0]).set_hashing_config(
        hashing.Config().set_ignored_paths(paths=[bundle], ignore_git_paths=True)
    ).sign(plain, bundle)
    return bundle


def test_we_accept_the_librarys_bundle(
    plain: Path, published: Path, ec_keys: tuple[Path, Path], tmp_path: Path
) -> None:
    from cai.model.openssf import verify_bundle

    kek = new_key()
    (plain / ".gitattributes").write_text("x")  # the library leaves it out
    seal(plain, tmp_path / "out", kek)
    with open_model(tmp_path / "out", kek) as model:
        verify_bundle(model.entries.values(), published, ec_keys[1])


@pytest.mark.parametrize("change", ["content", "additional", "missing", "renamed"])
def test_a_tree_that_was_not_signed(
    change: str, plain: Path, published: Path, ec_keys: tuple[Path, Path], tmp_path: Path
) -> None:
    from cai.model.openssf import verify_bundle

    if change == "content":
        (plain / "config.json").write_text("[]")
    elif change == "additional":
        (plain / "evil.py").write_text("x")
    elif change == "missing":
        (plain / "config.json").unlink()
    else:
        (plain / "config.json").rename(plain / "config2.json")
    kek = new_key()
    seal(plain, tmp_path / "out", kek)
    with open_model(tmp_path / "out", kek) as model, pytest.raises(Refused) as caught:
        verify_bundle(model.entries.values(), published, ec_keys[1])
    assert caught.value.machine_code == "openssf"


@pytest.mark.parametrize("damage", ["another key", "edited", "not json", "empty", "missing"])
def test_a_bundle_that_does_not_verify(
    damage: str, plain: Path, published: Path, ec_keys: tuple[Path, Path], tmp_path: Path
) -> None:
    from cai.model.openssf import verify_bundle

    kek = new_key()
    seal(plain, tmp_path / "out", kek)
    key = ec_keys[1]
    if damage == "another key":
        other = ec.generate_private_key(ec.SECP256R1()).public_key()
        key.write_bytes(other.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    elif damage == "edited":
        text = published.read_text()
        place = text.index('"payload"') + 30
        letter = "A" if text[place] != "A" else "B"
        published.write_text(text[:place] + letter + text[place + 1 :])
    elif damage == "missing":
        published.unlink()
    else:
        published.write_text("{" if damage == "not json" else "")
    with open_model(tmp_path / "out", kek) as model, pytest.raises((Refused, InputError)):
        verify_bundle(model.entries.values(), published, key)


def test_links_are_not_signed(sample: Path, ec_keys: tuple[Path, Path], tmp_path: Path) -> None:
    from cai.model.openssf import write_bundle

    kek = new_key()
    seal(sample, tmp_path / "out", kek)
    with open_model(tmp_path / "out", kek) as model, pytest.raises(InputError, match="links"):
        write_bundle(model.entries.values(), "m", ec_keys[0], tmp_path / "x.sig")
    assert not (tmp_path / "x.sig").exists()


@pytest.mark.parametrize("content", [b"", b"x", b"-----BEGIN PRIVATE KEY-----\n"])
def test_a_file_that_is_no_key(content: bytes, plain: Path, tmp_path: Path) -> None:
    from cai.model.openssf import write_bundle

    kek = new_key()
    seal(plain, tmp_path / "out", kek)
    (tmp_path / "k").write_bytes(content)
    with open_model(tmp_path / "out", kek) as model, pytest.raises(InputError):
        write_bundle(model.entries.values(), "m", tmp_path / "k", tmp_path / "x.sig")
    assert not (tmp_path / "x.sig").exists()


def test_by_the_commands(
    plain: Path, published: Path, ec_keys: tuple[Path, Path], tmp_path: Path
) -> None:
    def cai(*arguments: str) -> int:
        return subprocess.run(
            [sys.executable, "-m", "cai", *arguments], cwd=tmp_path, check=False,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        ).returncode  # fmt: skip

    pair = ("--openssf-signature", "plain/model.sig", "--openssf-public-key", "ec.pub.pem")
    assert cai("encrypt", "plain", "-o", "o", "--key-out", "k", *pair,
               "--openssf-key", "ec.pem", "--openssf-out", "mine.sig") == 0  # fmt: skip
    assert cai("check", "o", "--key-file", "k", *pair) == 0
    assert cai("check", "o", "--key-file", "k", "--openssf-signature", "mine.sig",
               "--openssf-public-key", "ec.pub.pem") == 0  # fmt: skip
    with open_model(tmp_path / "o", read_key_file(tmp_path / "k")) as model:
        assert "openssf-signed-by" in model.manifest.provenance
    (plain / "config.json").write_text("[]")
    before = sorted(tmp_path.iterdir())
    assert cai("encrypt", "plain", "-o", "p", "--key-out", "l", *pair) == 7
    assert sorted(tmp_path.iterdir()) == before
    assert cai("encrypt", "plain", "-o", "p", *pair[:2]) == 2
    assert cai("encrypt", "plain", "-o", "p", "--openssf-key", "ec.pem") == 2
