"""Names, links and keys, against known answers of stock gocryptfs."""

from __future__ import annotations

import base64
import json
import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cai.errors import CaiError, FormatError, InputError, LimitExceeded, Tampered, WrongKey
from cai.model.gocryptfs.config import Config
from cai.model.gocryptfs.eme import Eme
from cai.model.gocryptfs.keys import CipherKeys
from cai.model.gocryptfs.names import NameCipher, long_name
from cai.secret import Secret

KEYS = CipherKeys.of(bytes(range(32)))
NAMES = NameCipher(KEYS)


def test_known_keys(kat: Any) -> None:
    keys = CipherKeys.of(bytes.fromhex(kat["masterkey_hex"]))
    assert keys.content.hex() == kat["content_key_hex"]
    assert keys.name.hex() == kat["eme_key_hex"]
    assert keys.kek.reveal() not in (keys.content, keys.name)


def test_known_names(kat: Any) -> None:
    names = NameCipher(CipherKeys.of(bytes.fromhex(kat["masterkey_hex"])))
    assert len(kat["names"]) >= 20
    for known in kat["names"]:
        iv, plain = bytes.fromhex(known["diriv_hex"]), known["name"].encode()
        stored = names.encrypt(plain, iv)
        assert stored.name == known["cipher_name"]
        assert stored.long == known.get("longname_file_content", "")
        assert names.decrypt(stored.long or stored.name, iv, long=bool(stored.long)) == plain


def test_a_known_link(kat: Any) -> None:
    names = NameCipher(CipherKeys.of(bytes.fromhex(kat["masterkey_hex"])))
    link = kat["symlink"]
    target = link["target"].encode()
    assert names.decrypt_target(link["stored_link"]) == target


@given(st.binary(min_size=1, max_size=255), st.binary(min_size=16, max_size=16))
def test_names_come_back(name: bytes, iv: bytes) -> None:
    if b"/" in name or b"\0" in name or name in (b".", b".."):
        return
    stored = NAMES.encrypt(name, iv)
    assert bool(stored.long) == (len(name) >= 176)
    assert NAMES.decrypt(stored.long or stored.name, iv, long=bool(stored.long)) == name
    if stored.long:
        assert stored.name == long_name(stored.long)


@given(st.integers(1, 128), st.data())
def test_eme_is_a_permutation_that_depends_on_every_bit(blocks: int, data: st.DataObject) -> None:
    eme, tweak = Eme(bytes(32)), bytes(16)
    plain = data.draw(st.binary(min_size=16 * blocks, max_size=16 * blocks))
    sealed = eme.encrypt(tweak, plain)
    assert eme.decrypt(tweak, sealed) == plain
    other = bytearray(plain)
    other[data.draw(st.integers(0, len(plain) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    changed = eme.encrypt(tweak, bytes(other))
    assert all(
        sealed[at : at + 16] != changed[at : at + 16] for at in range(0, len(sealed), 16)
    )
    assert eme.encrypt(b"\1" + bytes(15), plain) != sealed


@pytest.mark.parametrize("length", [0, 1, 15, 17, 129 * 16])
def test_eme_refuses_other_lengths(length: int) -> None:
    with pytest.raises(FormatError):
        Eme(bytes(32)).encrypt(bytes(16), bytes(length))


def sealed_name(padded: bytes) -> str:
    sealed = Eme(KEYS.name).encrypt(bytes(16), padded)
    return base64.urlsafe_b64encode(sealed).decode().rstrip("=")


@pytest.mark.parametrize(
    "padded",
    [
        b"\x10" * 16, bytes(16), b"a" * 15 + b"\x11", b"a" * 14 + b"\x01\x02",
        b"." + b"\x0f" * 15, b".." + b"\x0e" * 14, b"a/b" + b"\x0d" * 13,
        b"a\x00b" + b"\x0d" * 13,
    ],
)
def test_names_that_cannot_be(padded: bytes) -> None:
    with pytest.raises(FormatError):
        NAMES.decrypt(sealed_name(padded), bytes(16))


@given(st.text(max_size=400))
def test_no_text_breaks_the_name_parser(text: str) -> None:
    for long in (False, True):
        try:
            NAMES.decrypt(text, bytes(16), long=long)
        except CaiError:
            continue
    try:
        NAMES.decrypt_target(text)
    except CaiError:
        return


def test_only_one_spelling_of_base64() -> None:
    stored = NAMES.encrypt(b"a", bytes(16)).name
    assert stored[-1] in "AQgw"  # 16 bytes leave 4 bits that must be zero
    leftover = stored[:-1] + chr(ord(stored[-1]) + 1)
    for other in (leftover, stored + "=", stored + "\n", stored + "=="):
        with pytest.raises(FormatError):
            NAMES.decrypt(other, bytes(16))


def test_links_are_authenticated() -> None:
    text = NAMES.encrypt_target(b"../config.json")
    assert NAMES.decrypt_target(text) == b"../config.json"
    assert NAMES.encrypt_target(b"") == ""
    assert NAMES.decrypt_target("") == b""
    raw = bytearray(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    for at in range(len(raw)):
        raw[at] ^= 1
        with pytest.raises(Tampered):
            NAMES.decrypt_target(base64.urlsafe_b64encode(raw).decode().rstrip("="))
        raw[at] ^= 1


def test_the_known_configuration(kat: Any) -> None:
    known = kat["keywrap"]
    config = Config.parse(json.dumps(known["conf"]).encode())
    assert config.password_key(Secret(known["password"].encode())).hex() == known["kek_hex"]
    assert config.unlock(Secret(known["password"].encode())).hex() == kat["masterkey_hex"]
    with pytest.raises(WrongKey):
        config.unlock(Secret(b"another"))


def changed(**members: Any) -> bytes:
    config = Config.create(Secret(b"pw"), os.urandom(32), log2_n=10)
    body = json.loads(config.encode())
    scrypt = members.pop("scrypt", {})
    body["ScryptObject"] |= scrypt
    body |= members
    return json.dumps(body).encode()


def test_a_configuration_comes_back() -> None:
    key = os.urandom(32)
    config = Config.create(Secret(b"pw"), key, log2_n=10)
    assert Config.parse(config.encode()) == config
    assert Config.parse(config.encode()).unlock(Secret(b"pw")) == key
    assert Config.parse(changed(Unknown=1)).n == 1024


DEFAULT = ["HKDF", "GCMIV128", "DirIV", "EMENames", "LongNames", "Raw64"]


@pytest.mark.parametrize(
    ("members", "match"),
    [
        ({"FeatureFlags": [*DEFAULT, "AESSIV"]}, "AES-SIV"),
        ({"FeatureFlags": ["HKDF", "XChaCha20Poly1305", *DEFAULT[2:]]}, "XChaCha20"),
        ({"FeatureFlags": [*DEFAULT, "FIDO2"]}, "FIDO2"),
        ({"FeatureFlags": [*DEFAULT, "Novelty"]}, "Novelty"),
        ({"FeatureFlags": DEFAULT[1:]}, "HKDF"),
        ({"FeatureFlags": [f for f in DEFAULT if f != "Raw64"]}, "Raw64"),
        ({"FeatureFlags": [*DEFAULT, "PlaintextNames"]}, "not read together"),
        ({"FeatureFlags": [*DEFAULT, "HKDF"]}, "twice"),
        ({"FeatureFlags": "HKDF"}, "FeatureFlags"),
        ({"FeatureFlags": [*DEFAULT, "LongNameMax"], "LongNameMax": 61}, "LongNameMax"),
        ({"FeatureFlags": [*DEFAULT, "LongNameMax"], "LongNameMax": 256}, "LongNameMax"),
        ({"FeatureFlags": [*DEFAULT, "LongNameMax"]}, "LongNameMax"),
        ({"Version": 1}, "version"),
        ({"Version": True}, "version"),
        ({"scrypt": {"N": 512}}, "weak"),
        ({"scrypt": {"N": 1025}}, "weak"),
        ({"scrypt": {"R": 7}}, "weak"),
        ({"scrypt": {"P": 0}}, "weak"),
        ({"scrypt": {"KeyLen": 16}}, "length"),
        ({"scrypt": {"Salt": "AAAA"}}, "salt"),
        ({"EncryptedKey": "AAAA"}, "EncryptedKey"),
        ({"EncryptedKey": "*"}, "EncryptedKey"),
        ({"ScryptObject": 1}, "ScryptObject"),
    ],
)
def test_configurations_that_are_not_read(members: dict[str, Any], match: str) -> None:
    if "ScryptObject" in members:
        body = json.loads(changed()) | members
        data = json.dumps(body).encode()
    else:
        data = changed(**members)
    with pytest.raises(InputError, match=match):
        Config.parse(data)


@pytest.mark.parametrize("scrypt", [{"N": 1 << 21}, {"N": 1 << 28}, {"R": 1 << 20}, {"P": 17}])
def test_scrypt_is_bounded(scrypt: dict[str, int]) -> None:
    with pytest.raises(LimitExceeded):
        Config.parse(changed(scrypt=scrypt))


@given(st.binary(max_size=300))
def test_no_bytes_break_the_configuration_parser(data: bytes) -> None:
    with pytest.raises(CaiError):
        Config.parse(data)


@pytest.mark.parametrize("password", [b"", b"two\nlines", bytes(2049)])
def test_passwords_that_stock_would_not_take(password: bytes) -> None:
    with pytest.raises(InputError):
        Config.create(Secret(password), bytes(32), log2_n=10)
