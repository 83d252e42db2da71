"""HPKE against RFC 9180's vectors, and what its two modes refuse."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from cai.errors import FormatError, Tampered
from tng.ohttp.hpke import Aead, _encapsulate, expand, extract, setup_recipient, setup_sender

INFO = bytes.fromhex("4f6465206f6e2061204772656369616e2055726e")
PLAIN = bytes.fromhex("4265617574792069732074727574682c20747275746820626561757479")
AEADS = list(Aead)


def private(text: str) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(bytes.fromhex(text))


def public(key: X25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()


# RFC 9180 A.1.1: DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-128-GCM, mode Base.
EPHEMERAL = private("52c4a758a802cd8b936eceea314432798d5baf2d7e9235dc084ab1b9cfa2f736")
RECIPIENT = private("4612c550263fc8ad58375df3f557aac531d26850903e55a9f23f21d8534e8ac8")
FIRST = bytes.fromhex(
    "f938558b5d72f1a23810b4be2ab4f84331acc02fc97babc53a52ae8218a355a96d8770ac83d07bea87e13c512a"
)
EXPORTS = {
    b"": "3853fe2b4035195a573ffc53856e77058e15d9ea064de3e59f4961d0095250ee",
    b"\x00": "2e8f0b54673c7029649d4eb9d5e33bf1872cf76d623ff164ac185da9e88c21a5",
    b"TestContext": "e9e43065102c3836401bed8c3c3c75ae46be1639869391d62c61f1ec7af54931",
}


def test_the_rfcs_base_vector_as_sender() -> None:
    enc, context = _encapsulate(EPHEMERAL, Aead.AES_128_GCM, public(RECIPIENT), INFO, None)
    assert enc.hex() == "37fda3567bdbd628e88668c3c8d7e97d1d1253b6d4ea6d44c150f741f1bf4431"
    assert context.exporter_secret.hex() == (
        "45ff1c2e220db587171952c0592d5f5ebe103f1561a2614e38f2ffd47e99e3f8"
    )
    assert context.cipher.seal(PLAIN, b"Count-0") == FIRST
    for name, value in EXPORTS.items():
        assert context.export(name, 32).hex() == value


def test_the_rfcs_base_vector_as_recipient() -> None:
    enc = public(EPHEMERAL)
    context = setup_recipient(Aead.AES_128_GCM, enc, RECIPIENT, INFO)
    assert context.cipher.open(FIRST, b"Count-0") == PLAIN


def test_hkdf_of_rfc_5869() -> None:
    prk = extract(bytes(range(13)), b"\x0b" * 22)
    assert prk.hex() == "077709362c2e32df0ddc3f0dc47bba6390b6c73bb50f9c3122ec844ad7c2b3e5"
    okm = expand(prk, bytes(range(0xF0, 0xFA)), 42)
    assert okm.hex() == (
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"
    )


@pytest.mark.parametrize("aead", AEADS)
@pytest.mark.parametrize("auth", [False, True])
def test_both_modes_with_both_ciphers(aead: Aead, auth: bool) -> None:
    sender = X25519PrivateKey.generate() if auth else None
    enc, ours = setup_sender(aead, public(RECIPIENT), b"i", sender=sender)
    theirs = setup_recipient(
        aead, enc, RECIPIENT, b"i", sender=public(sender) if sender else None
    )
    for number in range(3):
        assert theirs.cipher.open(ours.cipher.seal(b"m%d" % number)) == b"m%d" % number
    assert ours.export(b"x", 16) == theirs.export(b"x", 16)


@pytest.mark.parametrize("aead", AEADS)
def test_another_senders_key_opens_nothing(aead: Aead) -> None:
    sender, other = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    enc, ours = setup_sender(aead, public(RECIPIENT), b"i", sender=sender)
    sealed = ours.cipher.seal(b"x")
    for claimed in (public(other), None):
        theirs = setup_recipient(aead, enc, RECIPIENT, b"i", sender=claimed)
        with pytest.raises(Tampered):
            theirs.cipher.open(sealed)


def test_a_base_message_is_none_of_an_attested_client() -> None:
    sender = X25519PrivateKey.generate()
    enc, ours = setup_sender(Aead.AES_128_GCM, public(RECIPIENT), b"i")
    theirs = setup_recipient(Aead.AES_128_GCM, enc, RECIPIENT, b"i", sender=public(sender))
    with pytest.raises(Tampered):
        theirs.cipher.open(ours.cipher.seal(b"x"))


@pytest.mark.parametrize("changed", ["info", "recipient", "enc", "aead"])
def test_any_other_context_opens_nothing(changed: str) -> None:
    enc, ours = setup_sender(Aead.AES_128_GCM, public(RECIPIENT), b"i")
    sealed = ours.cipher.seal(b"x")
    key = EPHEMERAL if changed == "recipient" else RECIPIENT
    theirs = setup_recipient(
        Aead.CHACHA20_POLY1305 if changed == "aead" else Aead.AES_128_GCM,
        public(EPHEMERAL) if changed == "enc" else enc,
        key,
        b"j" if changed == "info" else b"i",
    )
    with pytest.raises(Tampered):
        theirs.cipher.open(sealed)


@pytest.mark.parametrize("bad", [b"", bytes(31), bytes(33), bytes(32), b"\x01" + bytes(31)])
def test_a_key_that_is_none_is_refused(bad: bytes) -> None:
    """Wrong lengths and points of small order (RFC 9180 §7.1.4)."""
    with pytest.raises(FormatError):
        setup_sender(Aead.AES_128_GCM, bad, b"")
    with pytest.raises(FormatError):
        setup_recipient(Aead.AES_128_GCM, bad, RECIPIENT, b"")
    with pytest.raises(FormatError):
        setup_recipient(Aead.AES_128_GCM, public(EPHEMERAL), RECIPIENT, b"", sender=bad)


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=100))
def test_no_other_bytes_open(data: bytes) -> None:
    enc, _ = setup_sender(Aead.AES_128_GCM, public(RECIPIENT), b"i")
    theirs = setup_recipient(Aead.AES_128_GCM, enc, RECIPIENT, b"i")
    with pytest.raises(Tampered):
        theirs.cipher.open(data)


def test_secrets_are_not_in_the_representation() -> None:
    _, context = setup_sender(Aead.AES_128_GCM, public(RECIPIENT), b"i")
    assert context.exporter_secret.hex() not in repr(context)
    assert str(context.exporter_secret) not in repr(context)
