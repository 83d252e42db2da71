"""Every provider: what it wraps opens again for the same context, and for nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cai.errors import CaiError, FormatError, SettingError, StorageError, Tampered, Unavailable
from cai.secret import Secret
from kbs.keys.aliyun import AliyunKmsProvider, OpenApiKms
from kbs.keys.file_provider import FileProvider
from kbs.keys.keyring import Keyring
from kbs.keys.passphrase_provider import PassphraseProvider
from kbs.keys.pkcs11_provider import Mechanism, Pkcs11Provider
from kbs.keys.provider import KEY_SIZE, KeyProvider, WrappedKey, bind, unbind
from kbs.keys.secret_input import SecretInput
from kbs.keys.vault import VaultAddress, VaultTransitProvider
from tests.kbs.keys.aliyun_simulator import KEY_ID, OpenApiSimulator
from tests.kbs.keys.conftest import Token, secret_file, secret_input
from tests.kbs.keys.vault_simulator import VaultSimulator

CONTEXT = b'{"path":"models/minilm/key","version":1}'
KINDS = ("file", "passphrase", "pkcs11-gcm", "pkcs11-wrap", "vault-transit", "aliyun-kms")


def file_provider(path: Path) -> FileProvider:
    return FileProvider.open(path, create=True)


def transit(vault: VaultSimulator, directory: Path, key: str = "kek") -> VaultTransitProvider:
    token = secret_input(directory, f"token-{os.urandom(4).hex()}", vault.token, "Vault token")
    return VaultTransitProvider(VaultAddress(vault.url, token), mount="transit", key=key)


def openapi(aliyun: OpenApiSimulator, directory: Path) -> OpenApiKms:
    name = os.urandom(4).hex()
    return OpenApiKms(
        aliyun.address,
        access_key_id=secret_input(directory, f"id-{name}", aliyun.key_id),
        access_key_secret=secret_input(directory, f"secret-{name}", aliyun.key_secret),
        plain_http=True,
    )


@pytest.fixture
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], KeyProvider]:
    """Makes a provider of a kind; what it needs is started only for that kind."""

    def provider(kind: str) -> KeyProvider:
        match kind:
            case "file":
                return file_provider(tmp_path / "kek")
            case "passphrase":
                words = "correct horse battery staple"
                return PassphraseProvider("words", secret_input(tmp_path, "words", words))
            case "pkcs11-gcm":
                return Pkcs11Provider(request.getfixturevalue("token").made())
            case "pkcs11-wrap":
                token: Token = request.getfixturevalue("token")
                return Pkcs11Provider(token.made(Mechanism.AES_KEY_WRAP))
            case "vault-transit":
                return transit(request.getfixturevalue("vault"), tmp_path)
            case _:
                kms = openapi(request.getfixturevalue("aliyun"), tmp_path)
                return AliyunKmsProvider(kms, key=KEY_ID)

    return provider


@pytest.fixture(params=KINDS)
def provider(
    request: pytest.FixtureRequest, make: Callable[[str], KeyProvider]
) -> Iterator[KeyProvider]:
    made = make(request.param)
    yield made
    made.close()


def test_a_key_comes_back_for_its_context_only(provider: KeyProvider) -> None:
    key = Secret(os.urandom(KEY_SIZE))
    wrapped = provider.wrap(key, CONTEXT)
    assert provider.unwrap(wrapped, CONTEXT) == key
    assert key.reveal() not in wrapped
    assert provider.wrap(key, CONTEXT) != wrapped or provider.id.startswith("pkcs11")
    for other in (b"", CONTEXT + b" ", CONTEXT.replace(b":1", b":2")):
        with pytest.raises(Tampered):
            provider.unwrap(wrapped, other)


def test_altered_and_truncated_wrappings_are_refused(provider: KeyProvider) -> None:
    wrapped = provider.wrap(Secret(os.urandom(KEY_SIZE)), CONTEXT)
    places = sorted({0, 1, len(wrapped) // 2, len(wrapped) - 1})
    for place in places:
        bent = bytearray(wrapped)
        bent[place] ^= 1
        # Bits of base64's last character may mean nothing; then the key is still the right one.
        with pytest.raises(CaiError) as caught:
            provider.unwrap(bytes(bent), CONTEXT)
        assert not isinstance(caught.value, Unavailable), place
    for length in (0, 1, 16, len(wrapped) // 2):
        with pytest.raises(Tampered):
            provider.unwrap(wrapped[:length], CONTEXT)


def test_what_another_key_wrapped_is_refused(
    provider: KeyProvider, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    kind = request.node.callspec.params["provider"]
    other: KeyProvider
    match kind:
        case "file":
            other = file_provider(tmp_path / "other")
        case "passphrase":
            words = secret_input(tmp_path, "other", "quite another passphrase")
            other = PassphraseProvider("words", words)
        case "pkcs11-gcm" | "pkcs11-wrap":
            mechanism = Mechanism.AES_GCM if kind == "pkcs11-gcm" else Mechanism.AES_KEY_WRAP
            other = Pkcs11Provider(request.getfixturevalue("token").made(mechanism))
        case "vault-transit":
            simulator: VaultSimulator = request.getfixturevalue("vault")
            simulator.keys["other"] = [os.urandom(32)]
            other = transit(simulator, tmp_path, "other")
        case _:
            service: OpenApiSimulator = request.getfixturevalue("aliyun")
            wrapped = provider.wrap(Secret(bytes(KEY_SIZE)), CONTEXT)
            service.keeper.keys[KEY_ID] = os.urandom(32)
            with pytest.raises(Tampered):
                provider.unwrap(wrapped, CONTEXT)
            return
    assert other.id != provider.id or kind == "passphrase"
    with pytest.raises(Tampered):
        provider.unwrap(other.wrap(Secret(bytes(KEY_SIZE)), CONTEXT), CONTEXT)
    other.close()


def test_ids_name_no_secret(provider: KeyProvider, tmp_path: Path) -> None:
    assert provider.id.partition(":")[0] in {
        "file", "passphrase", "pkcs11", "vault-transit", "aliyun-kms"
    }
    secrets = [path.read_text().strip() for path in tmp_path.iterdir() if path.is_file()]
    assert all(secret not in provider.id for secret in secrets)


# The context is inside.


def test_binding_is_checked_byte_for_byte() -> None:
    key = Secret(os.urandom(KEY_SIZE))
    data = bind(key, CONTEXT)
    assert unbind(data, CONTEXT, provider="p") == key
    for bad in (data[:-1], data + b"x", b"", data[:32], data[32:] + data[:32]):
        with pytest.raises(Tampered):
            unbind(bad, CONTEXT, provider="p")


# The keyring.


def test_a_keyring_finds_providers_by_name_and_id(tmp_path: Path) -> None:
    one, two = file_provider(tmp_path / "one"), file_provider(tmp_path / "two")
    keyring = Keyring({"one": one, "two": two}, "two")
    key = Secret(os.urandom(KEY_SIZE))
    wrapped = keyring.wrap(one.id, key, CONTEXT)
    assert wrapped.provider == one.id
    assert keyring.unwrap(wrapped, CONTEXT) == key
    with pytest.raises(Tampered):
        keyring.unwrap(WrappedKey(two.id, wrapped.blob), CONTEXT)
    with pytest.raises(Unavailable, match="not configured"):
        keyring.unwrap(WrappedKey("file:0000", wrapped.blob), CONTEXT)
    with pytest.raises(CaiError, match="no key provider"):
        keyring.named("three")
    with pytest.raises(Tampered, match="too long"):
        keyring.unwrap(WrappedKey(one.id, bytes(5000)), CONTEXT)


def test_one_key_described_twice_is_refused(tmp_path: Path) -> None:
    one = file_provider(tmp_path / "one")
    with pytest.raises(SettingError, match="the same"):
        Keyring({"a": one, "b": file_provider(tmp_path / "one")}, "a")


# Secrets that open providers.


def test_a_secret_is_read_without_its_newline(tmp_path: Path) -> None:
    assert secret_input(tmp_path, "pin", "1234").read() == Secret(b"1234")
    reading, writing = os.pipe()
    os.write(writing, b"1234\n")
    os.close(writing)
    source = SecretInput("PIN", descriptor=reading)
    assert source.read() == source.read() == Secret(b"1234")


def test_secret_files_that_others_read_are_refused(tmp_path: Path) -> None:
    path = secret_file(tmp_path, "pin", "1234")
    path.chmod(0o440)
    with pytest.raises(StorageError, match="readable by others"):
        SecretInput("PIN", path).read()


def test_empty_and_missing_secrets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="empty"):
        SecretInput("PIN", secret_file(tmp_path, "pin", "")).read()
    with pytest.raises(CaiError, match="does not exist"):
        SecretInput("PIN", tmp_path / "none").read()
    with pytest.raises(CaiError):
        SecretInput("PIN", descriptor=1023).read()


def test_short_passphrases_are_refused(tmp_path: Path) -> None:
    provider = PassphraseProvider("words", secret_input(tmp_path, "words", "fifteen bytes.."))
    with pytest.raises(FormatError, match="at least"):
        provider.wrap(Secret(bytes(KEY_SIZE)), CONTEXT)


def test_a_passphrase_is_stretched_once_for_what_one_process_wraps(tmp_path: Path) -> None:
    words = secret_input(tmp_path, "words", "correct horse battery staple")
    first = PassphraseProvider("words", words).wrap(Secret(bytes(KEY_SIZE)), CONTEXT)
    again = PassphraseProvider("words", words)
    again.unwrap(first, CONTEXT)
    assert again.wrap(Secret(bytes(KEY_SIZE)), CONTEXT)[:16] == first[:16]
    assert len(again._keys) == 1
