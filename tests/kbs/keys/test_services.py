"""Vault and Alibaba Cloud KMS on simulators of their HTTP shape: what happens when they say no."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from cai.errors import CaiError, FormatError, SettingError, Tampered, Unavailable
from cai.secret import Secret
from cai.settings import Section
from kbs.keys.aliyun import AliyunKmsProvider, open_kms
from kbs.keys.aliyun_instance import InstanceKms, InstanceSettings
from kbs.keys.provider import KEY_SIZE, commitment, require_commitment
from kbs.keys.vault import VaultAddress, VaultTransitProvider, require_private_url
from kbs.names import ResourceName
from kbs.resources.aliyun_secrets import AliyunSecrets
from kbs.resources.external import Naming
from kbs.resources.vault_kv import VaultKv
from tests.kbs.keys.aliyun_simulator import KEY_ID, InstanceSimulator, OpenApiSimulator
from tests.kbs.keys.conftest import secret_file, secret_input
from tests.kbs.keys.http_simulator import Fault
from tests.kbs.keys.test_providers import openapi, transit
from tests.kbs.keys.vault_simulator import VaultSimulator, errors

KEY = Secret(bytes(range(KEY_SIZE)))
NAME = ResourceName("models", "minilm", "key")
DKMS_PYTHON = os.environ.get("CAI_DKMS_PYTHON", "")


def unavailable(work: object, text: str) -> None:
    with pytest.raises(Unavailable, match=text) as caught:
        work()  # type: ignore[operator]
    assert caught.value.http_status == 503
    assert "nothing was changed" in (caught.value.hint or "")


# Vault transit.


def test_vault_faults_are_unavailable_and_pass(vault: VaultSimulator, tmp_path: Path) -> None:
    provider = transit(vault, tmp_path)
    wrapped = provider.wrap(KEY, b"c")
    for fault, text in (
        (errors(503, "Vault is sealed"), "VaultDown"),
        (errors(500, "boom"), "InternalServerError"),
        (errors(429, "slow down"), "RateLimitExceeded"),
        (errors(403, "permission denied"), "refuses the token"),
    ):
        vault.fault = fault
        unavailable(lambda: provider.unwrap(wrapped, b"c"), text)
        unavailable(lambda: provider.wrap(KEY, b"c"), text)
    vault.fault = None
    vault.stop()
    unavailable(lambda: provider.unwrap(wrapped, b"c"), "no Vault answers")
    vault.start()
    assert provider.unwrap(wrapped, b"c") == KEY
    provider.close()


@pytest.mark.parametrize("body", [b"", b"null", b"[]", b"{}", b'{"data":{}}', b'{"data":null}',
                                  b"<html>", b'{"data":{"ciphertext":1,"plaintext":1}}'])
def test_other_answers_of_vault_are_refused(
    vault: VaultSimulator, tmp_path: Path, body: bytes
) -> None:
    provider = transit(vault, tmp_path)
    wrapped = provider.wrap(KEY, b"c")
    vault.fault = Fault(200, body)
    for work in (lambda: provider.wrap(KEY, b"c"), lambda: provider.unwrap(wrapped, b"c")):
        with pytest.raises(CaiError):
            work()
    provider.close()


def test_vaults_own_rotation_keeps_what_was_wrapped(
    vault: VaultSimulator, tmp_path: Path
) -> None:
    provider = transit(vault, tmp_path)
    first = provider.wrap(KEY, b"c")
    vault.rotate()
    second = provider.wrap(KEY, b"c")
    assert first.startswith(b"vault:v1:")
    assert second.startswith(b"vault:v2:")
    assert provider.unwrap(first, b"c") == provider.unwrap(second, b"c") == KEY
    vault.least["kek"] = 2
    with pytest.raises(Tampered, match="does not open"):
        provider.unwrap(first, b"c")
    provider.close()


def test_vault_that_returns_another_key_is_found_out(
    vault: VaultSimulator, tmp_path: Path
) -> None:
    provider = transit(vault, tmp_path)
    wrapped = provider.wrap(KEY, b"c")
    expected = commitment(KEY, b"c")
    vault.lies = True
    other = provider.unwrap(wrapped, b"c")
    assert other != KEY
    with pytest.raises(Tampered, match="another key") as caught:
        require_commitment(other, b"c", expected, provider=provider.id)
    assert caught.value.machine_code == "another-key"
    provider.close()


def test_a_missing_transit_key_is_named(vault: VaultSimulator, tmp_path: Path) -> None:
    provider = transit(vault, tmp_path, "none")
    unavailable(lambda: provider.wrap(KEY, b"c"), "refuses the token")
    vault.fault = errors(404)
    unavailable(lambda: provider.wrap(KEY, b"c"), "no such key")
    provider.close()


def test_the_token_is_read_for_each_call(vault: VaultSimulator, tmp_path: Path) -> None:
    path = secret_file(tmp_path, "renewed", "old")
    from kbs.keys.secret_input import SecretInput

    address = VaultAddress(vault.url, SecretInput("Vault token", path), namespace="team")
    provider = VaultTransitProvider(address, mount="transit", key="kek")
    unavailable(lambda: provider.wrap(KEY, b"c"), "refuses the token")
    path.chmod(0o600)
    path.write_text(vault.token)
    assert provider.unwrap(provider.wrap(KEY, b"c"), b"c") == KEY
    assert vault.namespaces == {"team"}
    assert provider.id == "vault-transit:team/transit/kek"
    provider.close()


def test_errors_of_vault_tell_no_key_and_no_token(vault: VaultSimulator, tmp_path: Path) -> None:
    import base64

    provider = transit(vault, tmp_path)
    vault.fault = errors(400, "bad input", base64.b64encode(KEY.reveal()).decode())
    with pytest.raises(CaiError) as caught:
        provider.wrap(KEY, b"c")
    assert base64.b64encode(KEY.reveal()).decode()[:20] not in str(caught.value)
    provider.close()


@pytest.mark.parametrize(
    "url", ["http://vault.example.com:8200", "http://10.0.0.1", "ftp://127.0.0.1", "vault",
            "https://user:pw@vault", "https://", "http://[::1", "https://h?x=1"],
)  # fmt: skip
def test_addresses_that_would_show_keys_are_refused(url: str) -> None:
    with pytest.raises(SettingError):
        require_private_url(url, where="test")


@pytest.mark.parametrize("url", ["https://vault.example.com:8200", "http://127.0.0.1:1",
                                 "http://localhost:8200", "http://[::1]:8200"])
def test_private_addresses_are_accepted(url: str) -> None:
    require_private_url(url, where="test")


# Vault KV.


def kv(vault: VaultSimulator, directory: Path, **members: object) -> VaultKv:
    token = secret_file(directory, f"t-{os.urandom(4).hex()}", vault.token)
    table = {"url": vault.url, "token_file": str(token), **members}
    return VaultKv.from_section(Section(table, where="external"))


def test_secrets_come_from_both_kv_versions(vault: VaultSimulator, tmp_path: Path) -> None:
    vault.kv1["key"] = {"value": "one"}
    vault.kv2["models/minilm/key"] = [{"value": "old"}, {"value": "00ff", "note": "x"}]
    first = kv(vault, tmp_path, mount="kv1", kv_version=1)
    second = kv(vault, tmp_path, name="path", encoding="hex")
    found = first.read(NAME)
    assert found is not None
    assert found.contents == b"one"
    found = second.read(NAME)
    assert found is not None
    assert (found.contents, found.version) == (b"\x00\xff", "2")
    assert first.read(ResourceName("a", "b", "none")) is None
    assert second.read(ResourceName("a", "b", "none")) is None
    vault.kv2["models/minilm/key"].append(None)
    assert second.read(NAME) is None


@pytest.mark.parametrize(
    ("value", "encoding"), [({}, "text"), ({"value": 1}, "text"), ({"value": "zz"}, "hex"),
                            ({"value": "a"}, "base64"), ({"value": None}, "text")],
)  # fmt: skip
def test_fields_of_another_form_are_refused(
    vault: VaultSimulator, tmp_path: Path, value: dict[str, object], encoding: str
) -> None:
    vault.kv2["key"] = [value]
    with pytest.raises(FormatError):
        kv(vault, tmp_path, encoding=encoding).read(NAME)


def test_vault_kv_faults_are_unavailable(vault: VaultSimulator, tmp_path: Path) -> None:
    source = kv(vault, tmp_path)
    vault.fault = errors(503, "sealed")
    with pytest.raises(Unavailable):
        source.read(NAME)
    vault.stop()
    with pytest.raises(Unavailable):
        source.read(NAME)


# Alibaba Cloud KMS over its public API.


def test_aliyun_faults_are_unavailable_and_pass(aliyun: OpenApiSimulator, tmp_path: Path) -> None:
    provider = AliyunKmsProvider(openapi(aliyun, tmp_path), key=KEY_ID)
    wrapped = provider.wrap(KEY, b"c")
    aliyun.fault = Fault(503, b'{"Code":"ServiceUnavailable","Message":"m","RequestId":"r"}')
    unavailable(lambda: provider.unwrap(wrapped, b"c"), "not available")
    aliyun.fault = Fault(403, b'{"Code":"Forbidden.RAM","Message":"m","RequestId":"r"}')
    unavailable(lambda: provider.unwrap(wrapped, b"c"), "Forbidden.RAM")
    aliyun.fault = Fault(200, b"not json")
    with pytest.raises(CaiError):
        provider.unwrap(wrapped, b"c")
    aliyun.fault = None
    aliyun.stop()
    unavailable(lambda: provider.wrap(KEY, b"c"), "not available")
    aliyun.start()
    assert provider.unwrap(wrapped, b"c") == KEY


def test_a_wrong_access_key_is_refused(aliyun: OpenApiSimulator, tmp_path: Path) -> None:
    kms = openapi(aliyun, tmp_path)
    kms._inputs = (kms._inputs[0], secret_input(tmp_path, "wrong", "another-secret"))
    provider = AliyunKmsProvider(kms, key=KEY_ID)
    unavailable(lambda: provider.wrap(KEY, b"c"), "SignatureDoesNotMatch")


def test_errors_of_aliyun_tell_no_key(aliyun: OpenApiSimulator, tmp_path: Path) -> None:
    import base64
    import traceback

    provider = AliyunKmsProvider(openapi(aliyun, tmp_path), key=KEY_ID)
    aliyun.stop()
    with pytest.raises(CaiError) as caught:
        provider.wrap(KEY, b"c")
    told = "".join(traceback.format_exception(caught.value))
    assert base64.b64encode(KEY.reveal()).decode()[:16] not in told
    assert "access-key-secret" not in told


def test_aliyun_secrets_by_tag_and_by_path(aliyun: OpenApiSimulator, tmp_path: Path) -> None:
    aliyun.keeper.secrets["key"] = ("by tag", "text", "v1")
    aliyun.keeper.secrets["models/minilm/key"] = ("AP8=", "binary", "v7")
    kms = openapi(aliyun, tmp_path)
    found = AliyunSecrets(kms, naming=Naming.TAG, label="x").read(NAME)
    assert found is not None
    assert (found.contents, found.version) == (b"by tag", "v1")
    found = AliyunSecrets(kms, naming=Naming.PATH, label="x").read(NAME)
    assert found is not None
    assert (found.contents, found.version) == (b"\x00\xff", "v7")
    missing = ResourceName("a", "b", "none")
    assert AliyunSecrets(kms, naming=Naming.TAG, label="x").read(missing) is None
    aliyun.stop()
    with pytest.raises(Unavailable):
        AliyunSecrets(kms, naming=Naming.TAG, label="x").read(NAME)


@pytest.mark.parametrize(
    "table",
    [
        {}, {"endpoint": "https://kms.aliyuncs.com"}, {"endpoint": "kms.aliyuncs.com"},
        {"endpoint": "kms.aliyuncs.com", "unsafe_plain_http": True},
        {"client_key_file": "k"}, {"client_key_file": "k", "instance": "kst-x"},
        {"client_key_file": "k", "instance": "kst-x", "ca_file": "c", "password_file": "p"},
        {"client_key_file": "k", "endpoint": "h", "unsafe_plain_http": True},
    ],
)
def test_incomplete_kms_settings_are_refused(table: dict[str, object]) -> None:
    with pytest.raises(SettingError):
        open_kms(Section(table, where="kms"))


# A KMS instance, through the child process.

STUB = {
    "openapi/models.py": "class Config: pass",
    "openapi_util/models.py": """
        class RuntimeOptions:
            def __init__(self, **kw): self.kw = kw
    """,
    "sdk/models.py": """
        class Request:
            def __init__(self, **kw): self.__dict__.update(kw)
        EncryptRequest = DecryptRequest = GetSecretValueRequest = Request
    """,
    "sdk/client.py": """
        import os, sys, time
        class Refused(Exception):
            def __init__(self): self.code, self.data = "Forbidden.ResourceNotFound", {"httpCode": 404}
        class Answer:
            def __init__(self, **kw): self.__dict__.update(kw)
        class Client:
            def __init__(self, config):
                assert config.password == "client-key-password" and config.endpoint == "127.0.0.1:9"
                assert not [name for name in os.environ if name not in ("LC_ALL", "LC_CTYPE")]
            def encrypt_with_options(self, request, options):
                print("libraries print")
                return Answer(ciphertext_blob=request.plaintext[::-1], iv=b"", algorithm="a",
                              padding_mode="")
            def decrypt_with_options(self, request, options):
                return Answer(plaintext=request.ciphertext_blob[::-1])
            def get_secret_value_with_options(self, request, options):
                if request.secret_name == "none": raise Refused()
                if request.secret_name == "die": os._exit(1)
                if request.secret_name == "broken": raise ValueError("client-key-password")
                if request.secret_name == "slow": time.sleep(60)
                return Answer(secret_data="s3cret", secret_data_type="text", version_id="v1")
    """,
}


@pytest.fixture(scope="module")
def stub_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with a stand-in of the SDK, so that the child itself is tested everywhere."""
    directory = tmp_path_factory.mktemp("interpreter")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(directory)], check=True)
    (packages,) = directory.glob("lib/python*/site-packages")
    for name, text in STUB.items():
        (packages / name).parent.mkdir(exist_ok=True)
        (packages / name).write_text(textwrap.dedent(text))
    return directory / "bin" / "python"


def instance(python: Path, directory: Path, password: str = "client-key-password") -> InstanceKms:
    name = os.urandom(4).hex()
    return InstanceKms(
        InstanceSettings(
            "127.0.0.1:9", secret_input(directory, f"ck-{name}", '{"KeyId":"k"}'),
            secret_input(directory, f"pw-{name}", password), None, python, plain_http=True,
        )
    )  # fmt: skip


@pytest.fixture
def stub(stub_python: Path, tmp_path: Path) -> Iterator[InstanceKms]:
    kms = instance(stub_python, tmp_path)
    yield kms
    kms.close()


def test_the_child_carries_keys_and_secrets(stub: InstanceKms) -> None:
    provider = AliyunKmsProvider(stub, key="k")
    assert provider.unwrap(provider.wrap(KEY, b"c"), b"c") == KEY
    source = AliyunSecrets(stub, naming=Naming.TAG, label="kst-x")
    found = source.read(NAME)
    assert found is not None
    assert found.contents == b"s3cret"
    assert source.read(ResourceName("a", "b", "none")) is None
    assert "s3cret" not in repr(found)


def test_a_child_that_died_is_replaced(stub: InstanceKms) -> None:
    source = AliyunSecrets(stub, naming=Naming.TAG, label="kst-x")
    assert source.read(NAME)
    unavailable(lambda: source.read(ResourceName("a", "b", "die")), "ended or did not answer")
    assert source.read(NAME)
    child = stub._child
    assert child is not None
    child.kill()
    child.wait()
    assert source.read(NAME)


def test_a_child_that_hangs_is_ended(
    stub: InstanceKms, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = AliyunSecrets(stub, naming=Naming.TAG, label="kst-x")
    assert source.read(NAME)
    child = stub._child
    assert child is not None
    monkeypatch.setattr("kbs.keys.aliyun_instance.ANSWER_SECONDS", 0.3)
    unavailable(lambda: source.read(ResourceName("a", "b", "slow")), "did not answer")
    assert child.poll() is not None


def test_the_childs_errors_tell_no_secret(stub: InstanceKms) -> None:
    source = AliyunSecrets(stub, naming=Naming.TAG, label="kst-x")
    with pytest.raises(Unavailable) as caught:
        source.read(ResourceName("a", "b", "broken"))
    assert "client-key-password" not in str(caught.value)
    assert "ValueError" in str(caught.value)


def test_an_interpreter_without_the_sdk_is_named(tmp_path: Path, stub_python: Path) -> None:
    with pytest.raises(SettingError, match="ModuleNotFoundError"):
        instance(Path(sys.executable), tmp_path).secret("x")
    with pytest.raises(SettingError, match="does not start"):
        instance(tmp_path / "none", tmp_path).secret("x")
    with pytest.raises(SettingError, match="AssertionError"):
        instance(stub_python, tmp_path, "another password").secret("x")


def test_wrapped_keys_of_another_form_are_refused(stub: InstanceKms) -> None:
    provider = AliyunKmsProvider(stub, key="k")
    for blob in (b"", b"{", b"[]x", b'{"blob": 1}'):
        with pytest.raises(CaiError):
            provider.unwrap(blob, b"c")


@pytest.mark.skipif(not DKMS_PYTHON, reason="CAI_DKMS_PYTHON names no interpreter with the SDK")
def test_the_official_sdk_against_the_simulated_instance(tmp_path: Path) -> None:
    with InstanceSimulator() as simulator:
        simulator.keeper.secrets["key"] = ("from the instance", "text", "v3")
        kms = InstanceKms(
            InstanceSettings(
                simulator.address, secret_input(tmp_path, "ck", simulator.client_key),
                secret_input(tmp_path, "pw", simulator.password), None, Path(DKMS_PYTHON),
                plain_http=True,
            )
        )  # fmt: skip
        provider = AliyunKmsProvider(kms, key=KEY_ID)
        wrapped = provider.wrap(KEY, b"c")
        assert provider.unwrap(wrapped, b"c") == KEY
        source = AliyunSecrets(kms, naming=Naming.TAG, label="kst-x")
        found = source.read(NAME)
        assert found is not None
        assert (found.contents, found.version) == (b"from the instance", "v3")
        assert source.read(ResourceName("a", "b", "none")) is None
        simulator.keeper.keys[KEY_ID] = os.urandom(32)
        with pytest.raises(Tampered):
            provider.unwrap(wrapped, b"c")
        simulator.stop()
        unavailable(lambda: provider.wrap(KEY, b"c"), "not available")
        simulator.start()
        simulator.keeper.keys.clear()
        unavailable(lambda: provider.wrap(KEY, b"c"), "KeyNotFound")
        kms.close()
