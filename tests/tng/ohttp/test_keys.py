"""Keys of an egress: their life, the file they may come from, and what each has opened."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)

from cai.errors import CaiError, FormatError, InputMissing
from tng.config.transport import KeyFile, OwnKey
from tng.ohttp.keys import (
    FILE_VALID_S,
    LATE_S,
    MAX_OPENED,
    KeyRing,
    Replayed,
    parse_key,
)
from tng.operation.journal import Journal

START = 1_800_000_000.0


class Clock:
    now = START

    def __call__(self) -> float:
        return self.now


def ring(settings: KeyFile | OwnKey, clock: Clock, log: io.StringIO | None = None) -> KeyRing:
    return KeyRing(settings, Journal(log or io.StringIO()), "egress[0]", clock=clock)


def pem(
    key: X25519PrivateKey | ec.EllipticCurvePrivateKey,
    encryption: KeySerializationEncryption | None = None,
) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption())


def test_a_key_is_active_then_stale_then_gone() -> None:
    clock = Clock()
    keys = ring(OwnKey(100), clock)
    first = keys.active()
    assert first.config.expires == START + 200
    clock.now += 99
    assert keys.active() is first
    clock.now += 1
    second = keys.active()
    assert second.public != first.public
    assert keys.find(first.public, 0) is first
    clock.now = START + 200 + LATE_S - 1
    assert keys.find(first.public, 0) is first
    clock.now = START + 200 + LATE_S + 1
    assert keys.find(first.public, 0) is None


def test_a_long_pause_leaves_no_old_key() -> None:
    clock = Clock()
    keys = ring(OwnKey(10), clock)
    first = keys.active()
    clock.now += 100_000
    assert keys.find(first.public, 0) is None
    assert len(keys.status()["local_keys"]) == 1  # type: ignore[arg-type]


def test_an_interval_of_zero_does_not_spin() -> None:
    clock = Clock()
    keys = ring(OwnKey(0), clock)
    assert keys.active() is keys.active()
    assert keys.active().expires > clock.now


def test_a_client_that_asks_late_in_an_interval_gets_time() -> None:
    clock = Clock()
    keys = ring(OwnKey(100), clock)
    keys.active()
    clock.now += 99.9
    assert keys.active().config.expires - clock.now > 100


@pytest.mark.parametrize("key_id", [1, 7, 255])
def test_another_key_id_is_unknown(key_id: int) -> None:
    keys = ring(OwnKey(100), Clock())
    assert keys.find(keys.active().public, key_id) is None


def test_without_a_hint_the_active_key_is_meant() -> None:
    keys = ring(OwnKey(100), Clock())
    assert keys.find(b"", 0) is keys.active()


def test_an_unknown_hint_is_unknown() -> None:
    assert ring(OwnKey(100), Clock()).find(bytes(32), 0) is None


def test_a_request_is_opened_once_per_key() -> None:
    clock = Clock()
    keys = ring(OwnKey(100), clock)
    keys.active().open_once(b"a")
    with pytest.raises(Replayed):
        keys.active().open_once(b"a")
    keys.active().open_once(b"b")


def test_what_a_key_remembers_has_an_end() -> None:
    key = ring(OwnKey(100), Clock()).active()
    for number in range(MAX_OPENED + 1):
        key.open_once(number.to_bytes(4))
    assert len(key.opened) == MAX_OPENED
    with pytest.raises(Replayed):
        key.open_once(MAX_OPENED.to_bytes(4))


def test_a_file_gives_the_key_and_is_watched(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "key.pem"
    one, two = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    path.write_bytes(pem(one))
    keys = ring(KeyFile(path), clock)
    first = keys.active()
    assert first.public == one.public_key().public_bytes_raw()
    path.write_bytes(pem(two))
    os.utime(path, (1, 1))
    clock.now += 5
    second = keys.active()
    assert second.public == two.public_key().public_bytes_raw()
    assert keys.find(first.public, 0) is first
    clock.now += FILE_VALID_S + LATE_S + 1
    assert keys.find(first.public, 0) is None
    assert keys.find(second.public, 0) is second


def test_a_file_key_is_always_offered_with_time_left(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "key.pem"
    path.write_bytes(pem(X25519PrivateKey.generate()))
    keys = ring(KeyFile(path), clock)
    for _ in range(20):
        clock.now += 200
        assert keys.active().config.expires - clock.now >= FILE_VALID_S / 2
    assert len(keys.status()["local_keys"]) == 1  # type: ignore[arg-type]


def test_a_file_that_goes_back_brings_back_its_key(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "key.pem"
    one, two = pem(X25519PrivateKey.generate()), pem(X25519PrivateKey.generate())
    path.write_bytes(one)
    keys = ring(KeyFile(path), clock)
    first = keys.active()
    first.open_once(b"a")
    for number, data in enumerate((two, one)):
        path.write_bytes(data)
        os.utime(path, (number, number))
        clock.now += 5
        keys.active()
    assert keys.active() is first
    # What it has opened stays opened.
    with pytest.raises(Replayed):
        keys.active().open_once(b"a")


@pytest.mark.parametrize("bad", [b"", b"no key", b"-----BEGIN PRIVATE KEY-----\nAAAA\n"])
def test_a_broken_file_keeps_the_old_key(tmp_path: Path, bad: bytes) -> None:
    clock, path, log = Clock(), tmp_path / "key.pem", io.StringIO()
    path.write_bytes(pem(X25519PrivateKey.generate()))
    keys = ring(KeyFile(path), clock, log)
    first = keys.active()
    path.write_bytes(bad)
    clock.now += 5
    assert keys.active() is first
    assert "keeps its OHTTP key" in log.getvalue()
    path.unlink()
    clock.now += 5
    assert keys.active() is first


def test_a_missing_file_is_a_start_error(tmp_path: Path) -> None:
    with pytest.raises(InputMissing):
        ring(KeyFile(tmp_path / "none"), Clock())


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\x00" * 100, b"-----BEGIN PRIVATE KEY-----",
        pem(ec.generate_private_key(ec.SECP256R1())),
        pem(X25519PrivateKey.generate(), BestAvailableEncryption(b"p")),
    ],
    ids=["empty", "zeros", "cut", "another kind", "encrypted"],
)  # fmt: skip
def test_what_is_no_key_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError) as caught:
        parse_key(data, "the file")
    assert isinstance(caught.value, CaiError)
    assert "the file" in caught.value.message


def test_status_and_representation_hold_no_secret(tmp_path: Path) -> None:
    path, key = tmp_path / "key.pem", X25519PrivateKey.generate()
    path.write_bytes(pem(key))
    keys = ring(KeyFile(path), Clock())
    secret = key.private_bytes_raw()
    shown = f"{keys.status()!r} {keys.active()!r}"
    assert secret.hex() not in shown
    assert repr(secret) not in shown
    assert keys.status()["key_manager_type"] == "file"
