"""HPKE (RFC 9180) with DHKEM(X25519, HKDF-SHA256), in modes Base and Auth.

Only what OHTTP needs: one context that seals or opens by counter, and its exporter. The library's
own HPKE has no Auth mode and no exporter.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from enum import IntEnum
from hashlib import sha256
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from cai.errors import FormatError, Tampered

KEM_ID: Final = 0x0020
"""DHKEM(X25519, HKDF-SHA256)."""

KDF_ID: Final = 0x0001
"""HKDF-SHA256."""

KEY_SIZE = 32
"""Bytes of a public key and of an encapsulated key."""

NONCE_SIZE = 12
"""Bytes of an AEAD nonce; the same for both AEADs."""

_HASH_SIZE = 32
_KEM_SUITE = b"KEM" + KEM_ID.to_bytes(2)


class Aead(IntEnum):
    """AEADs of RFC 9180 §7.3 that are used."""

    AES_128_GCM = 0x0001
    CHACHA20_POLY1305 = 0x0003

    @property
    def key_size(self) -> int:
        """Bytes of its key."""
        return 16 if self is Aead.AES_128_GCM else 32

    def cipher(self, key: bytes) -> AESGCM | ChaCha20Poly1305:
        """The AEAD under a key."""
        return AESGCM(key) if self is Aead.AES_128_GCM else ChaCha20Poly1305(key)


class CounterCipher:
    """An AEAD whose nonce is a base XOR a counter (RFC 9180 §5.2)."""

    def __init__(self, aead: Aead, key: bytes, base_nonce: bytes) -> None:
        self._cipher = aead.cipher(key)
        self._base = int.from_bytes(base_nonce)
        self._counter = 0

    def seal(self, plaintext: bytes, aad: bytes = b"") -> bytes:
        """The next message."""
        return self._cipher.encrypt(self._nonce(), plaintext, aad)

    def open(self, ciphertext: bytes, aad: bytes = b"") -> bytes:
        """The next message of the other end.

        Raises:
            Tampered: it is not the next message that the other end sealed.
        """
        try:
            return self._cipher.decrypt(self._nonce(), ciphertext, aad)
        except InvalidTag as error:
            raise Tampered("an encapsulated message does not authenticate") from error

    def _nonce(self) -> bytes:
        nonce = (self._base ^ self._counter).to_bytes(NONCE_SIZE)
        self._counter += 1
        return nonce


@dataclass(frozen=True, slots=True)
class Context:
    """One direction's context, and what is exported from it.

    Attributes:
        cipher: seals at the sender, opens at the recipient.
        exporter_secret: RFC 9180 §5.3.
        aead: its AEAD.
    """

    cipher: CounterCipher
    exporter_secret: bytes
    aead: Aead

    def export(self, context: bytes, size: int) -> bytes:
        """A secret for this context (RFC 9180 §5.3)."""
        return _labeled_expand(
            _suite(self.aead), self.exporter_secret, b"sec", context, size
        )

    def __repr__(self) -> str:
        return f"Context({self.aead.name})"


def setup_sender(
    aead: Aead, recipient: bytes, info: bytes, *, sender: X25519PrivateKey | None = None
) -> tuple[bytes, Context]:
    """A context to a recipient's public key; ``sender`` makes it mode Auth.

    Returns:
        The encapsulated key, 32 bytes, and the context.

    Raises:
        FormatError: the recipient's key is none.
    """
    return _encapsulate(X25519PrivateKey.generate(), aead, recipient, info, sender)


def _encapsulate(
    ephemeral: X25519PrivateKey,
    aead: Aead,
    recipient: bytes,
    info: bytes,
    sender: X25519PrivateKey | None,
) -> tuple[bytes, Context]:
    enc = ephemeral.public_key().public_bytes_raw()
    secret = _exchange(ephemeral, recipient)
    shared = enc + recipient
    if sender is not None:
        secret += _exchange(sender, recipient)
        shared += sender.public_key().public_bytes_raw()
    return enc, _schedule(aead, _kem_secret(secret, shared), info, auth=sender is not None)


def setup_recipient(
    aead: Aead, enc: bytes, key: X25519PrivateKey, info: bytes, *, sender: bytes | None = None
) -> Context:
    """The recipient's context; ``sender`` is the public key that must have made it (Auth).

    Raises:
        FormatError: one of the keys is none.
    """
    secret = _exchange(key, enc)
    shared = enc + key.public_key().public_bytes_raw()
    if sender is not None:
        secret += _exchange(key, sender)
        shared += sender
    return _schedule(aead, _kem_secret(secret, shared), info, auth=sender is not None)


def expand(key: bytes, info: bytes, size: int) -> bytes:
    """HKDF-Expand with SHA-256 (RFC 5869 §2.3)."""
    blocks, last = b"", b""
    for counter in range(1, -(-size // _HASH_SIZE) + 1):
        last = hmac.digest(key, last + info + bytes([counter]), sha256)
        blocks += last
    return blocks[:size]


def extract(salt: bytes, key: bytes) -> bytes:
    """HKDF-Extract with SHA-256 (RFC 5869 §2.2)."""
    return hmac.digest(salt or bytes(_HASH_SIZE), key, sha256)


def _exchange(key: X25519PrivateKey, public: bytes) -> bytes:
    try:
        return key.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        # A wrong length, or a point of small order (RFC 9180 §7.1.4).
        raise FormatError("an HPKE key is no usable X25519 key") from error


def _kem_secret(dh: bytes, context: bytes) -> bytes:
    eae = _labeled_extract(_KEM_SUITE, b"", b"eae_prk", dh)
    return _labeled_expand(_KEM_SUITE, eae, b"shared_secret", context, _HASH_SIZE)


def _schedule(aead: Aead, shared: bytes, info: bytes, *, auth: bool) -> Context:
    suite = _suite(aead)
    context = bytes([2 if auth else 0])
    context += _labeled_extract(suite, b"", b"psk_id_hash", b"")
    context += _labeled_extract(suite, b"", b"info_hash", info)
    secret = _labeled_extract(suite, shared, b"secret", b"")
    key = _labeled_expand(suite, secret, b"key", context, aead.key_size)
    nonce = _labeled_expand(suite, secret, b"base_nonce", context, NONCE_SIZE)
    exporter = _labeled_expand(suite, secret, b"exp", context, _HASH_SIZE)
    return Context(CounterCipher(aead, key, nonce), exporter, aead)


def _suite(aead: Aead) -> bytes:
    return b"HPKE" + KEM_ID.to_bytes(2) + KDF_ID.to_bytes(2) + aead.to_bytes(2)


def _labeled_extract(suite: bytes, salt: bytes, label: bytes, key: bytes) -> bytes:
    return extract(salt, b"HPKE-v1" + suite + label + key)


def _labeled_expand(suite: bytes, key: bytes, label: bytes, info: bytes, size: int) -> bytes:
    return expand(key, size.to_bytes(2) + b"HPKE-v1" + suite + label + info, size)
