"""Where endpoints and credentials are found, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from cai.errors import CaiError, FormatError, InputMissing, SettingError, UsageError
from cai.store import StoreOptions, open_store
from cai.store.access import Access, find_access
from cai.store.oss import OssStore, region_of
from cai.store.uri import parse_uri

CONFIG = """
[default.oss]
endpoint = "oss-cn-shanghai.aliyuncs.com"
access_key_id = "from-file"
access_key_secret = "file-secret"
session_token = "file-token"
path_style = true

[work.oss]
endpoint = "https://oss-cn-beijing-internal.aliyuncs.com"
access_key_id = "work"
access_key_secret = "work-secret"
signature = "v1"

[work.s3]
endpoint = "https://minio.example"
region = "eu-1"

[work.cos]
region = "ap-shanghai"
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "stores.toml"
    path.write_text(CONFIG)
    path.chmod(0o600)
    return path


def found(
    scheme: str = "oss", profile: str = "", config: Path | None = None, **values: str
) -> Access:
    return find_access(
        scheme, StoreOptions(profile=profile, config=config, environment=values)
    )


@pytest.mark.parametrize(("key_id", "secret", "token"), [
    ("MODEL_OSS_ACCESS_KEY_ID", "MODEL_OSS_SECRET_ACCESS_KEY", "MODEL_OSS_SESSION_TOKEN"),
    ("OSS_ACCESS_KEY_ID", "OSS_ACCESS_KEY_SECRET", "OSS_SESSION_TOKEN"),
    ("ALIBABA_CLOUD_ACCESS_KEY_ID", "ALIBABA_CLOUD_ACCESS_KEY_SECRET",
     "ALIBABA_CLOUD_SECURITY_TOKEN"),
])
def test_the_environment(key_id: str, secret: str, token: str) -> None:
    access = found(**{key_id: "i", secret: "s", token: "t", "OSS_ENDPOINT": "e", "OSS_REGION": "r"})
    assert (access.key_id, access.key_secret.reveal(), access.token.reveal()) == ("i", b"s", b"t")
    assert (access.endpoint, access.region) == ("e", "r")
    with pytest.raises(SettingError, match=secret):
        found(**{key_id: "i"})
    with pytest.raises(SettingError, match=key_id):
        found(**{secret: "s"})


def test_a_token_of_another_group_is_not_mixed_in() -> None:
    access = found(
        MODEL_OSS_ACCESS_KEY_ID="i", MODEL_OSS_SECRET_ACCESS_KEY="s", OSS_SESSION_TOKEN="other"
    )
    assert access.token.reveal() == b""


def test_other_schemes() -> None:
    access = found("cos", COS_SECRET_ID="i", COS_SECRET_KEY="s", COS_REGION="ap-x")
    assert (access.key_id, access.region) == ("i", "ap-x")
    access = found("s3", AWS_ACCESS_KEY_ID="i", AWS_SECRET_ACCESS_KEY="s", AWS_ENDPOINT_URL="e")
    assert (access.key_id, access.endpoint) == ("i", "e")
    assert found("s3", MODEL_OSS_ACCESS_KEY_ID="i", MODEL_OSS_SECRET_ACCESS_KEY="s").key_id == ""


def test_order_of_places(config: Path) -> None:
    named = {"OSS_ACCESS_KEY_ID": "from-env", "OSS_ACCESS_KEY_SECRET": "s"}
    assert found(config=config).key_id == "from-file"
    assert found(config=config).token.reveal() == b"file-token"
    assert found(config=config).path_style
    mixed = found(config=config, **named)
    assert (mixed.key_id, mixed.token.reveal()) == ("from-env", b"")
    assert mixed.endpoint == "oss-cn-shanghai.aliyuncs.com"
    asked = found(config=config, profile="work", **named)
    assert (asked.key_id, asked.signature) == ("work", "v1")
    assert found("cos", "work", config).region == "ap-shanghai"
    assert found("oss", CAI_STORES=str(config)).key_id == "from-file"
    options = StoreOptions(endpoint="mine", region="r", config=config, environment=named)
    assert find_access("oss", options).endpoint == "mine"


def test_the_usual_place(tmp_path: Path) -> None:
    (tmp_path / ".config" / "cai").mkdir(parents=True)
    path = tmp_path / ".config" / "cai" / "stores.toml"
    path.write_text(CONFIG)
    path.chmod(0o600)
    assert found(HOME=str(tmp_path)).key_id == "from-file"
    assert found(XDG_CONFIG_HOME=str(tmp_path / ".config")).key_id == "from-file"
    assert found(HOME=str(tmp_path / "elsewhere")).key_id == ""


@pytest.mark.parametrize(("text", "error"), [
    ("[default.oss]\nacces_key_id = 'x'", SettingError),
    ("[default.oss]\naccess_key_id = 'x'", SettingError),
    ("[default.oss]\nendpoint = 5", SettingError),
    ("[default.oss]\nsignature = 'v3'", SettingError),
    ("[default.ftp]\n", SettingError),
    ("[default]\noss = 5", SettingError),
    ("default = 5", SettingError),
    ("[default", FormatError),
    ("\xff", FormatError),
])
def test_configurations_refused(tmp_path: Path, text: str, error: type[CaiError]) -> None:
    path = tmp_path / "stores.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(error):
        found(config=path)


def test_a_file_with_secrets_that_others_read_is_refused(config: Path) -> None:
    for mode in (0o644, 0o640, 0o604):
        config.chmod(mode)
        with pytest.raises(SettingError, match="others can read"):
            found(config=config)
    assert found("s3", "work", config).region == "eu-1"  # no secret in that part


def test_unknown_profiles_and_files(config: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="no profile 'wrk'") as caught:
        found(config=config, profile="wrk")
    assert "work" in (caught.value.hint or "")
    with pytest.raises(InputMissing):
        found(config=tmp_path / "none.toml")


def test_secrets_do_not_show(config: Path) -> None:
    access = found(config=config)
    assert "file-secret" not in repr(access)
    assert "file-token" not in repr(access)


@pytest.mark.parametrize(("endpoint", "region"), [
    ("oss-cn-hangzhou.aliyuncs.com", "cn-hangzhou"),
    ("https://oss-cn-hangzhou.aliyuncs.com", "cn-hangzhou"),
    ("http://oss-cn-hangzhou-internal.aliyuncs.com", "cn-hangzhou"),
    ("bucket.oss-us-west-1.aliyuncs.com:443", "us-west-1"),
    ("vpc100-oss-cn-beijing.aliyuncs.com", "cn-beijing"),
    ("oss-ap-southeast-1-internal.aliyuncs.com", "ap-southeast-1"),
    ("oss-accelerate.aliyuncs.com", ""),
    ("oss-accelerate-overseas.aliyuncs.com", ""),
    ("models.example.com", ""),
    ("http://127.0.0.1:9000", ""),
    ("oss-cn-hangzhou.aliyuncs.com.example.com", ""),
])
def test_regions_of_endpoints(endpoint: str, region: str) -> None:
    assert region_of(endpoint) == region


@pytest.mark.parametrize(("endpoint", "region", "signature", "expected"), [
    ("oss-cn-hangzhou.aliyuncs.com", "", "auto", "v4"),
    ("oss-accelerate.aliyuncs.com", "", "auto", "v1"),
    ("oss-accelerate.aliyuncs.com", "cn-hangzhou", "auto", "v4"),
    ("oss-cn-hangzhou.aliyuncs.com", "", "v1", "v1"),
    ("http://127.0.0.1:1", "", "auto", "v1"),
])
def test_signature_versions(endpoint: str, region: str, signature: str, expected: str) -> None:
    access = Access(endpoint=endpoint, region=region, signature=signature)
    assert OssStore(parse_uri("oss://bucket/x"), access).signature == expected


@pytest.mark.parametrize("endpoint", [
    "", "ftp://host", "https://", "https://host/path", "https://host?x", "https://u:p@host",
    "https://host:port",
])
def test_endpoints_refused(endpoint: str) -> None:
    with pytest.raises(SettingError):
        open_store("oss://bucket/x", StoreOptions(endpoint=endpoint, environment={}))


def test_v4_needs_a_region() -> None:
    with pytest.raises(SettingError, match="region"):
        OssStore(parse_uri("oss://bucket"), Access(endpoint="models.example", signature="v4"))


def test_tls_unless_plain_http_is_asked() -> None:
    store = OssStore(parse_uri("oss://bucket"), Access(endpoint="oss-cn-x1.aliyuncs.com"))
    assert store._bucket.endpoint == "https://oss-cn-x1.aliyuncs.com"


def test_without_a_cos_region_there_is_no_endpoint() -> None:
    with pytest.raises(SettingError, match="COS"):
        open_store("cos://bucket/x", StoreOptions(environment={}))


def test_an_unknown_scheme() -> None:
    with pytest.raises(UsageError):
        open_store("ftp://bucket/x")


def test_s3_without_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    monkeypatch.delitem(sys.modules, "cai.store.s3", raising=False)
    for uri in ("s3://bucket/x", "cos://bucket/x"):
        with pytest.raises(UsageError, match="boto3") as caught:
            open_store(uri)
        assert "[s3]" in (caught.value.hint or "")
