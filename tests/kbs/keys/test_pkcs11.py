"""The hardware module, on a real softhsm2 token."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cai.errors import InputMissing, SettingError, Tampered, Unavailable, WrongKey
from cai.secret import Secret
from kbs.keys.pkcs11_provider import Mechanism, Pkcs11Provider, make_token_key
from kbs.keys.provider import KEY_SIZE
from kbs.keys.secret_input import SecretInput
from tests.kbs.keys.conftest import Token, secret_file

CONTEXT = b"row"
KEY = Secret(bytes(range(KEY_SIZE)))


def test_the_key_cannot_leave_the_token(token: Token) -> None:
    where = token.made()
    provider = Pkcs11Provider(where)
    kek = provider._key()
    attribute = provider._pkcs11.Attribute
    assert kek[attribute.SENSITIVE]
    assert not kek[attribute.EXTRACTABLE]
    with pytest.raises(provider._pkcs11.PKCS11Error):
        kek[attribute.VALUE]
    provider.close()


def test_an_extractable_key_is_refused(token: Token) -> None:
    where = token.key("loose")
    loose = Pkcs11Provider(replace(where, unsafe_extractable_key=True))
    pkcs11: Any = loose._pkcs11
    with loose._token(pkcs11.lib(str(where.module))).open(rw=True, user_pin="1234") as session:
        session.generate_key(
            pkcs11.KeyType.AES, 256, label="loose", store=True,
            capabilities=pkcs11.MechanismFlag.ENCRYPT | pkcs11.MechanismFlag.DECRYPT,
            template={pkcs11.Attribute.SENSITIVE: False, pkcs11.Attribute.EXTRACTABLE: True},
        )
    assert loose.unwrap(loose.wrap(KEY, CONTEXT), CONTEXT) == KEY
    strict = Pkcs11Provider(where)
    with pytest.raises(SettingError, match="can leave its token"):
        strict.wrap(KEY, CONTEXT)
    strict.close()
    loose.close()


def test_both_mechanisms_open_what_the_other_wrapped(token: Token) -> None:
    where = token.made()
    gcm = Pkcs11Provider(where)
    key_wrap = Pkcs11Provider(replace(where, mechanism=Mechanism.AES_KEY_WRAP))
    assert key_wrap.unwrap(gcm.wrap(KEY, CONTEXT), CONTEXT) == KEY
    assert gcm.unwrap(key_wrap.wrap(KEY, CONTEXT), CONTEXT) == KEY
    with pytest.raises(Tampered, match="unknown mechanism"):
        gcm.unwrap(b"\x07" + bytes(80), CONTEXT)
    gcm.close()
    # The other still has its session: closing one user does not log the other out.
    assert key_wrap.unwrap(key_wrap.wrap(KEY, CONTEXT), CONTEXT) == KEY
    key_wrap.close()
    key_wrap.close()


def test_no_object_stays_on_the_token(token: Token) -> None:
    provider = Pkcs11Provider(token.made(Mechanism.AES_KEY_WRAP))
    for _ in range(3):
        provider.unwrap(provider.wrap(KEY, CONTEXT), CONTEXT)
    assert len(list(provider._session().get_objects())) == 1
    provider.close()


def test_a_wrong_pin_is_named_and_not_tried_again(token: Token, tmp_path: Path) -> None:
    pin = SecretInput("PIN", secret_file(tmp_path, "bad", "9999"))
    provider = Pkcs11Provider(replace(token.made(), pin=pin))
    with pytest.raises(WrongKey, match="refuses the PIN") as caught:
        provider.wrap(KEY, CONTEXT)
    assert "9999" not in str(caught.value)
    provider.close()


def test_what_is_missing_is_named(token: Token) -> None:
    provider = Pkcs11Provider(token.key("nothing"))
    with pytest.raises(InputMissing, match="no AES key 'nothing'"):
        provider.wrap(KEY, CONTEXT)
    provider.close()
    for where in (
        replace(token.key("kek"), token="no such token"),
        replace(token.key("kek"), module=Path("/nonexistent/module.so")),
    ):
        provider = Pkcs11Provider(where)
        with pytest.raises(Unavailable, match="is not available") as caught:
            provider.wrap(KEY, CONTEXT)
        assert caught.value.http_status == 503
        provider.close()


def test_a_key_is_never_made_twice(token: Token) -> None:
    where = token.made()
    with pytest.raises(SettingError, match="already"):
        make_token_key(where)


def test_a_token_that_went_away_and_came_back(token: Token, tmp_path: Path) -> None:
    provider = Pkcs11Provider(token.made())
    wrapped = provider.wrap(KEY, CONTEXT)
    away = tmp_path / "away"
    shutil.move(token.tokens, away)
    token.tokens.mkdir()
    provider._drop()
    provider._pkcs11.lib(str(token.module)).reinitialize()
    with pytest.raises(Unavailable):
        provider.unwrap(wrapped, CONTEXT)
    token.tokens.rmdir()
    shutil.move(away, token.tokens)
    assert provider.unwrap(wrapped, CONTEXT) == KEY
    provider.close()


def test_many_threads_share_one_session(token: Token) -> None:
    from concurrent.futures import ThreadPoolExecutor

    provider = Pkcs11Provider(token.made())
    keys = [Secret(os.urandom(KEY_SIZE)) for _ in range(40)]

    def there_and_back(key: Secret) -> bool:
        return provider.unwrap(provider.wrap(key, CONTEXT), CONTEXT) == key

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(there_and_back, keys))
    provider.close()
