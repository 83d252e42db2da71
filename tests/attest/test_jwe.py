"""The JWE answer: known answers, round trips and every way it must not open."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, keywrap
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cai.attest import jwe
from cai.attest.jwk import PublicJwk, TeeKey, b64u_decode, b64u_encode, ec_members
from cai.errors import CaiError, FormatError, Tampered, WrongKey

VECTORS = Path(os.environ.get("CAI_VECTORS", "../shared/vectors"))
KAT = VECTORS / "trustee" / "own" / "jwe_kat.json"


@pytest.fixture(scope="module")
def kat() -> dict[str, Any]:
    if not KAT.is_file():
        pytest.skip(f"no vectors at {KAT} (set CAI_VECTORS)")
    return json.loads(KAT.read_text())


def private_key(text: str) -> ec.EllipticCurvePrivateKey:
    return ec.derive_private_key(int.from_bytes(b64u_decode(text, what="d")), ec.SECP256R1())


def test_known_answer_opens(kat: dict[str, Any]) -> None:
    key = TeeKey(private_key(kat["tee_private_d_b64url"]))
    assert key.jwk.to_json() == kat["tee_pubkey"]
    opened = jwe.decrypt(json.dumps(kat["response"]).encode(), key)
    assert opened.reveal() == kat["plaintext_ascii"].encode()


def test_known_answer_is_made_byte_for_byte(kat: dict[str, Any]) -> None:
    public = PublicJwk.parse(kat["tee_pubkey"]).public_key
    assert isinstance(public, ec.EllipticCurvePublicKey)
    made = jwe._encrypt_ecdh(
        kat["plaintext_ascii"].encode(),
        public,
        private_key(kat["epk_private_d_b64url"]),
        bytes.fromhex(kat["cek_hex"]),
        b64u_decode(kat["response"]["iv"], what="iv"),
    )
    assert json.loads(made) == kat["response"]


def header(data: bytes) -> str:
    return b64u_decode(json.loads(data)["protected"], what="protected").decode()


def test_round_trip_and_exact_header() -> None:
    key = TeeKey.generate()
    sealed = jwe.encrypt(b"\x00secret", key.jwk)
    assert jwe.decrypt(sealed, key).reveal() == b"\x00secret"
    parsed = json.loads(header(sealed), object_pairs_hook=list)
    assert [name for name, _ in parsed] == ["alg", "enc", "epk"]
    assert [name for name, _ in parsed[2][1]] == ["crv", "kty", "x", "y"]
    assert " " not in header(sealed)


def test_two_answers_share_nothing() -> None:
    key = TeeKey.generate()
    one, two = (json.loads(jwe.encrypt(b"same", key.jwk)) for _ in range(2))
    assert all(one[name] != two[name] for name in one)


def test_rsa_oaep_256_opens_with_the_private_key() -> None:
    private = rsa.generate_private_key(65537, 2048)
    numbers = private.public_key().public_numbers()
    jwk = PublicJwk.parse(
        {
            "kty": "RSA", "alg": "RSA-OAEP-256", "e": "AQAB",
            "n": b64u_encode(numbers.n.to_bytes(256)),
        }
    )
    value = json.loads(jwe.encrypt(b"resource", jwk))
    part = {name: b64u_decode(text, what=name) for name, text in value.items()}
    assert part["protected"] == b'{"alg":"RSA-OAEP-256","enc":"A256GCM"}'
    oaep = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)
    content_key = private.decrypt(part["encrypted_key"], oaep)
    plain = AESGCM(content_key).decrypt(
        part["iv"], part["ciphertext"] + part["tag"], value["protected"].encode()
    )
    assert plain == b"resource"


def test_p521_opens_with_the_private_key() -> None:
    private = ec.generate_private_key(ec.SECP521R1())
    jwk = PublicJwk.parse({**ec_members(private.public_key()), "alg": "ECDH-ES+A256KW"})
    key = TeeKey.generate()
    key.private_key, key.jwk = private, jwk
    assert jwe.decrypt(jwe.encrypt(b"wide", jwk), key).reveal() == b"wide"


def test_another_key_does_not_open() -> None:
    sealed = jwe.encrypt(b"secret", TeeKey.generate().jwk)
    with pytest.raises(WrongKey):
        jwe.decrypt(sealed, TeeKey.generate())


@pytest.mark.parametrize("member", ["iv", "ciphertext", "tag"])
def test_altered_content_is_tampered(member: str) -> None:
    key = TeeKey.generate()
    value = json.loads(jwe.encrypt(b"secret", key.jwk))
    raw = bytearray(b64u_decode(value[member], what=member))
    raw[0] ^= 1
    value[member] = b64u_encode(bytes(raw))
    with pytest.raises(Tampered):
        jwe.decrypt(json.dumps(value).encode(), key)


def test_altered_wrapped_key_is_wrong_key() -> None:
    key = TeeKey.generate()
    value = json.loads(jwe.encrypt(b"secret", key.jwk))
    raw = bytearray(b64u_decode(value["encrypted_key"], what="key"))
    raw[-1] ^= 1
    value["encrypted_key"] = b64u_encode(bytes(raw))
    with pytest.raises(WrongKey):
        jwe.decrypt(json.dumps(value).encode(), key)


def test_reordered_header_is_tampered() -> None:
    """The header's bytes are authenticated, not its meaning."""
    key = TeeKey.generate()
    value = json.loads(jwe.encrypt(b"secret", key.jwk))
    parsed = json.loads(b64u_decode(value["protected"], what="header"))
    turned = dict(reversed(parsed.items()))
    value["protected"] = b64u_encode(json.dumps(turned, separators=(",", ":")).encode())
    with pytest.raises(Tampered):
        jwe.decrypt(json.dumps(value).encode(), key)


def reheader(data: bytes, **changes: Any) -> bytes:
    value = json.loads(data)
    parsed = json.loads(b64u_decode(value["protected"], what="header"))
    for name, change in changes.items():
        if change is None:
            del parsed[name]
        else:
            parsed[name] = change
    value["protected"] = b64u_encode(json.dumps(parsed, separators=(",", ":")).encode())
    return json.dumps(value).encode()


@pytest.mark.parametrize(
    "changes",
    [
        {"alg": "RSA1_5"}, {"alg": "dir"}, {"enc": "A128GCM"}, {"zip": "DEF"}, {"crit": ["x"]},
        {"epk": None}, {"epk": {}}, {"epk": "x"}, {"apu": "AA"}, {"alg": 1},
        {"epk": {"crv": "P-256", "kty": "EC", "x": 1, "y": 2}},
    ],
)
def test_other_headers_are_refused(changes: dict[str, Any]) -> None:
    key = TeeKey.generate()
    with pytest.raises(FormatError):
        jwe.decrypt(reheader(jwe.encrypt(b"secret", key.jwk), **changes), key)


def test_ephemeral_point_off_the_curve_is_refused() -> None:
    key = TeeKey.generate()
    epk = ec_members(TeeKey.generate().private_key.public_key())
    epk["y"] = epk["x"]
    with pytest.raises(FormatError, match="not on"):
        jwe.decrypt(reheader(jwe.encrypt(b"secret", key.jwk), epk=epk), key)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{}", b"[]", b"null", b"\xff", b'{"protected":"","protected":""}',
        b'{"protected":1,"encrypted_key":"","iv":"","ciphertext":"","tag":""}',
        b'{"protected":"","encrypted_key":"","iv":"","ciphertext":"","tag":""}',
        b'{"protected":"!!","encrypted_key":"","iv":"","ciphertext":"","tag":""}',
        b'{"protected":"e30","encrypted_key":"","iv":"AAAAAAAAAAAAAAAA","ciphertext":"",'
        b'"tag":"AAAAAAAAAAAAAAAAAAAAAA"}',
    ],
)
def test_other_documents_are_refused(data: bytes) -> None:
    with pytest.raises(CaiError):
        jwe.decrypt(data, TeeKey.generate())


def test_a_further_member_is_refused() -> None:
    key = TeeKey.generate()
    value = json.loads(jwe.encrypt(b"secret", key.jwk))
    value["aad"] = "AA"
    with pytest.raises(FormatError):
        jwe.decrypt(json.dumps(value).encode(), key)


def test_content_key_of_another_size_is_refused() -> None:
    key, ephemeral = TeeKey.generate(), ec.generate_private_key(ec.SECP256R1())
    value = json.loads(jwe.encrypt(b"secret", key.jwk))
    wrapping = jwe._agree(ephemeral, key.private_key.public_key())
    value["encrypted_key"] = b64u_encode(keywrap.aes_key_wrap(wrapping, bytes(16)))
    data = reheader(json.dumps(value).encode(), epk=ec_members(ephemeral.public_key()))
    with pytest.raises(FormatError, match="32 bytes"):
        jwe.decrypt(data, key)


GOOD = TeeKey.generate().jwk.to_json()


@pytest.mark.parametrize(
    "value",
    [
        None, [], "key", {}, {**GOOD, "kty": "oct"}, {**GOOD, "kty": "AKP"}, {**GOOD, "kty": 1},
        {**GOOD, "alg": "ECDH-ES"}, {**GOOD, "alg": "RSA1_5"}, {**GOOD, "crv": "P-384"},
        {**GOOD, "crv": "P-521"}, {**GOOD, "x": GOOD["y"]}, {**GOOD, "x": ""},
        {**GOOD, "x": GOOD["x"] + "="}, {**GOOD, "x": "é" * 43}, {**GOOD, "x": "A" * 5000},
        {**GOOD, "x": "A" * 43, "y": "A" * 43}, {k: v for k, v in GOOD.items() if k != "y"},
        {"kty": "RSA", "alg": "RSA1_5", "n": "AQAB", "e": "AQAB"},
        {"kty": "RSA", "alg": "RSA-OAEP-256", "n": "AQAB", "e": "AQAB"},
        {"kty": "RSA", "alg": "RSA-OAEP-256", "n": b64u_encode(b"\xff" * 256), "e": "Aw"},
        {"kty": "RSA", "alg": "RSA-OAEP-256", "n": b64u_encode(b"\xff" * 2000), "e": "AQAB"},
    ],
)
def test_bad_keys_are_refused(value: Any) -> None:
    with pytest.raises(CaiError):
        PublicJwk.parse(value)


def test_unknown_members_of_a_key_are_dropped() -> None:
    assert PublicJwk.parse({**GOOD, "kid": "1", "use": "enc"}).to_json() == GOOD


@pytest.mark.parametrize("text", ["QQ==", "QR", "Q", "Q+", "é", " QQ"])
def test_only_canonical_base64url(text: str) -> None:
    with pytest.raises(FormatError):
        b64u_decode(text, what="test")
    assert base64.urlsafe_b64decode("QQ==") == b64u_decode("QQ", what="test")


def test_a_tee_key_does_not_show_itself() -> None:
    key = TeeKey.generate()
    secret = key.private_key.private_numbers().private_value
    assert str(secret) not in repr(key)
    assert f"{secret:x}" not in repr(key)
    with pytest.raises(TypeError):
        key.__reduce__()
