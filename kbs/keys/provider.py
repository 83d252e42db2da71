"""Providers of key encryption keys: who wraps the keys that protect stored rows.

A provider wraps two kinds of keys: the row key of the database, and a fresh data key for each
version of a resource. It may be a file, a passphrase, a hardware module or a key service; the
broker asks it only for these two calls and never trusts its answer: what it wraps names its context
(``bind``), and what is sealed under a key names that key (``commitment``), so a provider that gives
back another key is found out.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from hashlib import sha256
from typing import Final, Protocol

from cai.errors import Tampered
from cai.secret import Secret

KEY_SIZE: Final = 32
"""Bytes of each key that a provider wraps."""

MAX_WRAPPED: Final = 4096
"""Longest wrapped key that is kept or unwrapped, bytes."""

COMMITMENT_SIZE: Final = 32
"""Bytes of the commitment to a key."""

_DOMAIN: Final = b"cai/kbs wrap v1\x00"
_COMMIT: Final = b"cai/kbs commit v1\x00"


class KeyProvider(Protocol):
    """Wraps and unwraps keys of ``KEY_SIZE`` bytes.

    Attributes:
        id: names the provider and its key in the database, e.g. ``pkcs11:kbs/kek``; stable, and no
            secret.
    """

    id: str

    def wrap(self, key: Secret, context: bytes) -> bytes:
        """The key, encrypted for storage.

        Args:
            key: ``KEY_SIZE`` bytes.
            context: what the key is for; the same bytes are needed to unwrap it.

        Raises:
            Unavailable: the provider does not answer now.
            CaiError: it refuses.
        """
        ...

    def unwrap(self, wrapped: bytes, context: bytes) -> Secret:
        """The key again.

        Raises:
            Tampered: these bytes were not wrapped for this context.
            WrongKey: they were wrapped under another key of the provider.
            Unavailable: the provider does not answer now.
        """
        ...

    def close(self) -> None:
        """Give back what it holds open."""
        ...


@dataclass(frozen=True, slots=True)
class WrappedKey:
    """A key as stored.

    Attributes:
        provider: id of the provider that wrapped it.
        blob: what that provider made of it.
    """

    provider: str
    blob: bytes


def bind(key: Secret, context: bytes) -> bytes:
    """What a provider encrypts: the key and a digest of its context, 64 bytes.

    So the context is authenticated also by mechanisms without associated data (AES key wrap, a
    key service's plain encrypt call).
    """
    return key.reveal() + sha256(_DOMAIN + context).digest()


def unbind(data: bytes, context: bytes, *, provider: str) -> Secret:
    """The key inside ``bind``'s bytes.

    Raises:
        Tampered: another length or another context.
    """
    key, digest = data[:KEY_SIZE], data[KEY_SIZE:]
    if not hmac.compare_digest(digest, sha256(_DOMAIN + context).digest()):
        raise Tampered(
            f"a key from provider {provider} was not wrapped for this row",
            hint="the database was edited, or the provider answers with another key",
        )
    return Secret(key)


def commitment(key: Secret, context: bytes) -> bytes:
    """Names a key without telling it: HMAC-SHA-256 under the key, 32 bytes."""
    return hmac.digest(key.reveal(), _COMMIT + context, "sha256")


def require_commitment(key: Secret, context: bytes, expected: bytes, *, provider: str) -> None:
    """Refuse a key that is not the one committed to.

    Raises:
        Tampered: it is another.
    """
    if not hmac.compare_digest(commitment(key, context), expected):
        raise Tampered(
            f"provider {provider} gave another key than the one that was wrapped",
            hint="check the provider's configuration; nothing was opened with that key",
            code="another-key",
        )
