"""cai.env and launch.json: names, measured settings, refusals."""

from __future__ import annotations

from hashlib import sha384
from pathlib import Path

import pytest

from cai import jcs
from cai.errors import CaiError, SettingError
from cai.host.launch import parse_launch, write_launch
from cai.host.settings import HostSettings, key_path, load_host_settings

ENV = {
    "TRUSTEE_URL": "http://127.0.0.1:8080/",
    "MODEL_KEY_ID": "kbs:///default/aliyun/model-decryption-key",
    "MODEL_ENCRYPTION_METHOD": "cai",
    "MODEL_MOUNT_POINT": "/tmp/model",
}


def load(tmp_path: Path, **changes: str | None) -> HostSettings:
    values = {**ENV, **changes}
    path = tmp_path / "cai.env"
    path.write_text("".join(f"{k}={v}\n" for k, v in values.items() if v is not None))
    return load_host_settings(path)


def test_settings_of_the_guide(tmp_path: Path) -> None:
    settings = load(tmp_path)
    assert settings.trustee_url == "http://127.0.0.1:8080"
    assert settings.key_path == "default/aliyun/model-decryption-key"
    assert settings.service_port == 8080
    assert settings.mount_point == Path("/tmp/model")


def test_a_path_prefix_of_the_broker_is_kept(tmp_path: Path) -> None:
    settings = load(tmp_path, TRUSTEE_URL="http://host/cai-test/")
    assert settings.trustee_url == "http://host/cai-test"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"TRUSTEE_URL": None}, "TRUSTEE_URL is missing"),
        ({"MODEL_KEY_ID": ""}, "MODEL_KEY_ID is missing"),
        ({"TRUSTEE_URL": "ftp://x"}, "not an http"),
        ({"MODEL_KEY_ID": "kbs:///a/b"}, "not a key id"),
        ({"MODEL_KEY_ID": "kbs:///a/b/../c"}, "not a key id"),
        ({"MODEL_SERVICE_PORT": "0"}, "1 to 65535"),
        ({"MODEL_SERVICE_PORT": "٣"}, "1 to 65535"),
        ({"MODEL_MOUNT_POINT": "model"}, "absolute"),
        ({"MODEL_MOUNT_POINT": "/a/../b"}, "absolute"),
        ({"MODEL_ENCRYPTION_METHOD": "sam"}, "closed format"),
        ({"MODEL_ENCRYPTION_METHOD": "gocryptfs"}, "not supported by this version"),
        ({"MODEL_MOUNTPOINT": "/x"}, "unknown setting"),
    ],
)
def test_refused_settings(tmp_path: Path, changes: dict[str, str | None], text: str) -> None:
    with pytest.raises(SettingError, match=text):
        load(tmp_path, **changes)


def test_a_misspelt_name_gets_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(SettingError) as caught:
        load(tmp_path, MODEL_MOUNTPOINT="/x")
    assert caught.value.hint == "did you mean 'MODEL_MOUNT_POINT'?"


def test_key_ids_of_the_documents() -> None:
    assert key_path("kbs:///repo-1/type_2/tag.v3") == "repo-1/type_2/tag.v3"


def test_launch_measures_the_settings_and_the_exact_bytes(tmp_path: Path) -> None:
    settings = load(tmp_path)
    encoded = write_launch(settings, owner_key="ab" * 32, service_id="demo")
    launch = parse_launch(encoded)
    assert launch.digest == sha384(encoded).hexdigest()
    assert "MODEL_OSS_ACCESS_KEY_ID" not in encoded.decode()
    launch.require_settings(settings)
    assert parse_launch(encoded + b"\n").digest != launch.digest


@pytest.mark.parametrize("name", ["TRUSTEE_URL", "MODEL_KEY_ID", "MODEL_MOUNT_POINT"])
def test_a_changed_measured_setting_is_refused(tmp_path: Path, name: str) -> None:
    launch = parse_launch(write_launch(load(tmp_path), owner_key="ab" * 32, service_id="demo"))
    changed = load(tmp_path, **{name: ENV[name] + "x"})
    with pytest.raises(SettingError, match=name):
        launch.require_settings(changed)


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("cai-launch", 2), ("owner_key", "AB" * 32), ("kbs", "stock"), ("kbs_key", "ab"), ("settings", []),
        ("settings", {"MODEL_OSS_ENDPOINT": "x"}), ("images", {"a": 1}), ("dialects", "cai/1"),
        ("extra", 1), ("service_id", None),
    ],
)
def test_malformed_launch_documents(tmp_path: Path, member: str, value: object) -> None:
    encoded = write_launch(load(tmp_path), owner_key="ab" * 32, service_id="demo")
    body = jcs.parse(encoded, what="launch", limit=10_000)
    body[member] = value
    with pytest.raises(CaiError):
        parse_launch(jcs.canonical(body))
