"""``gocryptfs.conf``: how a cipher directory is made, and its master key under a password (§2).

The file comes from outside: nothing in it is authenticated before the password opens it, and its
numbers decide how much memory scrypt takes.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cai import __version__, jcs
from cai.errors import FormatError, InputError, LimitExceeded, WrongKey
from cai.model import derive
from cai.model.gocryptfs.layout import (
    CONF_FILE,
    IV_SIZE,
    MASTER_KEY_SIZE,
    MAX_CONF_FILE,
    MAX_PASSWORD,
    MAX_SCRYPT_MEMORY,
    MAX_SCRYPT_P,
    MIN_LONG_NAME_MAX,
    NAME_MAX,
    TAG_SIZE,
)
from cai.secret import Secret

VERSION = 2
CONTENT_LABEL = b"AES-GCM file content encryption"
NAME_LABEL = b"EME filename encryption"

DEFAULT_FLAGS = ("HKDF", "GCMIV128", "DirIV", "EMENames", "LongNames", "Raw64")
"""Feature flags of default parameters, in stock's order."""

PASSWORD_LOG2_N, KEY_LOG2_N = 16, 10
"""Cost of scrypt for a human password, which is stock's default, and for a random key."""

MIN_N, MIN_R, MIN_P, MIN_SALT = 1 << 10, 8, 1, 32
MAX_SALT = 1024
_SCRYPT_SLACK = 1 << 26
_WRAPPED_SIZE = IV_SIZE + MASTER_KEY_SIZE + TAG_SIZE
_WRAP_AAD = bytes(8)

_PLAIN_NAMES = frozenset({"HKDF", "GCMIV128", "PlaintextNames"})
_NAMES = frozenset({"HKDF", "GCMIV128", "EMENames", "LongNames", "Raw64"})
_REFUSED = {
    "AESSIV": "AES-SIV content encryption (option -aessiv or -reverse)",
    "XChaCha20Poly1305": "XChaCha20-Poly1305 content encryption (option -xchacha)",
    "FIDO2": "a FIDO2 token",
}


@dataclass(frozen=True, slots=True)
class Config:
    """A parsed configuration.

    Attributes:
        wrapped: the master key under the password, 64 bytes.
        salt: of scrypt.
        n: cost of scrypt, a power of two.
        r: block size of scrypt.
        p: lanes of scrypt.
        flags: feature flags.
        long_name_max: longest encrypted name that is stored as such, characters.
    """

    wrapped: bytes
    salt: bytes
    n: int
    r: int = MIN_R
    p: int = MIN_P
    flags: tuple[str, ...] = DEFAULT_FLAGS
    long_name_max: int = NAME_MAX

    @property
    def plaintext_names(self) -> bool:
        """Names and targets of links are in clear."""
        return "PlaintextNames" in self.flags

    @property
    def directory_ivs(self) -> bool:
        """Every directory has an IV of its own."""
        return "DirIV" in self.flags

    @classmethod
    def create(cls, password: Secret, master_key: bytes, *, log2_n: int) -> Config:
        """A new configuration with default parameters.

        Raises:
            FormatError, LimitExceeded: the password is empty or too long.
        """
        salt, iv = os.urandom(MIN_SALT), os.urandom(IV_SIZE)
        config = cls(bytes(_WRAPPED_SIZE), salt, 1 << log2_n)
        return cls(wrap(master_key, config.password_key(password), iv), salt, 1 << log2_n)

    def encode(self) -> bytes:
        """The file's bytes, laid out as stock writes them."""
        body = {
            "Creator": f"cai {__version__}",
            "EncryptedKey": base64.b64encode(self.wrapped).decode("ascii"),
            "ScryptObject": {
                "Salt": base64.b64encode(self.salt).decode("ascii"),
                "N": self.n, "R": self.r, "P": self.p, "KeyLen": MASTER_KEY_SIZE,
            },
            "Version": VERSION,
            "FeatureFlags": list(self.flags),
        }
        return json.dumps(body, indent="\t").encode("ascii") + b"\n"

    @classmethod
    def parse(cls, data: bytes) -> Config:
        """Parse the file; members that nobody knows are passed over, as stock does.

        Raises:
            FormatError, LimitExceeded: it is not such a file, or wants too much of scrypt.
            InputError: it is made with parameters that this program does not read.
        """
        value = jcs.parse(data, what=CONF_FILE, limit=MAX_CONF_FILE)
        if not isinstance(value, dict):
            raise _wrong("is not a JSON object")
        if value.get("Version") != VERSION:
            raise InputError(
                f"{CONF_FILE}: version {value.get('Version')!r} of gocryptfs is not read",
                hint="only version 2 is; copy the files out with stock gocryptfs",
            )
        flags = _flags(value.get("FeatureFlags"))
        scrypt = value.get("ScryptObject")
        if not isinstance(scrypt, dict):
            raise _wrong("has no ScryptObject")
        config = cls(
            wrapped=_base64(value, "EncryptedKey"),
            salt=_base64(scrypt, "Salt"),
            n=_integer(scrypt, "N"), r=_integer(scrypt, "R"), p=_integer(scrypt, "P"),
            flags=flags,
            long_name_max=_long_name_max(value, flags),
        )
        config._check_scrypt(_integer(scrypt, "KeyLen"))
        if len(config.wrapped) != _WRAPPED_SIZE:
            raise _wrong(f"has an EncryptedKey of {len(config.wrapped)} bytes")
        return config

    def password_key(self, password: Secret) -> bytes:
        """The key that wraps the master key: scrypt, then HKDF.

        Raises:
            FormatError, LimitExceeded: the password is empty or too long.
        """
        check_password(password)
        try:
            hashed = hashlib.scrypt(
                password.reveal(), salt=self.salt, n=self.n, r=self.r, p=self.p,
                maxmem=MAX_SCRYPT_MEMORY + _SCRYPT_SLACK, dklen=MASTER_KEY_SIZE,
            )
        except (ValueError, MemoryError) as error:
            raise LimitExceeded(f"{CONF_FILE}: scrypt cannot run with its parameters") from error
        return hkdf(hashed, CONTENT_LABEL)

    def unlock(self, password: Secret) -> bytes:
        """The master key.

        Raises:
            WrongKey: the password is another one, or the file was altered.
            FormatError, LimitExceeded: the password is empty or too long.
        """
        key = self.password_key(password)
        try:
            iv, sealed = self.wrapped[:IV_SIZE], self.wrapped[IV_SIZE:]
            return AESGCM(key).decrypt(iv, sealed, _WRAP_AAD)
        except InvalidTag:
            raise WrongKey(
                f"the password does not open {CONF_FILE}, or that file was altered",
                hint="give the password that the directory was made with",
            ) from None

    def _check_scrypt(self, length: int) -> None:
        if self.n < MIN_N or self.n & (self.n - 1) or self.r < MIN_R or self.p < MIN_P:
            raise _wrong("has weak parameters of scrypt")
        if len(self.salt) < MIN_SALT or len(self.salt) > MAX_SALT or length != MASTER_KEY_SIZE:
            raise _wrong("has a salt or a length of key that scrypt is not used with")
        if 128 * self.n * self.r > MAX_SCRYPT_MEMORY or self.p > MAX_SCRYPT_P:
            raise LimitExceeded(
                f"{CONF_FILE}: scrypt with N = {self.n}, r = {self.r}, p = {self.p} takes more "
                f"than {MAX_SCRYPT_MEMORY >> 20} MiB or {MAX_SCRYPT_P} lanes"
            )


def wrap(master_key: bytes, key: bytes, iv: bytes) -> bytes:
    """``EncryptedKey``: IV, the master key's ciphertext, tag; 64 bytes."""
    return iv + AESGCM(key).encrypt(iv, master_key, _WRAP_AAD)


def hkdf(key: bytes, label: bytes) -> bytes:
    """HKDF-SHA256 without salt, 32 bytes."""
    return derive.expand(derive.extract(bytes(32), key), label)


def check_password(password: Secret) -> None:
    """Refuse what stock would not take as a password.

    Raises:
        FormatError: it is empty, or holds a line break, which stock would cut off.
        LimitExceeded: it is longer than ``MAX_PASSWORD`` bytes.
    """
    text = password.reveal()
    if not text or b"\n" in text:
        raise FormatError("the password is empty or has more than one line")
    if len(text) > MAX_PASSWORD:
        raise LimitExceeded(f"the password has more than {MAX_PASSWORD} bytes")


def _flags(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(flag, str) for flag in value):
        raise _wrong("has no list FeatureFlags")
    flags = frozenset(value)
    if len(flags) != len(value):
        raise _wrong("names a feature flag twice")
    for flag in sorted(flags & _REFUSED.keys()):
        raise InputError(
            f"{CONF_FILE}: made with {_REFUSED[flag]}, which is not read",
            hint="copy the files out with stock gocryptfs and seal them again",
        )
    known = {*DEFAULT_FLAGS, "LongNameMax", "PlaintextNames"}
    for flag in sorted(flags - known):
        raise InputError(f"{CONF_FILE}: feature flag {flag!r} is not known")
    needed = _PLAIN_NAMES if "PlaintextNames" in flags else _NAMES
    optional = frozenset() if "PlaintextNames" in flags else frozenset({"DirIV", "LongNameMax"})
    if not needed <= flags or flags - needed - optional:
        missing = ", ".join(sorted(needed - flags) or sorted(flags - needed - optional))
        raise InputError(
            f"{CONF_FILE}: feature flags that are not read together (see {missing})",
            hint="an old or unusual gocryptfs directory; copy the files out with stock gocryptfs",
        )
    return tuple(value)


def _long_name_max(value: dict[str, Any], flags: tuple[str, ...]) -> int:
    if "LongNameMax" not in flags:
        return NAME_MAX
    number = _integer(value, "LongNameMax")
    if not MIN_LONG_NAME_MAX <= number <= NAME_MAX:
        raise _wrong(f"has LongNameMax {number}, not {MIN_LONG_NAME_MAX} to {NAME_MAX}")
    return number


def _integer(value: dict[str, Any], name: str) -> int:
    number = value.get(name)
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise _wrong(f"has no number {name}")
    return number


def _base64(value: dict[str, Any], name: str) -> bytes:
    text = value.get(name)
    try:
        return base64.b64decode(str(text).encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise _wrong(f"has no base64 {name}") from error


def _wrong(what: str) -> FormatError:
    return FormatError(f"{CONF_FILE} {what}")
