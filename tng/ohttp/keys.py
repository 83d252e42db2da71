"""The HPKE keys of an egress: made here and rotated, or read from a watched file.

A key is active for one interval, stale for another, in which requests made for it are still opened,
then gone. What a key has opened is remembered while it lives, so that a request is opened once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from cai.errors import CaiError, FormatError, Refused, from_os_error
from tng.config.transport import KeyFile, OwnKey
from tng.ohttp.keyconfig import KeyConfig, base64_text, encode_key_list
from tng.operation.journal import Journal

KEY_ID = 0
"""Key identifier of every key, as in stock TNG: the hint tells keys apart."""

FILE_VALID_S = 600
"""How long clients may use a key from a file without asking again, and how long a key is still
opened for after the file has changed, seconds."""

LATE_S = 30
"""How long after its end a key still opens requests that were under way, seconds."""

MIN_ROTATION_S = 1
"""Shortest interval between two keys, seconds; 0 in a configuration means this."""

FILE_CHECK_S = 1.0
"""Pause between two looks at a key file, seconds."""

MAX_KEY_FILE = 16 * 1024
"""Largest key file, bytes."""

MAX_OPENED = 200_000
"""Most requests that one key remembers; beyond them the oldest is forgotten."""

Clock = Callable[[], float]


class Replayed(Refused):
    """An encapsulated request that was opened before."""

    code = "replayed"


@dataclass(slots=True)
class ServedKey:
    """One key.

    Attributes:
        private: the key.
        public: its public part, 32 bytes.
        made: when it became active, Unix seconds.
        stale: when it stops being the active one.
        expires: when clients stop using it.
        config: how clients are told.
    """

    private: X25519PrivateKey = field(repr=False)
    public: bytes
    made: float
    stale: float
    expires: float
    config: KeyConfig
    opened: dict[bytes, None] = field(default_factory=dict, repr=False)

    def open_once(self, enc: bytes) -> None:
        """Remember an encapsulated key.

        Raises:
            Replayed: it was there before.
        """
        if enc in self.opened:
            raise Replayed("this encapsulated request was opened before")
        self.opened[enc] = None
        while len(self.opened) > MAX_OPENED:
            del self.opened[next(iter(self.opened))]


class KeyRing:
    """The keys that one egress opens requests for.

    Args:
        settings: where they come from.
        journal: where its lines go.
        name: of the entry.
        clock: Unix seconds.

    Raises:
        CaiError: the key file cannot be read.
    """

    def __init__(
        self, settings: KeyFile | OwnKey, journal: Journal, name: str, *, clock: Clock = time.time
    ) -> None:
        self._settings = settings
        self._journal = journal
        self._name = name
        self._clock = clock
        self._keys: list[ServedKey] = []
        self._mark: tuple[int, int, int] | None = None
        self._looked = float("-inf")
        if isinstance(settings, KeyFile):
            self._load(settings.path)

    def active(self) -> ServedKey:
        """The key that clients are to use now."""
        self._advance()
        return self._keys[0]

    def find(self, hint: bytes, key_id: int) -> ServedKey | None:
        """The key that a request names; ``None`` when it is not served, or no more."""
        if key_id != KEY_ID:
            return None
        active = self.active()
        if not hint:
            return active
        return next((key for key in self._keys if key.public == hint), None)

    def status(self) -> dict[str, object]:
        """As stock TNG's control interface shows keys."""
        active = self.active()
        shown: list[dict[str, object]] = [
            {
                "key_id": KEY_ID,
                "public_key": key.public.hex(),
                "status": "Active" if key is active else "Stale",
                "actived_at": int(key.made),
                "stale_at": int(key.stale),
                "expire_at": int(key.expires),
            }
            for key in self._keys
        ]
        if isinstance(self._settings, KeyFile):
            return {"key_manager_type": "file", "key": shown[0], "local_keys": shown}
        return {"key_manager_type": "self_generated", "local_keys": shown}

    def _advance(self) -> None:
        now = self._clock()
        if isinstance(self._settings, KeyFile):
            self._watch(self._settings.path, now)
            active = self._keys[0]
            if active.config.expires - now < FILE_VALID_S / 2:
                # The same key for longer; a client learns of it when it asks again.
                active.expires = now + FILE_VALID_S
                active.config = _config(active.public, active.expires)
        elif not self._keys or now >= self._keys[0].stale:
            interval = max(MIN_ROTATION_S, self._settings.rotation_s)
            key = X25519PrivateKey.generate()
            self._keys.insert(0, _served(key, now, now + interval, now + 2 * interval))
        self._keys = [self._keys[0]] + [
            key for key in self._keys[1:] if key.expires + LATE_S > now
        ]

    def _watch(self, path: Path, now: float) -> None:
        if now - self._looked < FILE_CHECK_S:
            return
        try:
            self._load(path)
        except CaiError as error:
            self._journal.line(f"{self._name} keeps its OHTTP key: {error.message}")

    def _load(self, path: Path) -> None:
        now = self._clock()
        self._looked = now
        try:
            stat = path.stat()
            mark = stat.st_mtime_ns, stat.st_size, stat.st_ino
            if mark == self._mark:
                return
            with path.open("rb") as file:
                data = file.read(MAX_KEY_FILE)
        except OSError as error:
            raise from_os_error(error, f"read OHTTP key {path}") from error
        self._mark = mark
        key = parse_key(data, str(path))
        public = key.public_key().public_bytes_raw()
        known = next((item for item in self._keys if item.public == public), None)
        for item in self._keys:
            item.stale = min(item.stale, now)
            item.expires = min(item.expires, now + FILE_VALID_S)
        if known is not None:
            self._keys.remove(known)
            known.stale, known.expires = float(2**62), now + FILE_VALID_S
            known.config = _config(public, known.expires)
        self._keys.insert(0, known or _served(key, now, float(2**62), now + FILE_VALID_S))


def parse_key(data: bytes, where: str) -> X25519PrivateKey:
    """An X25519 key in PKCS#8 PEM.

    Raises:
        FormatError: it is anything else.
    """
    try:
        key = load_pem_private_key(data, None)
    except Exception as error:  # the library's exceptions for unreadable keys share no base
        raise FormatError(f"{where}: no PKCS#8 PEM key") from error
    if not isinstance(key, X25519PrivateKey):
        raise FormatError(f"{where}: not an X25519 key")
    return key


def _served(key: X25519PrivateKey, now: float, stale: float, expires: float) -> ServedKey:
    public = key.public_key().public_bytes_raw()
    return ServedKey(key, public, now, stale, expires, _config(public, expires))


def _config(public: bytes, expires: float) -> KeyConfig:
    return KeyConfig(int(expires), base64_text(encode_key_list(KEY_ID, public)))
