"""What the attestation service signs: appraisals with the key in their header, and its key set.

Unlike the broker's own tokens these are read by strangers, so they bring their key and its chain
along as Trustee's do. A reader trusts the chain's authority, which it pinned, and nothing else. No
release ever accepts one: audience, use and key are others.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from typing import Any, Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from cai import jcs
from cai.attest.jwk import b64u_encode, ec_members
from kbs.keys.signing import SigningKey

USE: Final = "appraisal"
"""``use`` of these tokens."""

ALGORITHM: Final = "ES256"
"""The one signature algorithm."""

_HALF: Final = 32


def sign_appraisal(claims: Mapping[str, Any], key: SigningKey) -> str:
    """An appraisal as a JWT whose header has ``jwk`` and, in it, ``x5c``."""
    # Readers of these tokens decode x5c as base64url, whatever RFC 7515 §4.1.6 says.
    jwk = {**_public(key), "x5c": [b64u_encode(item) for item in key.chain]}
    return sign_jwt({"alg": ALGORITHM, "jwk": jwk, "typ": "JWT"}, claims, key)


def sign_jwt(header: Mapping[str, Any], claims: Mapping[str, Any], key: SigningKey) -> str:
    """A JWT signed by ES256."""
    parts = (b64u_encode(jcs.canonical(dict(part))) for part in (header, claims))
    signed = ".".join(parts)
    der = key.es256.sign(signed.encode("ascii"), ec.ECDSA(hashes.SHA256()))
    signature = b"".join(half.to_bytes(_HALF) for half in decode_dss_signature(der))
    return f"{signed}.{b64u_encode(signature)}"


def key_set(keys: Iterable[SigningKey]) -> dict[str, Any]:
    """The keys whose signatures are good, as a JWK set (RFC 7517)."""
    return {
        "keys": [
            {
                **_public(key),
                "kid": key.id,
                "use": "sig",
                "x5c": [base64.b64encode(item).decode("ascii") for item in key.chain],
            }
            for key in keys
        ]
    }


def authorities(keys: Iterable[SigningKey]) -> str:
    """The authorities of these keys, PEM, the current one first."""
    return "".join(_pem(key.chain[-1]) for key in keys if key.chain)


def _public(key: SigningKey) -> dict[str, str]:
    return {"alg": ALGORITHM, **ec_members(key.es256.public_key())}


def _pem(der: bytes) -> str:
    text = base64.encodebytes(der).decode("ascii").replace("\n", "")
    lines = [text[at : at + 64] for at in range(0, len(text), 64)]
    return "\n".join(["-----BEGIN CERTIFICATE-----", *lines, "-----END CERTIFICATE-----", ""])
