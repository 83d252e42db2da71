"""Who signs reference values: registered public keys, and the signed form of a bundle.

Pure. The signature is over a bundle's exact bytes, by Ed25519 or by ECDSA P-256 with SHA-256 in DER
as ``cosign sign-blob`` makes it (docs/kbs-policies.md §5).
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from operator import itemgetter

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
)

from cai import jcs
from cai.errors import FormatError, LimitExceeded, Refused
from kbs.policy.references import MAX_BUNDLE, Bundle, unb64

MAX_KEY = 4096
"""Largest PEM of a public key, bytes."""

MAX_SIGNATURE = 1024
"""Longest signature in base64, characters."""

KEPT = 32
"""How many opened bundles are kept, so that a release need not verify each one again."""


class ReferenceKey:
    """A public key that may sign bundles.

    Attributes:
        kind: ``ed25519`` or ``ecdsa-p256``.
        id: SHA-256 of its SubjectPublicKeyInfo, hex.
    """

    def __init__(self, key: Ed25519PublicKey | ec.EllipticCurvePublicKey) -> None:
        self._key = key
        self.kind = "ed25519" if isinstance(key, Ed25519PublicKey) else "ecdsa-p256"
        spki = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        self.id = sha256(spki).hexdigest()

    @classmethod
    def parse(cls, pem: bytes) -> ReferenceKey:
        """Read a PEM ``PUBLIC KEY``, as ``openssl`` and ``cosign`` write it.

        Raises:
            LimitExceeded: longer than ``MAX_KEY``.
            FormatError: not PEM, or a key of another kind.
        """
        if len(pem) > MAX_KEY:
            raise LimitExceeded(f"public key: {len(pem)} bytes, at most {MAX_KEY} are accepted")
        try:
            key = load_pem_public_key(pem)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise FormatError("public key: not a PEM public key") from error
        if isinstance(key, Ed25519PublicKey):
            return cls(key)
        if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1):
            return cls(key)
        raise FormatError("public key: expected Ed25519 or ECDSA P-256")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ReferenceKey) and self.id == other.id

    def __hash__(self) -> int:
        return hash(self.id)

    def verifies(self, data: bytes, signature: bytes) -> bool:
        """Whether this key signed these bytes (ECDSA: DER, SHA-256, as cosign does)."""
        try:
            if isinstance(self._key, Ed25519PublicKey):
                self._key.verify(signature, data)
            else:
                self._key.verify(signature, data, ec.ECDSA(hashes.SHA256()))
        except InvalidSignature:
            return False
        return True


@dataclass(frozen=True, slots=True)
class SignedBundle:
    """A bundle's exact bytes and the signature over them."""

    bundle: bytes
    signature: bytes

    @classmethod
    def parse(cls, data: bytes) -> SignedBundle:
        """Read ``{"bundle": base64, "signature": base64}``.

        Raises:
            LimitExceeded, FormatError: it has another form.
        """
        value = jcs.parse(data, what="signed bundle", limit=2 * MAX_BUNDLE)
        if not isinstance(value, dict) or set(value) != {"bundle", "signature"}:
            raise FormatError("signed bundle: expected the members bundle and signature")
        signature = value["signature"]
        if not isinstance(signature, str) or len(signature) > MAX_SIGNATURE:
            raise FormatError("signed bundle: signature must be short base64")
        return cls(unb64(value["bundle"], "bundle"), unb64(signature, "signature"))

    def encode(self) -> bytes:
        """The form that ``parse`` reads, canonical."""
        return jcs.canonical(
            {
                "bundle": base64.b64encode(self.bundle).decode("ascii"),
                "signature": base64.b64encode(self.signature).decode("ascii"),
            }
        )

    def opened(self, keys: Mapping[str, ReferenceKey]) -> tuple[Bundle, str]:
        """The bundle, if one of these keys signed it, and that key's name.

        Raises:
            Refused: none did.
            FormatError, LimitExceeded: the bundle has another form.
        """
        return _opened(self, tuple(sorted(keys.items(), key=itemgetter(0))))


@lru_cache(maxsize=KEPT)
def _opened(
    signed: SignedBundle, keys: tuple[tuple[str, ReferenceKey], ...]
) -> tuple[Bundle, str]:
    # The signature first: nobody else's bytes are worth parsing.
    for name, key in keys:
        if key.verifies(signed.bundle, signed.signature):
            return Bundle.parse(signed.bundle), name
    raise Refused(
        "no registered key signed this bundle",
        hint="kbs reference keys add NAME FILE.pem",
        code="reference-signature",
    )
