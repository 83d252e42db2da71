"""A key encryption key that never leaves a hardware module, reached over PKCS #11.

The key is an AES-256 key on a token: sensitive and not extractable, else it is refused. Two
mechanisms: ``aes-gcm`` (CKM_AES_GCM, a random 96-bit nonce, the context as additional data) and
``aes-key-wrap`` (CKM_AES_KEY_WRAP, RFC 3394, of a session object). A stored key says by which of
them it was wrapped, so the setting may change.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, TypeVar

from cai.errors import CaiError, InputMissing, SettingError, Tampered, Unavailable, WrongKey
from cai.secret import Secret
from kbs.keys.optional import load
from kbs.keys.provider import KEY_SIZE, bind, unbind
from kbs.keys.secret_input import SecretInput

NONCE_SIZE: Final = 12
"""Bytes of GCM's nonce; at random, good for far more keys than a broker ever wraps."""

TAG_BITS: Final = 128

_GCM, _KEY_WRAP = b"\x01", b"\x02"

T = TypeVar("T")


class Mechanism(StrEnum):
    """How the token wraps."""

    AES_GCM = "aes-gcm"
    AES_KEY_WRAP = "aes-key-wrap"


@dataclass(frozen=True, slots=True)
class TokenKey:
    """Where the key is.

    Attributes:
        module: the vendor's PKCS #11 library.
        token: label of the token.
        key: label of the key.
        pin: where the user PIN comes from.
        mechanism: how new keys are wrapped.
        unsafe_extractable_key: accept a key that can leave the token.
    """

    module: Path
    token: str
    key: str
    pin: SecretInput
    mechanism: Mechanism = Mechanism.AES_GCM
    unsafe_extractable_key: bool = False


@dataclass
class _Login:
    """One session with a token, shared by its users: logging out would end all of them."""

    lock: threading.RLock = field(default_factory=threading.RLock)
    session: Any = None
    users: int = 0


_LOGINS: Final[dict[tuple[str, str], _Login]] = {}
_LOGINS_LOCK: Final = threading.Lock()


class Pkcs11Provider:
    """Wraps by a key on a token.

    Args:
        where: the token and the key; both are looked for at the first use, and again after trouble.

    Raises:
        SettingError: python-pkcs11 is not installed.
    """

    def __init__(self, where: TokenKey) -> None:
        self._pkcs11 = load("pkcs11", extra="pkcs11")
        self._where = where
        self.id = f"pkcs11:{where.token}/{where.key}"
        with _LOGINS_LOCK:
            place = (str(where.module), where.token)
            self._login = _LOGINS.setdefault(place, _Login())
            self._login.users += 1
        self._closed = False

    def wrap(self, key: Secret, context: bytes) -> bytes:
        """See ``KeyProvider``."""
        data = bind(key, context)
        if self._where.mechanism is Mechanism.AES_KEY_WRAP:
            return _KEY_WRAP + self._use(lambda kek: self._key_wrap(kek, data))
        return _GCM + self._use(lambda kek: self._encrypt(kek, data, context))

    def unwrap(self, wrapped: bytes, context: bytes) -> Secret:
        """See ``KeyProvider``."""
        kind, body = wrapped[:1], wrapped[1:]
        if kind == _KEY_WRAP:
            data = self._use(lambda kek: self._key_unwrap(kek, body), opening=True)
        elif kind == _GCM:
            data = self._use(lambda kek: self._decrypt(kek, body, context), opening=True)
        else:
            raise Tampered(f"a key wrapped by {self.id} has an unknown mechanism")
        return unbind(data, context, provider=self.id)

    def close(self) -> None:
        """Log out, when nobody else in this process uses the token."""
        with _LOGINS_LOCK:
            if self._closed:
                return
            self._closed = True
            self._login.users -= 1
            last = self._login.users == 0
        if last:
            with self._login.lock:
                self._drop()

    def _use(self, work: Callable[[Any], T], *, opening: bool = False) -> T:
        """Do something with the key; one at a time, as a session demands.

        A token that was away is looked for once more. What a token says about data that does not
        authenticate differs between vendors, so a failure while opening is put down to the data
        only when the same key still works on other data.
        """
        with self._login.lock:
            for again in (True, False):
                try:
                    return work(self._key())
                except self._pkcs11.PKCS11Error as error:
                    if opening and self._still_works():
                        raise Tampered(
                            f"a key wrapped by {self.id} does not authenticate",
                            hint="the database was edited, or the token has another key",
                        ) from error
                    self._drop()
                    if not again:
                        raise self._unavailable(error) from error
        raise AssertionError  # pragma: no cover - the second round returns or raises

    def _still_works(self) -> bool:
        probe = bytes(2 * KEY_SIZE)
        try:
            kek = self._key()
            return bool(self._decrypt(kek, self._encrypt(kek, probe, b""), b"") == probe)
        except (self._pkcs11.PKCS11Error, CaiError):
            return False

    def _key(self) -> Any:
        pkcs11 = self._pkcs11
        try:
            kek = self._session().get_key(
                object_class=pkcs11.ObjectClass.SECRET_KEY,
                key_type=pkcs11.KeyType.AES,
                label=self._where.key,
            )
        except pkcs11.NoSuchKey as error:
            raise InputMissing(
                f"token {self._where.token!r} has no AES key {self._where.key!r}",
                hint="kbs key make-pkcs11 makes one",
            ) from error
        except pkcs11.MultipleObjectsReturned as error:
            raise WrongKey(f"token {self._where.token!r} has several such keys") from error
        self._require_sound(kek)
        return kek

    def _require_sound(self, kek: Any) -> None:
        attribute = self._pkcs11.Attribute
        if kek.key_length != 8 * KEY_SIZE:
            raise WrongKey(f"{self.id} is a key of {kek.key_length} bits, not {8 * KEY_SIZE}")
        leaves = kek[attribute.EXTRACTABLE] or not kek[attribute.SENSITIVE]
        if leaves and not self._where.unsafe_extractable_key:
            raise SettingError(
                f"{self.id} can leave its token",
                hint="make a sensitive key that is not extractable, or unsafe_extractable_key",
            )

    def _session(self) -> Any:
        login, pkcs11 = self._login, self._pkcs11
        if login.session is None:
            try:
                library = pkcs11.lib(str(self._where.module))
            except (RuntimeError, OSError) as error:
                raise self._unavailable(error) from error
            token = self._token(library)
            pin = self._where.pin.read().reveal().decode("utf-8", "replace")
            try:
                login.session = token.open(user_pin=pin)
            except (pkcs11.PinIncorrect, pkcs11.PinLocked, pkcs11.PinInvalid) as error:
                # Not tried again: a token locks itself after a few wrong PINs.
                raise WrongKey(
                    f"token {self._where.token!r} refuses the PIN: {type(error).__name__}",
                    hint=f"check the {self._where.pin.what}",
                ) from error
        return login.session

    def _token(self, library: Any) -> Any:
        pkcs11 = self._pkcs11
        try:
            return library.get_token(token_label=self._where.token)
        except pkcs11.NoSuchToken:
            # The library reads its slots once; a token that came back needs a fresh look.
            library.reinitialize()
        try:
            return library.get_token(token_label=self._where.token)
        except (pkcs11.NoSuchToken, pkcs11.MultipleTokensReturned) as error:
            raise self._unavailable(error) from error

    def _drop(self) -> None:
        session, self._login.session = self._login.session, None
        if session is not None:
            try:
                session.close()
            except self._pkcs11.PKCS11Error:
                return  # it is gone already

    def _encrypt(self, kek: Any, data: bytes, context: bytes) -> bytes:
        nonce = os.urandom(NONCE_SIZE)
        sealed: bytes = kek.encrypt(
            data, mechanism=self._pkcs11.Mechanism.AES_GCM,
            mechanism_param=self._pkcs11.GCMParams(nonce, context, TAG_BITS),
        )  # fmt: skip
        return nonce + sealed

    def _decrypt(self, kek: Any, body: bytes, context: bytes) -> bytes:
        nonce, sealed = body[:NONCE_SIZE], body[NONCE_SIZE:]
        if len(sealed) <= TAG_BITS // 8:
            raise Tampered(f"a key wrapped by {self.id} is too short")
        data: bytes = kek.decrypt(
            sealed, mechanism=self._pkcs11.Mechanism.AES_GCM,
            mechanism_param=self._pkcs11.GCMParams(nonce, context, TAG_BITS),
        )  # fmt: skip
        return data

    def _key_wrap(self, kek: Any, data: bytes) -> bytes:
        attribute = self._pkcs11.Attribute
        with self._object(self._login.session.create_object(self._template(attribute, data))) as it:
            return bytes(kek.wrap_key(it, mechanism=self._pkcs11.Mechanism.AES_KEY_WRAP))

    def _key_unwrap(self, kek: Any, body: bytes) -> bytes:
        pkcs11 = self._pkcs11
        opened = kek.unwrap_key(
            pkcs11.ObjectClass.SECRET_KEY, pkcs11.KeyType.GENERIC_SECRET, body,
            mechanism=pkcs11.Mechanism.AES_KEY_WRAP, template=self._flags(pkcs11.Attribute),
        )  # fmt: skip
        with self._object(opened) as it:
            return bytes(it[pkcs11.Attribute.VALUE])

    def _template(self, attribute: Any, data: bytes) -> dict[Any, Any]:
        return {
            attribute.CLASS: self._pkcs11.ObjectClass.SECRET_KEY,
            attribute.KEY_TYPE: self._pkcs11.KeyType.GENERIC_SECRET,
            attribute.VALUE: data,
            **self._flags(attribute),
        }

    @staticmethod
    def _flags(attribute: Any) -> dict[Any, Any]:
        # An object of the session only; its value is about to be read or was just given.
        return {attribute.TOKEN: False, attribute.SENSITIVE: False, attribute.EXTRACTABLE: True}

    @contextmanager
    def _object(self, made: Any) -> Iterator[Any]:
        try:
            yield made
        finally:
            made.destroy()

    def _unavailable(self, error: Exception) -> Unavailable:
        reason = type(error).__name__
        return Unavailable(
            f"key provider {self.id} is not available: {reason}",
            hint="check the module, the token and its slot; nothing was changed",
            code="keys-unavailable",
        )


def make_token_key(where: TokenKey) -> None:
    """Make the AES-256 key on the token: sensitive, not extractable, for wrapping only.

    Raises:
        SettingError: python-pkcs11 is not installed, or a key of that label is there.
        WrongKey, Unavailable: the token cannot be used.
    """
    provider = Pkcs11Provider(where)
    pkcs11 = provider._pkcs11
    try:
        library = pkcs11.lib(str(where.module))
        token = provider._token(library)
        with token.open(rw=True, user_pin=where.pin.read().reveal().decode("utf-8")) as session:
            found = session.get_objects(
                {pkcs11.Attribute.CLASS: pkcs11.ObjectClass.SECRET_KEY,
                 pkcs11.Attribute.LABEL: where.key}
            )  # fmt: skip
            if list(found):
                raise SettingError(
                    f"token {where.token!r} has a key {where.key!r} already",
                    hint="choose another label; keys are never overwritten",
                )
            flags = pkcs11.MechanismFlag
            session.generate_key(
                pkcs11.KeyType.AES, 8 * KEY_SIZE, label=where.key, store=True,
                capabilities=flags.ENCRYPT | flags.DECRYPT | flags.WRAP | flags.UNWRAP,
                template={pkcs11.Attribute.SENSITIVE: True, pkcs11.Attribute.EXTRACTABLE: False,
                          pkcs11.Attribute.PRIVATE: True},
            )  # fmt: skip
    except (pkcs11.PinIncorrect, pkcs11.PinLocked) as error:
        raise WrongKey(
            f"token {where.token!r} refuses the PIN", hint=f"check the {where.pin.what}"
        ) from error
    except pkcs11.PKCS11Error as error:
        raise provider._unavailable(error) from error
    finally:
        provider.close()
