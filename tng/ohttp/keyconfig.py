"""Key configurations: the list of RFC 9458, and the member that evidence is about. Pure."""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from cai.errors import FormatError, LimitExceeded
from tng.ohttp.hpke import KDF_ID, KEM_ID, KEY_SIZE, Aead

MAX_KEY_LIST = 64 * 1024
"""Longest list of key configurations, bytes."""

SUITES: Final = (Aead.AES_128_GCM, Aead.CHACHA20_POLY1305)
"""AEADs as offered, the preferred one first (the order of 2.12)."""


@dataclass(frozen=True, slots=True)
class KeyConfig:
    """A server's current key, as its evidence names it.

    Attributes:
        expires: when it stops being served, Unix seconds.
        encoded: base64 of the RFC 9458 list, exactly as received: evidence is about this text.
    """

    expires: int
    encoded: str

    def to_json(self) -> dict[str, Any]:
        """The member ``hpke_key_config``."""
        return {"encoded_key_config_list": self.encoded, "expire_timestamp": self.expires}

    @classmethod
    def from_json(cls, value: object) -> KeyConfig:
        """Read the member.

        Raises:
            FormatError: of another form.
        """
        members = object_of(value, "key configuration")
        expires, encoded = members.get("expire_timestamp"), members.get("encoded_key_config_list")
        if type(expires) is not int or not isinstance(encoded, str):
            raise FormatError("key configuration: a member is missing or of another kind")
        return cls(expires, encoded)

    def choose(self) -> tuple[int, bytes, Aead]:
        """Key id, public key and AEAD to use: the server's first that is served here.

        Raises:
            FormatError, LimitExceeded: the list is malformed or offers nothing usable.
        """
        return choose(unbase64(self.encoded, "key configuration"))


def encode_key_list(key_id: int, public: bytes) -> bytes:
    """One key configuration as an RFC 9458 §3.2 list."""
    suites = b"".join(struct.pack(">HH", KDF_ID, aead) for aead in SUITES)
    config = struct.pack(">BH", key_id, KEM_ID) + public + struct.pack(">H", len(suites)) + suites
    return struct.pack(">H", len(config)) + config


def choose(data: bytes) -> tuple[int, bytes, Aead]:
    """The first usable key of a list.

    Returns:
        Key id, public key (32 bytes) and AEAD.

    Raises:
        FormatError, LimitExceeded: the list is malformed or offers nothing usable.
    """
    if len(data) > MAX_KEY_LIST:
        raise LimitExceeded(f"key configuration of {len(data)} bytes, at most {MAX_KEY_LIST}")
    usable: tuple[int, bytes, Aead] | None = None
    at = 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 2])
        config = data[at + 2 : at + 2 + size]
        if len(data) < at + 2 or len(config) != size:
            raise FormatError("key configuration: truncated list")
        at += 2 + size
        usable = usable or _usable(config)
    if usable is None:
        raise FormatError("key configuration: no key with X25519, HKDF-SHA256 and a served AEAD")
    return usable


def _usable(config: bytes) -> tuple[int, bytes, Aead] | None:
    if len(config) < 3:
        raise FormatError("key configuration: truncated")
    if int.from_bytes(config[1:3]) != KEM_ID:
        return None
    public, rest = config[3 : 3 + KEY_SIZE], config[3 + KEY_SIZE :]
    size = int.from_bytes(rest[:2])
    suites = rest[2:]
    if len(public) != KEY_SIZE or len(rest) < 2 or len(suites) != size or size % 4:
        raise FormatError("key configuration: truncated")
    for place in range(0, size, 4):
        kdf, aead = struct.unpack_from(">HH", suites, place)
        if kdf == KDF_ID and aead in tuple(Aead):
            return config[0], public, Aead(aead)
    return None


def unbase64(text: str, what: str) -> bytes:
    """Standard base64.

    Raises:
        FormatError: it is none.
    """
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise FormatError(f"{what}: not base64") from error


def base64_text(data: bytes) -> str:
    """Standard base64, padded."""
    return base64.b64encode(data).decode("ascii")


def object_of(value: object, what: str) -> Mapping[str, Any]:
    """A JSON value that must be an object.

    Raises:
        FormatError: it is something else.
    """
    if not isinstance(value, dict):
        raise FormatError(f"{what}: expected an object")
    return value
