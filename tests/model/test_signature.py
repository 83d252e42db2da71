"""The owner's signature over a manifest."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cai import jcs
from cai.errors import FormatError, LimitExceeded, Tampered
from cai.model import check, new_key, open_model, rotate, seal
from cai.model.signature import DOMAIN, ManifestSignature, sign_root
from cai.secret import Secret

OWNER = Ed25519PrivateKey.from_private_bytes(bytes(range(64, 96)))
OWNER_HEX = OWNER.public_key().public_bytes_raw().hex()


@pytest.fixture
def signed(sample: Path, tmp_path: Path) -> tuple[Path, Secret]:
    kek = new_key()
    seal(sample, tmp_path / "out", kek, sign=lambda root: sign_root(root, OWNER))
    return tmp_path / "out", kek


def test_the_bytes_are_those_of_the_specification() -> None:
    data = sign_root("11" * 32, OWNER)
    assert data == jcs.canonical(
        {
            "cai-signature": 1, "owner_key": OWNER_HEX,
            "signature": OWNER.sign(b"cai/1 manifest\x00" + b"\x11" * 32).hex(),
        }
    )  # fmt: skip
    assert DOMAIN == b"cai/1 manifest\x00"


def test_it_counts_only_under_a_key_that_is_named(signed: tuple[Path, Secret]) -> None:
    out, kek = signed
    assert check(out, kek).signature == "not asked"
    assert check(out, kek, owner_key=OWNER_HEX).signature == "verified"
    with pytest.raises(Tampered) as caught:
        check(out, kek, owner_key="00" * 32)
    assert caught.value.machine_code == "wrong-owner"


def test_it_survives_a_rotation(signed: tuple[Path, Secret]) -> None:
    out, kek = signed
    new = new_key()
    rotate(out, kek, new)
    assert check(out, new, owner_key=OWNER_HEX).signature == "verified"


def test_a_signature_over_another_purpose_does_not_count(signed: tuple[Path, Secret]) -> None:
    out, kek = signed
    with open_model(out, kek) as model:
        root = bytes.fromhex(model.root)
    for message in (root, b"cai/1 record\x00" + root, DOMAIN + root[:-1]):
        forged = ManifestSignature(OWNER_HEX, OWNER.sign(message).hex())
        (out / "manifest.sig").write_bytes(forged.encode())
        with pytest.raises(Tampered) as caught:
            open_model(out, kek, owner_key=OWNER_HEX)
        assert caught.value.machine_code == "signature"


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{}", b"[]", b"{", b"\xff", b'{"cai-signature":2}', b"x" * 5000,
        ManifestSignature("00" * 32, "00" * 63).encode(),
        ManifestSignature("00" * 31, "00" * 64).encode(),
        ManifestSignature("AA" * 32, "00" * 64).encode(),
        ManifestSignature("00" * 32, "00" * 64).encode() + b"\n",
        b'{"cai-signature":1,"extra":0,"owner_key":"","signature":""}',
    ],
)  # fmt: skip
def test_another_form_is_refused_even_when_nobody_asks(
    data: bytes, signed: tuple[Path, Secret]
) -> None:
    out, kek = signed
    (out / "manifest.sig").write_bytes(data)
    for owner in (None, OWNER_HEX):
        with pytest.raises((FormatError, LimitExceeded), match=r"manifest\.sig"):
            check(out, kek, owner_key=owner)


def test_a_key_that_is_no_point(signed: tuple[Path, Secret]) -> None:
    out, kek = signed
    bad = "02" + "00" * 30 + "80"
    (out / "manifest.sig").write_bytes(ManifestSignature(bad, "00" * 64).encode())
    with pytest.raises(Tampered):
        open_model(out, kek, owner_key=bad)
