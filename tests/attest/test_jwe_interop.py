"""JWE against a second implementation, both ways, and against clients that encode headers again."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric import ec
from jwcrypto import jwe as other
from jwcrypto import jwk

from cai.attest import jwe
from cai.attest.jwk import ECDH_ES_A256KW, PublicJwk, TeeKey, b64u_decode
from cai.errors import CaiError, FormatError
from tests.kbs.program import Key, b64u

PLAIN = b"interop-secret-0b7d"
KINDS = ["P-256", "P-521", "RSA-2048", "RSA-4096"]


def private_jwk(key: Key) -> jwk.JWK:
    from cryptography.hazmat.primitives import serialization

    return jwk.JWK.from_pem(
        key.private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_other_implementation_opens_ours(kind: str) -> None:
    key = Key(kind)
    sealed = jwe.encrypt(PLAIN, PublicJwk.parse(key.jwk))
    opened = other.JWE(algs=[key.jwk["alg"], "A256GCM"])
    opened.deserialize(sealed.decode(), private_jwk(key))
    assert opened.payload == PLAIN


@pytest.mark.parametrize("kind", KINDS)
def test_a_client_that_encodes_the_header_again_opens_ours(kind: str) -> None:
    key = Key(kind)
    assert key.open(jwe.encrypt(PLAIN, PublicJwk.parse(key.jwk))) == PLAIN


def test_we_open_the_others() -> None:
    key = TeeKey.generate()
    sealed = other.JWE(PLAIN, protected=json.dumps({"alg": ECDH_ES_A256KW, "enc": "A256GCM"}))
    named = {name: item for name, item in key.jwk.to_json().items() if name != "alg"}
    sealed.add_recipient(jwk.JWK(**named))
    # The compact form has everything in the protected header, as Trustee's form does.
    parts = sealed.serialize(compact=True).split(".")
    names = ("protected", "encrypted_key", "iv", "ciphertext", "tag")
    flattened = json.dumps(dict(zip(names, parts, strict=True))).encode()
    assert jwe.decrypt(flattened, key).reveal() == PLAIN
    altered = flattened.replace(b'"tag": "', b'"tag": "A')
    with pytest.raises(CaiError):
        jwe.decrypt(altered, key)


def test_the_others_protection_by_another_algorithm_is_refused() -> None:
    key = TeeKey.generate()
    named = {name: item for name, item in key.jwk.to_json().items() if name != "alg"}
    for alg, enc in (("ECDH-ES+A128KW", "A256GCM"), (ECDH_ES_A256KW, "A128CBC-HS256")):
        sealed = other.JWE(PLAIN, protected=json.dumps({"alg": alg, "enc": enc}))
        sealed.add_recipient(jwk.JWK(**named))
        with pytest.raises(FormatError):
            jwe.decrypt(sealed.serialize().encode(), key)


@pytest.mark.parametrize("kind", KINDS)
def test_the_header_is_exactly_what_clients_encode(kind: str) -> None:
    key = Key(kind)
    value = json.loads(jwe.encrypt(PLAIN, PublicJwk.parse(key.jwk)))
    protected = b64u_decode(value["protected"], what="protected").decode()
    pairs = json.loads(protected, object_pairs_hook=list)
    names = [name for name, _ in pairs]
    if kind.startswith("RSA"):
        assert protected == '{"alg":"RSA-OAEP-256","enc":"A256GCM"}'
    else:
        assert names == ["alg", "enc", "epk"]
        assert [name for name, _ in pairs[2][1]] == ["crv", "kty", "x", "y"]
        assert " " not in protected
    assert list(value) == ["protected", "encrypted_key", "iv", "ciphertext", "tag"]


def reordered(key: Key) -> bytes:
    """A JWE made by somebody who writes the header in another order."""
    private = ec.generate_private_key(ec.SECP256R1())
    point = private.public_key().public_numbers()
    epk = {
        "kty": "EC", "crv": "P-256", "x": b64u(point.x.to_bytes(32)),
        "y": b64u(point.y.to_bytes(32)),
    }  # fmt: skip
    return sealed_with({"epk": epk, "alg": ECDH_ES_A256KW, "enc": "A256GCM"}, private, key)


def sealed_with(header: dict[str, Any], private: ec.EllipticCurvePrivateKey, key: Key) -> bytes:
    import os

    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    from cryptography.hazmat.primitives.keywrap import aes_key_wrap

    from cai.attest.jwe import _agree

    public = key.private.public_key()
    assert isinstance(public, ec.EllipticCurvePublicKey)
    content, iv = os.urandom(32), os.urandom(12)
    protected = b64u(json.dumps(header, separators=(",", ":")).encode())
    sealed = AESGCM(content).encrypt(iv, PLAIN, protected.encode())
    return json.dumps(
        {
            "protected": protected,
            "encrypted_key": b64u(aes_key_wrap(_agree(private, public), content)),
            "iv": b64u(iv), "ciphertext": b64u(sealed[:-16]), "tag": b64u(sealed[-16:]),
        }
    ).encode()  # fmt: skip


def test_another_order_is_lost_on_clients_that_encode_again() -> None:
    # What the strictness is for: correct by RFC 7516, and stock clients cannot open it.
    key = Key("P-256")
    sealed = reordered(key)
    opened = other.JWE(algs=[ECDH_ES_A256KW, "A256GCM"])
    opened.deserialize(sealed.decode(), private_jwk(key))
    assert opened.payload == PLAIN
    with pytest.raises(InvalidTag):
        key.open(sealed)


@pytest.mark.parametrize("kind", ["RSA-1024", "RSA-1536"])
def test_small_keys_are_refused(kind: str) -> None:
    with pytest.raises(CaiError):
        PublicJwk.parse(Key(kind).jwk)


def test_the_old_padding_is_refused() -> None:
    with pytest.raises(FormatError, match="RSA1_5"):
        PublicJwk.parse({**Key("RSA-2048").jwk, "alg": "RSA1_5"})
