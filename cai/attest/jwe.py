"""The released key on the wire: a flattened JWE that only the attested guest opens (RFC 7516).

Stock clients decode the protected header into a struct and encode it again before they use it as
additional data, so the order of its members is part of the protocol: compact JSON, ``alg``, then
``enc``, then ``epk`` with ``crv, kty, x, y``, and nothing else (Trustee's KBS protocol).
"""

from __future__ import annotations

import json
import os
from typing import Any, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, keywrap
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.concatkdf import ConcatKDFHash

from cai import jcs
from cai.attest.jwk import (
    ECDH_ES_A256KW,
    RSA_OAEP_256,
    PublicJwk,
    TeeKey,
    b64u_decode,
    b64u_encode,
    ec_members,
    ec_public_key,
)
from cai.errors import FormatError, Tampered, WrongKey
from cai.secret import Secret

MAX_JWE = 4 * 1024 * 1024
"""Largest JWE that is parsed, bytes."""

CONTENT_ENCRYPTION: Final = "A256GCM"
"""The one content encryption (RFC 7518 §5.3)."""

_KEY_SIZE = 32
_IV_SIZE = 12
_TAG_SIZE = 16
_MEMBERS: Final = ("protected", "encrypted_key", "iv", "ciphertext", "tag")


def encrypt(plaintext: bytes, jwk: PublicJwk) -> bytes:
    """Encrypt to a guest's key.

    Args:
        plaintext: the resource.
        jwk: the guest's checked public key; its ``alg`` selects the key algorithm.

    Returns:
        The flattened JWE as JSON.
    """
    content_key, iv = AESGCM.generate_key(8 * _KEY_SIZE), os.urandom(_IV_SIZE)
    if isinstance(jwk.public_key, rsa.RSAPublicKey):
        oaep = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)
        header: dict[str, Any] = {"alg": RSA_OAEP_256, "enc": CONTENT_ENCRYPTION}
        wrapped = jwk.public_key.encrypt(content_key, oaep)
        return _flatten(header, wrapped, content_key, iv, plaintext)
    ephemeral = ec.generate_private_key(jwk.public_key.curve)
    return _encrypt_ecdh(plaintext, jwk.public_key, ephemeral, content_key, iv)


def decrypt(data: bytes, key: TeeKey) -> Secret:
    """Open a JWE made for this handshake's key.

    Args:
        data: the answer of the key broker.
        key: the key pair whose public half went into the evidence.

    Raises:
        FormatError, LimitExceeded: not a flattened JWE of the one form that is spoken here.
        WrongKey: it was encrypted to another key.
        Tampered: header, ciphertext or tag were altered.
    """
    value = jcs.parse(data, what="JWE", limit=MAX_JWE)
    if not isinstance(value, dict) or set(value) != set(_MEMBERS):
        raise FormatError(f"JWE: expected exactly the members {', '.join(_MEMBERS)}")
    if not all(isinstance(value[name], str) for name in _MEMBERS):
        raise FormatError("JWE: a member is not a string")
    part = {name: b64u_decode(value[name], what=f"JWE.{name}") for name in _MEMBERS}
    if len(part["iv"]) != _IV_SIZE or len(part["tag"]) != _TAG_SIZE:
        raise FormatError("JWE: iv must have 12 bytes and tag 16")
    ephemeral = _ephemeral_key(part["protected"], key)
    wrapping_key = _agree(key.private_key, ephemeral)
    try:
        content_key = keywrap.aes_key_unwrap(wrapping_key, part["encrypted_key"])
    except (keywrap.InvalidUnwrap, ValueError) as error:
        raise WrongKey(
            "the released key is encrypted to another key than this handshake's"
        ) from error
    if len(content_key) != _KEY_SIZE:
        raise FormatError("JWE: the content key must have 32 bytes")
    try:
        plaintext = AESGCM(content_key).decrypt(
            part["iv"], part["ciphertext"] + part["tag"], value["protected"].encode("ascii")
        )
    except InvalidTag as error:
        raise Tampered("the released key was altered on its way") from error
    return Secret(plaintext)


def _ephemeral_key(protected: bytes, key: TeeKey) -> ec.EllipticCurvePublicKey:
    header = jcs.parse(protected, what="JWE header", limit=4096)
    if not isinstance(header, dict) or set(header) != {"alg", "enc", "epk"}:
        raise FormatError("JWE header: expected exactly alg, enc and epk")
    if header["alg"] != ECDH_ES_A256KW or header["enc"] != CONTENT_ENCRYPTION:
        raise FormatError(f"JWE header: expected {ECDH_ES_A256KW} and {CONTENT_ENCRYPTION}")
    epk = header["epk"]
    wanted = ec_members(key.private_key.public_key())
    if not isinstance(epk, dict) or set(epk) != set(wanted):
        raise FormatError("JWE header: epk must have exactly crv, kty, x and y")
    if not all(isinstance(item, str) for item in epk.values()):
        raise FormatError("JWE header: a member of epk is not a string")
    if epk["kty"] != wanted["kty"] or epk["crv"] != wanted["crv"]:
        raise FormatError(f"JWE header: epk must be an EC key on {wanted['crv']}")
    return ec_public_key(epk, what="JWE header: epk")


def _encrypt_ecdh(
    plaintext: bytes,
    public_key: ec.EllipticCurvePublicKey,
    ephemeral: ec.EllipticCurvePrivateKey,
    content_key: bytes,
    iv: bytes,
) -> bytes:
    header = {
        "alg": ECDH_ES_A256KW,
        "enc": CONTENT_ENCRYPTION,
        "epk": ec_members(ephemeral.public_key()),
    }
    wrapped = keywrap.aes_key_wrap(_agree(ephemeral, public_key), content_key)
    return _flatten(header, wrapped, content_key, iv, plaintext)


def _agree(private: ec.EllipticCurvePrivateKey, public: ec.EllipticCurvePublicKey) -> bytes:
    """ECDH, then Concat KDF with empty party info (RFC 7518 §4.6.2)."""
    algorithm = ECDH_ES_A256KW.encode("ascii")
    other_info = (
        len(algorithm).to_bytes(4) + algorithm + bytes(4) + bytes(4) + (8 * _KEY_SIZE).to_bytes(4)
    )
    shared = private.exchange(ec.ECDH(), public)
    return ConcatKDFHash(hashes.SHA256(), _KEY_SIZE, other_info).derive(shared)


def _flatten(
    header: dict[str, Any], wrapped: bytes, content_key: bytes, iv: bytes, plaintext: bytes
) -> bytes:
    # Insertion order is the wire order here; see the module docstring.
    protected = b64u_encode(json.dumps(header, separators=(",", ":")).encode("ascii"))
    sealed = AESGCM(content_key).encrypt(iv, plaintext, protected.encode("ascii"))
    value = {
        "protected": protected,
        "encrypted_key": b64u_encode(wrapped),
        "iv": b64u_encode(iv),
        "ciphertext": b64u_encode(sealed[:-_TAG_SIZE]),
        "tag": b64u_encode(sealed[-_TAG_SIZE:]),
    }
    return json.dumps(value, separators=(",", ":")).encode("ascii")
